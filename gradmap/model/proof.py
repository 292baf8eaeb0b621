"""Proves on a small model that a family can be pruned, before a large one is touched: some layers
go, a weight is corrected, the rest is saved and loaded by transformers, and computes what it
computed in memory, with a cache and without."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gradmap.common.errors import first_line
from gradmap.common.files import write_json
from gradmap.model.architectures import architecture_of
from gradmap.model.configs import cached_by_config, prune_config
from gradmap.model.corrections import Change, Changes, Gain, Place, Projection, fold_changes
from gradmap.model.kinds import kinds_of
from gradmap.model.layer_runs import EXACT, FLOAT32, is_same
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import passes
from gradmap.model.model_files import SINGLE_NAME
from gradmap.model.small_model import (
    NotPrunableError,
    Saved,
    saved,
    small_ids,
    trying_small_model,
)
from gradmap.model.sublayers import Pair, Part, Sublayer, places_of_left, sublayers_of


def require_prunable(config: Mapping[str, Any]) -> None:
    """Raises UserError, with what was seen, unless a small model of this config can be pruned."""
    architecture_of(config)
    _prove(config)


@cached_by_config
def _prove(config: dict[str, Any]) -> None:
    architecture = architecture_of(config)
    with trying_small_model(config) as network:
        model, stored = LayeredModel(network, architecture), saved(network)
        if architecture.unpaired is None:
            _require_sublayers_in_a_row(model)
        for removed in _trials(model):
            _try(model, stored, removed)


def _require_sublayers_in_a_row(model: LayeredModel) -> None:
    """Raises NotPrunableError unless the sublayers, one after the other, compute what the layers
    do."""
    input_ids = small_ids()
    (*_, (_, of_layers)), (*_, (_, of_sublayers)) = (
        passes(model, input_ids, unit) for unit in ("layer", "pair")
    )
    if not is_same(of_sublayers, of_layers):
        raise NotPrunableError(
            "its attentions and FFNs, one after the other, do not compute what its layers do"
        )


def _trials(model: LayeredModel) -> list[list[Pair]]:
    """Removals to try: the second layer of each kind, or the last one if none is like another; and
    the first shifted pair."""
    kinds = kinds_of(model.layers)
    seconds = [place for place, kind in enumerate(kinds) if kinds[:place].count(kind) == 1]
    layers = [Pair.of_layer(place) for place in seconds or [len(kinds) - 1]]
    shifted = Pair(Sublayer(0, Part.FFN), Sublayer(1, Part.ATTENTION))
    return [layers] if model.architecture.unpaired else [layers, [shifted]]


def _try(model: LayeredModel, stored: Saved, removed: Sequence[Pair]) -> None:
    """Raises NotPrunableError unless what is saved is what was in memory."""
    input_ids, changes = small_ids(), _a_change(model, removed)
    with model.changed(changes, without=removed):
        expected = model.network(input_ids=input_ids, use_cache=False).logits
    what = f"without {', '.join(pair.words for pair in removed)}, what is saved"
    smaller = _reloaded(_pruned(stored, model, removed, changes), what)
    # what is folded into a norm is rounded to float32
    into_norms = any(isinstance(change, Gain) for change in chain.from_iterable(changes.values()))
    exact = FLOAT32 if into_norms else EXACT
    if not is_same(smaller(input_ids=input_ids, use_cache=False).logits, expected, exact):
        raise NotPrunableError(f"{what} does not compute what it did in memory")
    past = smaller(input_ids=input_ids[:, :-1], use_cache=True).past_key_values
    last = smaller(input_ids=input_ids[:, -1:], past_key_values=past, use_cache=True).logits
    # a token by itself is computed in other products than with those before it
    if not is_same(last[:, -1], expected[:, -1], FLOAT32):
        raise NotPrunableError(f"{what} does not compute with a cache what it does without")


def _a_change(model: LayeredModel, removed: Sequence[Pair]) -> Changes:
    """A W' of the linear map before the first removal, if there may be one, and another gain of the
    norm that follows the map, if one does."""
    if not model.architecture.is_fitted:
        return {}
    sublayers = sublayers_of(range(len(model.layers)))
    before = sublayers[sublayers.index(removed[0].first) - 1]
    width, norm = model.config.hidden_size, model.norm_behind(before)
    noise = torch.randn(width, width, dtype=torch.float64)
    changes: dict[Place, Sequence[Change]] = {
        model.output_of(before): (Projection(torch.eye(width) + 0.1 * noise),)
    }
    if norm is not None:
        place, gain = norm.changed(1 + 0.1 * torch.randn(width, dtype=torch.float64))
        changes[place] = (gain,)
    return changes


def _pruned(stored: Saved, model: LayeredModel, removed: Sequence[Pair], changes: Changes) -> Saved:
    """What is left of a checkpoint, as export writes it."""
    architecture, tensors = model.architecture, {}
    places = places_of_left(len(model.layers), removed)
    for name, tensor in stored.tensors.items():
        left = architecture.name_left(name, places)
        if left is None:
            continue
        changed = architecture.places_of(name, changes)
        of_tensor = list(chain.from_iterable(changes[place] for place in changed))
        transposed = architecture.transposed_linear
        tensors[left] = fold_changes(tensor, of_tensor, transposed) if of_tensor else tensor
    return Saved(prune_config(stored.config, removed), tensors)


def _reloaded(stored: Saved, what: str) -> Any:
    """The model that transformers makes of a checkpoint. Raises NotPrunableError if it lacks
    tensors, or has others."""
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory, "config.json"), stored.config)
        tensors = {name: tensor.contiguous() for name, tensor in stored.tensors.items()}
        save_file(tensors, Path(directory, SINGLE_NAME), metadata={"format": "pt"})
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float64,
                experts_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # whatever a family's code raises of what does not fit
            raise NotPrunableError(f"{what} cannot be loaded: {first_line(error)}") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise NotPrunableError(f"{what} has other tensors than its config asks for ({wrong[0]})")
    return model.eval()
