"""How a model is built: where it keeps its layers, and which linear maps add to its hidden state.

Nothing of it is listed. It is found by running a small model of the same config
(gradmap.model.discovery), so that a family needs no entry anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradmap.common.errors import UserError
from gradmap.common.wording import listed
from gradmap.model.configs import cached_by_config, require_safe
from gradmap.model.corrections import Place
from gradmap.model.discovery import Names, find_names
from gradmap.model.layer_runs import Stored, find_layer_list, runs_of_layers, stored_tensors
from gradmap.model.norms import Norm
from gradmap.model.safetensors_reader import TensorSpec
from gradmap.model.small_model import NotPrunableError, small_ids, trying_small_model
from gradmap.model.sublayers import Part, Sublayer

STACKED = "its checkpoints hold the experts of a layer in one tensor"
NORM_FOLLOWS = "a norm follows the down projection, so it is no linear map any more"


@dataclass(frozen=True)
class Architecture:
    """Names of one model family, and how its layers add to the hidden state.

    layers: dotted path of the layer list inside `...ForCausalLM`. down_projection: dotted path,
    inside a layer, of the last linear map of the FFN; of a mixture of experts, of the
        whole FFN, whose last maps are the down projections of all experts.
    attention_output: dotted path, inside a layer, of the last linear map of the attention.
    feed_forward: what of a layer's children is of its FFN, with the norms that belong to it, as
        transformers calls them and as checkpoints do; the others are of its attention.
    experts: of a mixture of experts, the weights that are their down projections (paths inside a
        layer). expert_down_projections: the pattern of those tensors' names in a checkpoint.
    experts_apart: whether every expert has tensors of its own in a checkpoint, with the names that
        transformers gives their stack (so in Qwen's and DeepSeek's mixtures, not in Mixtral).
    routers: of a mixture of experts, the linear maps that weigh experts and not hidden states;
        patterns of their paths inside a layer, as transformers calls them and as checkpoints do.
    transposed_linear: weights are stored (d_in, d_out), as in GPT-2's Conv1D, and not (d_out,
        d_in).
    multipliers: what the outputs of attention and FFN are multiplied with before they are added to
        the hidden state (Granite).
    norms: the RMS norms behind the last linear maps of attention and FFN, where they are all that
        stands between those and the hidden state.
    beside: the children that return something beside what they make of the hidden state; an empty
        path is the layer itself.
    uncorrectable: why no W' can be folded into the down projection, if that is so; unpaired: why
        only whole layers can go; as the end of a sentence that begins with the model.
    """

    layers: str
    down_projection: str
    attention_output: str
    feed_forward: tuple[str, ...]
    experts: tuple[str, ...] = ()
    expert_down_projections: str | None = None
    experts_apart: bool = True
    routers: tuple[str, ...] = ()
    transposed_linear: bool = False
    multipliers: tuple[float, float] = (1.0, 1.0)
    norms: tuple[Norm | None, Norm | None] = (None, None)
    beside: tuple[str, ...] = ()
    uncorrectable: str | None = None
    unpaired: str | None = None

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @contextmanager
    def layers_replaced(self, model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
        """Gives the model another list of layers while the block runs."""
        parent_path, _, list_name = self.layers.rpartition(".")
        parent = model.get_submodule(parent_path)
        original = self.layer_list(model)
        try:
            setattr(parent, list_name, layers)
            yield
        finally:
            setattr(parent, list_name, original)

    def part_of(self, name: str) -> Part:
        """Which sublayer a path or a tensor name inside a layer belongs to. What leaves the layer,
        whose path is empty, leaves its FFN."""
        child = name.partition(".")[0]
        return Part.FFN if child in ("", *self.feed_forward) else Part.ATTENTION

    def sublayer_of(self, layer: int, name: str) -> Sublayer:
        """The one of a layer that a path or a tensor name inside it belongs to."""
        return Sublayer(layer, self.part_of(name))

    def output_map(self, part: Part) -> str:
        """The path, inside a layer, of the last linear map of a sublayer."""
        return self.attention_output if part is Part.ATTENTION else self.down_projection

    @property
    def is_fitted(self) -> bool:
        """Whether the last maps of sublayers can be fitted: nothing follows them, or an RMS
        norm."""
        only_norms = self.uncorrectable == NORM_FOLLOWS and None not in self.norms
        return self.uncorrectable is None or only_norms

    def down_projection_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.down_projection)

    def down_projection_weights(self, layer: nn.Module) -> list[nn.Parameter]:
        """The weights that W' multiplies, as transformers holds them: those of all experts are one
        stacked tensor."""
        if self.expert_down_projections is None:
            return [self.down_projection_of(layer).get_parameter("weight")]
        return [parameter for name, parameter in layer.named_parameters() if name in self.experts]

    def is_down_projection(self, name: str) -> bool:
        """Whether W' is folded into the tensor of this name (inside a layer)."""
        if self.expert_down_projections is None:
            return name == f"{self.down_projection}.weight"
        return re.fullmatch(self.expert_down_projections, name) is not None

    def is_weight_of(self, target: str, name: str) -> bool:
        """Whether the tensor of this name (inside a layer) is the weight of a linear map (its path
        inside a layer)."""
        return (
            self.is_down_projection(name)
            if target == self.down_projection
            else name == f"{target}.weight"
        )

    def is_part_of(self, target: str, name: str) -> bool:
        """Whether it is the weight or the bias of the map."""
        return self.is_weight_of(target, name) or name == f"{target}.bias"

    def parts_of(self, layer: nn.Module, target: str) -> list[nn.Parameter]:
        """Weight and bias of a map of a layer in memory; several weights for the down projections
        of experts."""
        module = layer.get_submodule(target)
        is_down_projection = target == self.down_projection
        weights = (
            self.down_projection_weights(layer)
            if is_down_projection
            else [module.get_parameter("weight")]
        )
        bias: nn.Parameter | None = getattr(module, "bias", None)
        return weights if bias is None else [*weights, bias]

    def name_left(self, name: str, places: Mapping[Sublayer, int]) -> str | None:
        """What a tensor is called once layers are gone, given which layers the sublayers that are
        left are of; None if it goes with them."""
        parsed = self.parse_tensor_name(name)
        if parsed is None:
            return name
        prefix, layer, suffix = parsed
        place = places.get(self.sublayer_of(layer, suffix))
        return None if place is None else f"{prefix}.{place}.{suffix}"

    def places_of(self, name: str, places: Iterable[Place]) -> list[Place]:
        """Those of some linear maps that a tensor of a checkpoint is the weight or the bias of."""
        parsed = self.parse_tensor_name(name)
        if parsed is None:
            return []
        _, layer, suffix = parsed
        return [
            place
            for place in places
            if place.layer == layer and self.is_part_of(place.target, suffix)
        ]

    def is_map_of_a_layer(self, spec: TensorSpec) -> bool:
        """Whether a tensor of a checkpoint is the weight of a linear map of hidden states."""
        parsed = self.parse_tensor_name(spec.name)
        if parsed is None or len(spec.shape) != 2:
            return False
        return not any(re.fullmatch(router, _stem(parsed[2])) for router in self.routers)

    def parse_tensor_name(self, name: str) -> tuple[str, int, str] | None:
        """Splits `model.layers.7.mlp.up_proj.weight` into (`model.layers`, 7,
        `mlp.up_proj.weight`).

        Returns None for a tensor outside the layers. Checkpoints saved from the bare decoder leave
        out leading parts of the path (`h.0.…` for `transformer.h.0.…`), so any suffix of it counts.
        """
        parts = self.layers.split(".")
        suffixes = "|".join(re.escape(".".join(parts[start:])) for start in range(len(parts)))
        match = re.fullmatch(rf"({suffixes})\.(\d+)\.(.+)", name)
        return (match[1], int(match[2]), match[3]) if match else None


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Finds how a model with this config is built. Raises UserError if it is none that can be
    pruned by layers, with what was seen."""
    model_type = config.get("model_type")
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type)) is None:
        raise UserError(
            f"Model type {model_type!r} is no causal language model that transformers knows."
        )
    require_safe(config)
    return _found(config)


@cached_by_config
def _found(config: dict[str, Any]) -> Architecture:
    with trying_small_model(config) as model:
        input_ids = small_ids()
        layers = find_layer_list(model, model.config.num_hidden_layers, input_ids)
        found = [find_names(run) for run in runs_of_layers(model, layers, input_ids)]
        shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
        return _as_stored(_named(layers, found), stored_tensors(model), shapes)


def _named(layers: str, found: Sequence[Names]) -> Architecture:
    """What was found in each layer, as one."""
    mixed = any(names.down_projection is None for names in found)
    outputs = {names.block if mixed else names.output for names in found}
    if len(outputs) > 1:
        raise NotPrunableError(
            f"its FFNs end in different places ({listed(sorted(outputs), 'and')})"
        )
    multipliers = [multiplier or 1.0 for multiplier in found[0].multipliers]
    return Architecture(
        layers=layers,
        down_projection=outputs.pop(),
        attention_output=found[0].attention_output,
        feed_forward=_all_of(names.feed_forward for names in found),
        experts=_all_of(names.weights for names in found) if mixed else (),
        transposed_linear=found[0].transposed,
        multipliers=(multipliers[Part.ATTENTION], multipliers[Part.FFN]),
        norms=found[0].norms if len({names.norms for names in found}) == 1 else (None, None),
        beside=_all_of(names.beside for names in found),
        uncorrectable=_uncorrectable(found),
        unpaired=_unpaired(found),
    )


def _all_of(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Each once, in the order in which they first occur."""
    return tuple(dict.fromkeys(chain.from_iterable(names)))


