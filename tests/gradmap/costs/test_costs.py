"""The arithmetic of costs against FLOPs that are counted while the code runs, on pico models; and
its assumptions."""

import math
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import CONFIG_MAPPING

from benchmarks.flops import counted
from gradmap.common.errors import UserError
from gradmap.costs import footprint, timing
from gradmap.costs import steps as costs
from gradmap.costs.steps import CalibrationSize, Hardware
from gradmap.costs.timing import Pruning
from gradmap.data.calibration import HELD_OUT_FRACTION, Calibration
from gradmap.methods import racing, repair, replace_me, ridge, sequential, writing
from gradmap.methods.compensation import Pruned
from gradmap.methods.costs import default_seconds, repair_seconds, select_seconds
from gradmap.methods.features import Walks
from gradmap.methods.gradmap.scores import gradient_scores
from gradmap.methods.registry import compensator, selector_names
from gradmap.methods.selection import Selection, Step, Subject
from gradmap.methods.shortened_llama import taylor_scores
from gradmap.methods.shortgpt import block_influences
from gradmap.model.batching import Batches
from gradmap.model.checkpoint import read_config
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import losses_from, run_layers
from gradmap.model.shape import Shape
from tests.conftest import FAMILIES, make_pico
from tests.families import VOCABULARY, config_of
from tests.gradmap.removals import pairs

distilling = import_module("gradmap.methods.distil")  # the package has a function of that name
# Short samples, so that a weight's gradient norm is cheapest by Gram matrices, as for models of a
# real width.
SIZE = CalibrationSize(samples=8, tokens=8)
LAYERS = 13


