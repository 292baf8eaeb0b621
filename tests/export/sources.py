"""Hand-made plans of pico models with strong corrections, and how they are exported."""

from dataclasses import replace

import torch

from export.artifact import export_artifacts
from export.options import ExportOptions
from export.reference import random_probe
from export.writers import Source
from gradmap.data.calibration import hash_token_ids
from gradmap.model.corrections import (
    Change,
    Gain,
    LowRank,
    Place,
    Projection,
    Scale,
    Update,
    weight_of,
)
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import joined_layers
from gradmap.pruning.plan import BaseModelIdentity, CalibrationRecord, Plan, StepRecord
from tests.families import LAYERS
from tests.gradmap.removals import attention, ffn, pairs

REMOVED = pairs(3, 1)
# A layer, and two neighbours of which the layer of A1 and M2 is left.
SHIFTED = pairs("M1+A2", 3)
CORRECTED = 4
SHARD_BYTES = 30_000
# Stands in for an environment without our packages: importing any of them fails.
WITHOUT_US = (
    "import sys; sys.modules.update(dict.fromkeys(('gradmap', 'export', 'serving', 'loadtest')));"
)


def make_source(pico, correction=1.0, removed=REMOVED) -> Source:
    """A hand-made plan with strong corrections of every kind, so that one that is lost or misplaced
    cannot hide."""
    checkpoint = pico.checkpoint
    plan = Plan(
        base_model=BaseModelIdentity(
            name=checkpoint.name,
            model_type=pico.family,
            layers=LAYERS,
            files=checkpoint.file_hashes,
        ),
        recipe={},
        calibration=CalibrationRecord(
            source="-", seed=0, samples=1, tokens=1, bos=None, held_out_samples=1, sha256="-"
        ),
        removal_order=list(removed),
        steps=[StepRecord(scores={}, removed=list(removed))],
        drift={},
        corrections=[],
        environment={},
        timings_s={},
    )
    changes = make_changes(pico, correction) | make_changes_of_joined(pico, removed)
    return Source(checkpoint, plan, "-", changes, random_probe(200)[:, :20])


def make_changes(pico, correction=1.0):
    """W' on a down projection, scales on the attention's output, an update and a low-rank change on
    the first map."""
    model = pico.load()
    generator = torch.Generator().manual_seed(5)
    place, module = next(LayeredModel.of(model).linear_maps([attention(0)]))
    d_out, d_in = weight_of(module).shape

    def noise(scale, *shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    # as large as the weights themselves: in a query projection, more would turn attention into a
    # single token's
    changes: dict[Place, tuple[Change, ...]] = {
        place: (
            Update(noise(0.1, d_out, d_in)),
            LowRank(noise(0.25, 2, d_in), noise(0.25, d_out, 2)),
        )
    }
    if pico.architecture.is_fitted:
        output = Place(CORRECTED, pico.architecture.attention_output)
        changes[output] = (
            Scale(torch.tensor(-1.5, dtype=torch.float64)),
            Scale(torch.tensor(0.5)),
        )
        width = len(model.get_input_embeddings().weight[0])
        matrix = correction * (torch.eye(width, dtype=torch.float64) + noise(0.5, width, width))
        changes[Place(CORRECTED, pico.architecture.down_projection)] = (Projection(matrix),)
        for norm in filter(None, pico.architecture.norms):
            gain = Gain.of(1 + noise(0.5, width), norm.offset)
            changes[Place(CORRECTED, norm.path)] = (gain,)
    return changes


def make_changes_of_joined(pico, removed):
    """In each layer of which the attention and the FFN were of different ones: a low-rank change on
    the first map of either, and W' on the last."""
    model = LayeredModel.of(pico.load())
    generator = torch.Generator().manual_seed(6)

    def noise(scale, *shape):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    changes: dict[Place, tuple[Change, ...]] = {}
    for layer in joined_layers(LAYERS, removed):
        if layer.attention == layer.ffn:
            continue
        for sublayer in (attention(layer.attention), ffn(layer.ffn)):
            maps = list(model.linear_maps([sublayer]))
            for place, module in maps[:1]:  # experts have none
                d_out, d_in = weight_of(module).shape
                changes[place] = (LowRank(noise(0.25, 2, d_in), noise(0.25, d_out, 2)),)
            if pico.architecture.is_fitted:
                width = len(model.network.get_input_embeddings().weight[0])
                matrix = torch.eye(width, dtype=torch.float64) + noise(0.5, width, width)
                changes[model.output_of(sublayer)] = (Projection(matrix),)
    return changes


def export(source, out, *formats, shard_bytes=10**9, quality=None, **settings):
    """Without vLLM's own check, which takes a minute; tests/test_end_to_end.py has it."""
    options = ExportOptions(formats=list(formats), check_vllm=False, **settings)
    small = options.model_copy(update={"shard_size_gb": shard_bytes / 1e9})  # than users may ask
    return export_artifacts(source, small, out, quality)


def unfolded_logits(pico, source, dtype):
    model = pico.load(dtype)
    with LayeredModel.of(model).changed(source.changes, without=source.removed):
        return model(input_ids=source.probe_ids).logits


def with_samples(source, samples=24, tokens=20):
    """The source with random texts, for quantisation that looks at some."""
    generator = torch.Generator().manual_seed(7)
    vocabulary = source.checkpoint.config["vocab_size"]
    drawn = torch.randint(vocabulary, (samples, tokens), generator=generator)
    calibration = CalibrationRecord(
        source="random",
        seed=7,
        samples=samples,
        tokens=tokens,
        bos=None,
        held_out_samples=1,
        sha256=hash_token_ids(drawn),
    )
    return replace(source, samples=drawn, calibration=calibration)