def _uncorrectable(found: Sequence[Names]) -> str | None:
    multipliers = {names.multipliers[Part.FFN] for names in found}
    if any(names.expert_biases for names in found):
        return "the down projections of its experts have biases, which W' does not reach"
    if len(multipliers) > 1:
        return "its layers scale what they add in different ways"
    return NORM_FOLLOWS if None in multipliers else None


def _unpaired(found: Sequence[Names]) -> str | None:
    if any(names.parallel for names in found):
        return "its attention and its FFN read the same input"
    if any(names.joined for names in found):
        return "its attention or its FFN adds the hidden state by itself"
    if len({names.attention_output for names in found}) > 1:
        return "its layers have attentions of different kinds"
    if len({names.multipliers[Part.ATTENTION] for names in found}) > 1:
        return "its layers scale what their attentions add in different ways"
    if len({names.beside for names in found}) > 1:
        return "its FFNs return different things"
    return None


def _as_stored(
    named: Architecture, stored: Sequence[Stored], shapes: Mapping[str, torch.Size]
) -> Architecture:
    """With the names that checkpoints have. shapes: of the parameters of the model."""
    feed_forward, patterns = list(named.feed_forward), set()
    routers: set[str] = set()
    stacked, apart = False, True
    for tensor in stored:
        parsed, held = map(named.parse_tensor_name, (tensor.name, tensor.parameter))
        if parsed is None or held is None:
            continue
        if named.part_of(held[2]) is Part.FFN:
            feed_forward.append(parsed[2].partition(".")[0])
            if _weighs_experts(named, tensor.parameter, shapes):
                routers.update(re.escape(_stem(name)) for name in (parsed[2], held[2]))
        if held[2] in named.experts:
            patterns.add(_as_pattern(parsed[2]))
            stacked |= tensor.stacked
            apart &= not tensor.stacked and _without_numbers(parsed[2]) == _stem(held[2])
    return replace(
        named,
        feed_forward=tuple(dict.fromkeys(feed_forward)),
        expert_down_projections="|".join(sorted(patterns)) if named.experts else None,
        experts_apart=apart,
        routers=tuple(sorted(routers)),
        uncorrectable=STACKED if stacked else named.uncorrectable,
    )


def _weighs_experts(named: Architecture, parameter: str, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether a parameter is a map with an output for each expert, or with one for all of them
    (the gate of a shared one)."""
    parsed = named.parse_tensor_name(parameter)
    is_map = parameter.endswith(".weight") and len(shapes[parameter]) == 2
    if parsed is None or not is_map:
        return False
    layer = parameter.removesuffix(parsed[2])
    weights = [shapes[layer + path] for path in named.experts if layer + path in shapes]
    if not weights:
        return False
    stacks = [weight[0] for weight in weights if len(weight) == 3]
    return shapes[parameter][0] in (1, *(stacks or [len(weights)]))


def _stem(name: str) -> str:
    """The map that a tensor is the weight of."""
    return name.removesuffix(".weight")


def _without_numbers(name: str) -> str:
    """What transformers calls the stack of a tensor of all experts."""
    return re.sub(r"\.\d+(?=\.)", "", _stem(name))


def _as_pattern(name: str) -> str:
    """Of the names of the same tensor of all experts: their numbers may be any."""
    return re.sub(r"(?<=\.)\d+(?=\\.)", r"\\d+", re.escape(name))