def shape_of(family, **changes):
    return Shape.of_config(CONFIG_MAPPING[family](**config_of(family) | changes).to_dict())


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Llama with so many layers that the middle one is about in the middle; wide enough for maps
    to be most of it."""
    changes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": 128,
        "intermediate_size": 192,
        "vocab_size": VOCABULARY,
    }
    directory = tmp_path_factory.mktemp("deep")
    return make_pico("llama", directory, **changes), shape_of("llama", **changes)


def calibration():
    ids = torch.randint(
        3, VOCABULARY, (SIZE.samples, SIZE.tokens), generator=torch.Generator().manual_seed(1)
    )
    return Calibration("none", 0, ids)


def pruned(pico, removed):
    model = pico.load(torch.float32)
    return Pruned(LayeredModel.of(model), calibration(), removed, Batches(2))


# Of which tests/families.py has more than every test runs on.
MORE_SIZES = ("smollm3", "granite", "cohere", "glm4", "starcoder2", "phi", "arcee", "nemotron")


@pytest.mark.parametrize("family", (*FAMILIES, *MORE_SIZES))
def test_sizes_are_those_of_the_model(picos, family, tmp_path):
    """Matrices of the layers, and the embeddings; Qwen2-MoE's gate of the shared expert, a vector,
    is left out."""
    pico = picos[family] if family in picos else make_pico(family, tmp_path)
    shape, model = Shape.of_config(read_config(str(pico.directory))), pico.load()
    layers = pico.architecture.layer_list(model)
    matrices = sum(
        weight.numel()
        for weight in layers.parameters()
        if weight.dim() >= 2 and 1 not in weight.shape
    )
    assert shape.layers * shape.layer_parameters == pytest.approx(matrices)
    rest = matrices + sum(
        weight.numel() for name, weight in model.named_parameters() if "embed_tokens" in name
    )
    untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert shape.tied != untied
    if family not in ("opt", "gpt2"):  # which have embeddings of positions too
        assert shape.parameters(shape.layers) == pytest.approx(
            rest + untied * shape.head_parameters
        )


def test_every_family_that_is_pruned_has_its_sizes_read():
    for family in FAMILIES:
        assert shape_of(family).layers == 5


def test_what_cannot_be_read_is_said():
    with pytest.raises(UserError, match="of a mamba model cannot be read; known are apertus, "):
        Shape.of_config({"model_type": "mamba", "hidden_size": 8})
    config = CONFIG_MAPPING["llama"](**config_of("llama")).to_dict()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="has no intermediate_size"):
        Shape.of_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_multiplies_what_is_said(picos, family):
    """A mixture's experts get whole tokens, so that their number is exact; only rotations come on
    top: 2%."""
    model, shape = picos[family].layered(torch.float32), shape_of(family)
    ids = calibration().input_ids
    flops = counted(lambda: losses_from(model, run_layers(model, ids), ids))
    assert flops == pytest.approx(ids.numel() * shape.forward_flops(shape.layers), rel=0.02)


def test_scores_multiply_what_is_said(deep):
    pico, shape = deep
    model, ids = pico.layered(torch.float32), calibration().input_ids
    flops = counted(lambda: gradient_scores(model, ids, Batches(4)))
    assert flops == pytest.approx(costs.score_flops(shape, 1, SIZE), rel=0.02)


@pytest.mark.parametrize(
    ("measure", "flops"),
    [(block_influences, costs.influence_flops), (taylor_scores, costs.taylor_flops)],
)
def test_a_round_of_other_selectors_multiplies_what_is_said(deep, measure, flops):
    pico, shape = deep
    model = pico.layered(torch.float32)
    counts = counted(lambda: measure(model, calibration().input_ids))
    assert counts == pytest.approx(flops(shape, 1, SIZE), rel=0.02)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_selection_by_repairs_multiplies_what_is_said(deep, monkeypatch, rounds):
    """Up to what is a matter of the model: how many are tried, on how many samples, and where the
    removals are."""
    pico, shape = deep
    monkeypatch.setattr(racing, "is_clearly_worse", lambda losses, best: False)
    monkeypatch.setattr(costs, "MEASURED_SHARE", 1.0)
    tried = []
    try_one = repair.RepairScorer._try
    monkeypatch.setattr(
        repair.RepairScorer,
        "_try",
        lambda scorer, *args: tried.append(args[0]) or try_one(scorer, *args),
    )

    def run():
        scorer = repair.RepairScorer(Subject(pico.layered(torch.float32), calibration()))
        steps: tuple[Step, ...] = ()
        for _ in range(rounds):
            scores = scorer.score(Selection(steps), lambda n: None)
            best = min(scores, key=scores.__getitem__)
            # no bounds, so that all layers are tried
            steps += (Step(dict.fromkeys(scores, -math.inf), (best,)),)

    flops = counted(run)
    assert tried[: LAYERS - 1] and len(set(tried[: LAYERS - 1])) == LAYERS - 1
    if rounds > 1:
        monkeypatch.setattr(
            costs, "TRIED_IN_LATER_ROUNDS", (len(tried) - (LAYERS - 1)) / (rounds - 1)
        )
    assert flops == pytest.approx(
        costs.selection_flops(shape, rounds, SIZE), rel=0.02 if rounds == 1 else 0.1
    )


def test_a_refit_and_the_training_behind_it_multiply_what_is_said(deep, monkeypatch):
    """A run in the middle; of what the arithmetic takes for half, a layer more or less: 10%."""
    pico, shape = deep
    subject = pruned(pico, pairs(6))
    walks = Walks.start(subject)
    closed_form = None

    def fit():
        nonlocal closed_form
        closed_form = sequential.fit_around_runs(subject, "refit", walks)
        walks.dense.finish({})

    tried = []
    solve = ridge.ClosedForm.solve
    monkeypatch.setattr(
        ridge.ClosedForm, "solve", lambda form, lam: (tried.append(lam), solve(form, lam))[1]
    )
    flops = counted(fit)
    monkeypatch.setattr(costs, "LAMBDAS", len(tried) / costs.FITS_AROUND)  # in each fit
    assert flops == pytest.approx(costs.refit_flops(shape, 1, 1, SIZE), rel=0.1)
    writing_flops = counted(lambda: distilling.written_by_dense(subject))
    ids = torch.cat([subject.calibration.fit_ids, distilling.written_by_dense(subject)])
    lessons = distilling.Lessons(ids, subject.walk(subject.sublayers, ids).finish({}))
    training = writing_flops + counted(
        lambda: distilling.train_low_rank(subject, closed_form, lessons)
    )
    one_flop_a_second = Hardware("one FLOP/s", 1.0, float("inf"), 0, efficiency=1.0)
    writing = timing.writing_seconds(shape, one_flop_a_second, SIZE)
    assert training == pytest.approx(costs.training_flops(shape, 1, SIZE) + writing, rel=0.1)


@pytest.mark.parametrize("name", ["replace-me", "replace-me-cosine", "ghosted"])
def test_a_matrix_before_a_block_multiplies_what_is_said(deep, name):
    """As above: a run in the middle."""
    pico, shape = deep
    size = CalibrationSize(samples=32, tokens=8)
    ids = torch.randint(3, VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(1))
    subject = replace(pruned(pico, pairs(6)), calibration=Calibration("none", 0, ids))
    one_flop_a_second = Hardware("one FLOP/s", 1.0, float("inf"), 0, efficiency=1.0)
    expected = repair_seconds(shape, one_flop_a_second, Pruning(1, compensator=name, size=size))
    assert counted(lambda: compensator(name).run(subject)) == pytest.approx(expected, rel=0.1)


def test_choices_of_other_modules_are_the_same_here():
    assert costs.HELD_OUT_FRACTION == HELD_OUT_FRACTION
    assert (costs.SELECT_FIT_TOKENS, costs.SELECT_MEASURE_TOKENS) == (
        repair.FIT_TOKENS,
        repair.MEASURE_TOKENS,
    )
    assert costs.DIRECTION_EPOCHS == replace_me.EPOCHS
    assert costs.WRITTEN_TOGETHER == writing.WRITTEN_TOGETHER
    names = ("WRITTEN_PER_SAMPLE", "RANK", "STEP_SAMPLES", "TOKENS_PER_INPUT")
    assert [getattr(costs, name) for name in names] == [getattr(distilling, name) for name in names]


def test_samples_are_shared_out_as_a_calibration_does():
    for samples, tokens in ((128, 128), (10, 16), (2, 4096)):
        ids = torch.zeros(samples, tokens, dtype=torch.int64)
        real, size = Calibration("none", 0, ids), CalibrationSize(samples, tokens)
        assert (len(real.fit_ids), len(real.held_out_ids)) == (size.fit, size.held_out)
    assert CalibrationSize(2, 8192).select_fit_tokens == 8192  # at least a sample


def test_samples_that_a_closed_form_lacks_are_counted_as_distil_does(deep):
    pico, shape = deep
    lacking = distilling.samples_lacking(pruned(pico, pairs(6)))
    assert SIZE.lacking(shape.inner) == lacking > 0
    assert CalibrationSize(128, 128).lacking(shape.inner) == 0


HARDWARE = Hardware("test", flops=1e12, bandwidth=1e11, memory=1e10, efficiency=1.0)
SHAPE = Shape("small", 64, 128, 12, 0.5, 1000)


def test_time_grows_with_what_is_to_be_done_and_falls_with_the_hardware():
    few, many = Pruning(2), Pruning(6)
    faster = replace(HARDWARE, flops=2e12, bandwidth=2e11)
    for seconds in (select_seconds, repair_seconds):
        assert seconds(SHAPE, HARDWARE, Pruning(2, size=CalibrationSize(32, 64))) < seconds(
            SHAPE, HARDWARE, few
        )
        assert seconds(SHAPE, faster, few) == pytest.approx(seconds(SHAPE, HARDWARE, few) / 2)
        assert seconds(SHAPE, replace(HARDWARE, devices=2), few) == pytest.approx(
            seconds(SHAPE, faster, few)
        )
        assert seconds(SHAPE, replace(HARDWARE, head_cost=2.0), few) > seconds(SHAPE, HARDWARE, few)
    assert select_seconds(SHAPE, HARDWARE, few) < select_seconds(SHAPE, HARDWARE, many)
    assert default_seconds(SHAPE, HARDWARE, 2) == pytest.approx(
        select_seconds(SHAPE, HARDWARE, few) + repair_seconds(SHAPE, HARDWARE, few)
    )


def test_methods_cost_what_they_do():
    select = {name: select_seconds(SHAPE, HARDWARE, Pruning(3, name)) for name in selector_names()}
    assert select["random"] == select["manual"] == 0
    assert 0 < select["block-influence"] < select["gradient"] < select["sleb"]
    assert select["gradpruner"] is None and select["mka"] is None  # not known, and so not guessed
    once = Pruning(3, "gradient", one_shot=True)
    assert select_seconds(SHAPE, HARDWARE, once) < select["gradient"]
    names = ("none", "sequential", "refit", "distil", "magnitude")
    fitted = [repair_seconds(SHAPE, HARDWARE, Pruning(3, compensator=name)) for name in names]
    assert fitted[0] == 0 < fitted[1] < fitted[2] < fitted[3] and fitted[4] is None
    uncorrectable = Pruning(3, correctable=False)
    assert 0 < repair_seconds(SHAPE, HARDWARE, uncorrectable) < fitted[3]


def test_every_second_removed_layer_begins_a_run():
    assert [Pruning(remove).runs for remove in range(1, 7)] == [1, 1, 1, 2, 2, 3]


def test_a_single_stream_waits_for_its_weights_and_many_for_products():
    read = HARDWARE.weight_bytes * SHAPE.read_parameters(12) / HARDWARE.bandwidth
    assert timing.token_seconds(SHAPE, HARDWARE) == pytest.approx(read)
    assert timing.token_seconds(SHAPE, HARDWARE, 10**4) == pytest.approx(
        10**4 * SHAPE.forward_flops(12) / 1e12
    )
    mixture = replace(SHAPE, inner=256, stored_inner=1024, experts=8)
    assert (
        mixture.read_parameters(12, 1)
        < mixture.read_parameters(12, 8)
        == mixture.read_parameters(12, 100)
    )


def test_memory_holds_the_weights_as_they_are_computed_with():
    stored = SHAPE.parameters(12)
    assert footprint.model_bytes(SHAPE, HARDWARE) == 2 * stored
    autocast = replace(HARDWARE, state_bytes=4)
    tied = replace(SHAPE, tied=True)
    assert footprint.model_bytes(tied, HARDWARE) == 2 * tied.parameters(12)
    # the embedding stays in float32, and the head parts from it
    assert (
        footprint.model_bytes(tied, autocast)
        == 2 * 12 * tied.layer_parameters + 6 * tied.head_parameters
    )
    assert footprint.prune_bytes(SHAPE, HARDWARE, Pruning(2)) > footprint.prune_bytes(
        SHAPE, HARDWARE, Pruning(2, "random", "none")
    )


def test_a_streamed_model_holds_a_layer_and_the_hidden_states_between_all():
    states = (SHAPE.layers + 1) * 4 * 8 * SHAPE.width
    assert footprint.streamed_bytes(SHAPE, CalibrationSize(4, 8)) == 2 * (
        SHAPE.layer_parameters + states
    )


def test_torch_is_not_needed():
    code = "import sys, gradmap.costs.steps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
