"""A causal language model as layers that can be left out, changed, and run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradmap.common.distributed import share_of, summed
from gradmap.model.architectures import Architecture, architecture_of
from gradmap.model.batching import forward_batch
from gradmap.model.configs import prune_config
from gradmap.model.corrections import HIDDEN_STATE, Changes, Gain, Place, correcting_hook
from gradmap.model.sublayers import Pair, Part, Sublayer, Unit, joined_layers

# Told of passes, forward or backward, of one sample through one layer.
Advance = Callable[[int], None]


class NormPlace(NamedTuple):
    """An RMS norm of one layer. offset: see gradmap.model.norms.Norm."""

    place: Place
    offset: float

    def changed(self, factor: Tensor) -> tuple[Place, Gain]:
        """Another gain of it: so many times what it is, (d,)."""
        return self.place, Gain.of(factor, self.offset)


@dataclass(frozen=True, eq=False)
class LayeredModel:
    """A `...ForCausalLM` of transformers and the names of its family.

    network: the model itself. Everything here leaves it as it was when a block ends.
    """

    network: Any
    architecture: Architecture

    @classmethod
    def of(cls, network: Any) -> LayeredModel:
        """Raises UserError if the family is unknown or unsafe to prune."""
        return cls(network, architecture_of(network.config.to_dict()))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that it has now."""
        return self.architecture.layer_list(self.network)

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    def down_projection(self, layer: int) -> nn.Module:
        return self.architecture.down_projection_of(self.layers[layer])

    def map_at(self, place: Place) -> nn.Module:
        return self.layers[place.layer].get_submodule(place.target)

    def output_of(self, sublayer: Sublayer) -> Place:
        """The last linear map of a sublayer."""
        return Place(sublayer.layer, self.architecture.output_map(sublayer.part))

    def multiplier(self, sublayer: Sublayer) -> float:
        """What the output of its last linear map is multiplied with, before it is added to the
        hidden state."""
        return self.architecture.multipliers[sublayer.part]

    def norm_behind(self, sublayer: Sublayer) -> NormPlace | None:
        """The RMS norm that the output of its last linear map passes, if one does."""
        norm = self.architecture.norms[sublayer.part]
        return None if norm is None else NormPlace(Place(sublayer.layer, norm.path), norm.offset)

    def gain_at(self, norm: NormPlace) -> Tensor:
        """(d,) float64."""
        return norm.offset + self.map_at(norm.place).get_parameter("weight").detach().double()

    def as_layer_output(self, hidden: Tensor) -> Any:
        """What a layer returns if this leaves it: the hidden state, or something beside it."""
        return (hidden, None) if HIDDEN_STATE in self.architecture.beside else hidden

    def linear_maps(self, sublayers: Sequence[Sublayer]) -> Iterator[tuple[Place, nn.Module]]:
        """Every linear map of these; not the stacked weights of experts, nor their router."""
        for layer, part in sublayers:
            for path, module in self.layers[layer].named_modules():
                if (
                    isinstance(module, nn.Linear | Conv1D)
                    and self.architecture.part_of(path) is part
                ):
                    yield Place(layer, path), module

    def pieces(self, unit: Unit) -> list[nn.Module]:
        """What a unit is made of, to be run one after the other: the layers that it has now, or
        each sublayer by itself."""
        if unit == "layer":
            return list(self.layers)
        return [self.sublayer(layer, part) for layer in self.layers for part in Part]

    def of_sublayers(self, sublayers: Sequence[Sublayer]) -> nn.Module:
        """One or both sublayers of a layer, to be run by themselves."""
        layer = self.layers[sublayers[0].layer]
        return layer if len(sublayers) == len(Part) else self.sublayer(layer, sublayers[0].part)

    def sublayer(self, layer: nn.Module, part: Part) -> nn.Module:
        """A layer of which the other sublayer adds nothing. Its modules are the layer's own."""
        other = {
            name: _AddsNothing(returns_more=name in self.architecture.beside)
            for name, _ in layer.named_children()
            if self.architecture.part_of(name) is not part
        }
        return _with_children(layer, other, hooked=layer if part is Part.FFN else nn.Module())

    def _joined(self, attention: nn.Module, ffn: nn.Module) -> nn.Module:
        """A layer with the attention of one and the FFN of another."""
        if attention is ffn:
            return attention
        of_ffn = {
            name: child
            for name, child in ffn.named_children()
            if self.architecture.part_of(name) is Part.FFN
        }
        return _with_children(attention, of_ffn, hooked=ffn)

    @contextmanager
    def without(self, removed: Sequence[Pair]) -> Iterator[None]:
        """Runs without these sublayers; what is left of different layers is joined.

        The layer list, every module's `layer_idx` (its KV cache slot) and the config's per-layer
        fields follow.
        """
        original, original_config = self.layers, self.config.to_dict()
        joined = joined_layers(len(original), removed)
        pruned_config = prune_config(original_config, removed)
        changed = [key for key, value in pruned_config.items() if value != original_config[key]]
        kept = nn.ModuleList(
            self._joined(original[layer.attention], original[layer.ffn]) for layer in joined
        )
        try:
            _number_layers(kept)
            self._configure({key: pruned_config[key] for key in changed})
            with self.architecture.layers_replaced(self.network, kept):
                yield
        finally:
            _number_layers(original)
            self._configure({key: original_config[key] for key in changed})

    @contextmanager
    def changed(self, changes: Changes, without: Sequence[Pair] = ()) -> Iterator[None]:
        """Runs with changes on hooks, and without some sublayers. Places are in the layers that it
        has before."""
        with ExitStack() as stack:
            for place, of_place in changes.items():
                hook = self.map_at(place).register_forward_hook(correcting_hook(of_place))
                stack.callback(hook.remove)
            if without:
                stack.enter_context(self.without(without))
            yield

    def batches(
        self, input_ids: Tensor, advance: Advance = lambda n: None, size: int | None = None
    ) -> Iterator[Tensor]:
        """This process's share of the samples (N, T), some at a time, on the model's device: (B,
        T).

        size: B; if not given, as many as a pass takes that keeps nothing for a backward one.
        advance: told of a batch's passes through all layers when the next one is asked for.
        """
        size = size or forward_batch(input_ids, self.device)
        for batch in share_of(input_ids)[0].split(size):
            yield batch.to(self.device)
            advance(len(self.layers) * len(batch))

    def total(
        self,
        input_ids: Tensor,
        of_batch: Callable[[Tensor], Tensor],
        advance: Advance = lambda n: None,
        size: int | None = None,
    ) -> Tensor:
        """The sum, over all samples (N, T) and all processes, of what a batch (B, T) gives: (...)
        float64 in the CPU's memory."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches(input_ids, advance, size):
            total = total + of_batch(batch).double().cpu()
        return summed(total)

    def _configure(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            setattr(self.config, key, value)


class _AddsNothing(nn.Module):
    """Stands for a child of a layer that is not run: zero, a number. returns_more: whether it
    returns something beside that, as an attention its weights."""

    def __init__(self, returns_more: bool) -> None:
        super().__init__()
        self._returns_more = returns_more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        nothing = given.new_zeros(())
        return (nothing, None) if self._returns_more else nothing


def _with_children(
    layer: nn.Module, children: Mapping[str, nn.Module], hooked: nn.Module
) -> nn.Module:
    """A layer like this one, with some other children, and the forward hooks of `hooked`.

    What is behind a layer is behind its FFN, so that who watches or changes it goes with that.
    """
    made = copy(layer)
    made._modules = {**layer._modules, **children}
    # where layers are on several GPUs, accelerate has put a forward of its own into the layer
    moves = vars(made).pop("_hf_hook", None)
    if moves is not None:
        del made.forward, made._old_forward
        add_hook_to_module(made, moves)
    for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(made, hooks, getattr(hooked, hooks))
    return made


def _number_layers(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
