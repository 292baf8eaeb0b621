"""A model of which one layer at a time is in memory: each is read from its safetensors files when
it is called.

The layers' parameters are on torch's `meta` device; a layer that is called becomes real, and the
one that was real before goes back. Code that runs a model needs to know nothing of it, as long as
it runs layer by layer.

While a GPU computes a layer, a thread reads the next one into the CPU's memory. A CPU computes far
longer than it reads, and has one memory for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from gradmap.common.finite import require_finite_weights
from gradmap.model.architectures import Architecture, architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.safetensors_reader import StoredTensor, list_tensors, read_tensor


def load_streamed_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads all but the layers, and arranges for each layer to be read when it is called."""
    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    with device, init_empty_weights(include_buffers=False):  # buffers are real, and small
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    source = _TensorsOnDisk(model, checkpoint, device)
    source.place(source.read(None))
    model.tie_weights()
    architecture = architecture_of(checkpoint.config)
    held = _HeldLayers(model, architecture, source, reads_ahead(device))
    for layer in architecture.layer_list(model):
        layer.register_forward_pre_hook(held.change)
    return model.eval().requires_grad_(False)


def reads_ahead(device: torch.device) -> bool:
    """Whether the next layer is read while this one is computed."""
    return device.type == "cuda"


class _HeldLayers:
    """Which layers are real, and which one is on its way from the disk.

    No more are in memory than what runs is made of, and one. What runs is a layer, a sublayer of
    one, or the attention of one with the FFN of another.
    """

    def __init__(
        self, model: Any, architecture: Architecture, source: _TensorsOnDisk, ahead: bool
    ) -> None:
        self._model, self._architecture, self._source = model, architecture, source
        self._all_layers = list(architecture.layer_list(model))
        self._layer_of = {
            child: index
            for index, layer in enumerate(self._all_layers)
            for child in layer.children()
        }
        self._ahead = ahead
        self._held: frozenset[int] = frozenset()
        self._coming: _Coming | None = None

    def change(self, layer: nn.Module, args: Any) -> None:
        """Before a layer is called: makes real what it is made of."""
        needed, previous = frozenset(self._layers_in(layer)), self._held
        # nobody runs it (gradmap.model.layerwise.forward_replaced)
        if needed == previous or "forward" in vars(layer):
            return
        self._held &= needed
        for index in previous - needed:
            self._all_layers[index].to("meta")
        for index in sorted(needed - previous, key=self._is_coming, reverse=True):
            self._source.place(self._tensors_of(index))
            self._held |= {index}
        if self._ahead:
            self._read_ahead(previous)

    def _layers_in(self, layer: nn.Module) -> list[int]:
        """Whose modules it has, in order."""
        owners = [self._layer_of.get(child) for child in layer.children()]
        return sorted({owner for owner in owners if owner is not None})

    def _read_ahead(self, previous: Collection[int]) -> None:
        layers = self._architecture.layer_list(self._model)
        alive = [index for layer in layers for index in self._layers_in(layer)]
        following = expected_after(previous, self._held, alive)
        self._coming = None if following is None else _Coming.start(following, self._source)

    def _is_coming(self, layer: int) -> bool:
        return self._coming is not None and self._coming.layer == layer

    def _tensors_of(self, layer: int) -> dict[str, Tensor]:
        """The layer's tensors, which are on their way or, if that is another layer, are read now.
        Raises what reading raised."""
        coming, self._coming = self._coming, None
        if coming is not None and coming.layer == layer:
            return coming.tensors.result()
        if coming is not None:
            wait([coming.tensors])  # and is let go: one is read at a time
            del coming
        return self._source.read(layer)


def expected_after(
    previous: Collection[int], running: Collection[int], alive: Sequence[int]
) -> int | None:
    """The layer that will be needed next, if there is one: that behind those that are running or,
    where layers run from the last to the first, that before them. previous: those that ran before.
    alive: those that the model has something of, in order."""
    places = [alive.index(layer) for layer in running]
    before, behind = alive[: min(places)], alive[max(places) + 1 :]
    if behind and behind[0] in previous:
        return before[-1] if before else None
    return behind[0] if behind else None


@dataclass(frozen=True)
class _Coming:
    """A layer that a thread reads, which ends when it is read."""

    layer: int
    tensors: Future[dict[str, Tensor]]

    @classmethod
    def start(cls, layer: int, source: _TensorsOnDisk) -> _Coming:
        thread = ThreadPoolExecutor(max_workers=1)
        tensors = thread.submit(source.read, layer)
        thread.shutdown(wait=False)
        return cls(layer, tensors)


class _TensorsOnDisk:
    """Where the tensors of a checkpoint are, by layer; None stands for all that is in no layer."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        architecture = architecture_of(checkpoint.config)
        self._model = model
        self._architecture = architecture
        self._all_layers = architecture.layer_list(model)
        self._device = device
        self._conversions = get_model_conversion_mapping(model)
        self._stored: dict[int | None, list[StoredTensor]] = defaultdict(list)
        self._known_finite: set[int | None] = set()
        for stored in [tensor for path in checkpoint.weight_files for tensor in list_tensors(path)]:
            place = architecture.parse_tensor_name(stored.spec.name)
            self._stored[place[1] if place else None].append(stored)

    def read(self, layer: int | None) -> dict[str, Tensor]:
        """The tensors of one layer by name, in the CPU's memory; for a GPU, in such that it reaches
        by itself.

        Raises UserError if one is not finite, when the layer is read for the first time.
        """
        pinned = self._device.type == "cuda"
        tensors = {stored.spec.name: read_tensor(stored, pinned) for stored in self._stored[layer]}
        if layer not in self._known_finite:
            require_finite_weights(tensors.items())
            self._known_finite.add(layer)
        return tensors

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Makes the parameters of a layer real. transformers knows how a checkpoint's names and
        shapes become its modules' (the experts of a mixture are stacked)."""
        options = LoadStateDictConfig(
            device_map={"": self._device}, weight_mapping=self._conversions
        )
        # names count all layers
        with self._architecture.layers_replaced(self._model, self._all_layers):
            convert_and_load_state_dict_in_model(self._model, tensors, options)
        self._model.requires_grad_(False)
