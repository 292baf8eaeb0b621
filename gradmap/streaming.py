"""A model of which one layer at a time is in memory: each is read from its safetensors files when it is called.

The layers' parameters are on torch's `meta` device; a layer that is called becomes real, and the one that was real
before goes back. Code that runs a model needs to know nothing of it, as long as it runs layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from gradmap.architectures import architecture_of
from gradmap.checkpoint import Checkpoint
from gradmap.safetensors_reader import StoredTensor, list_tensors, read_tensor


def load_streamed_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads all but the layers, and arranges for each layer to be read when it is called."""
    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    with device, init_empty_weights(include_buffers=False):  # buffers are real, and small
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    source = _TensorsOnDisk(model, checkpoint, device)
    source.load(None)
    model.tie_weights()
    layers = list(architecture_of(checkpoint.config).layer_list(model))
    held: list[nn.Module] = []

    def hold(layer: nn.Module, args: Any) -> None:
        if layer in held or "forward" in vars(layer):  # nobody runs it (gradmap.layerwise.forward_replaced)
            return
        while held:
            held.pop().to("meta")
        held.append(layer)
        source.load(layers.index(layer))

    for layer in layers:
        layer.register_forward_pre_hook(hold)
    return model.eval().requires_grad_(False)


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
        for stored in [tensor for path in checkpoint.weight_files for tensor in list_tensors(path)]:
            place = architecture.parse_tensor_name(stored.spec.name)
            self._stored[place[1] if place else None].append(stored)

    def load(self, layer: int | None) -> None:
        """Makes the parameters of one layer real. transformers knows how a checkpoint's names and shapes become its
        modules' (the experts of a mixture are stacked)."""
        tensors = {stored.spec.name: read_tensor(stored) for stored in self._stored[layer]}
        options = LoadStateDictConfig(device_map={"": self._device}, weight_mapping=self._conversions)
        with self._architecture.layers_replaced(self._model, self._all_layers):  # names count all layers
            convert_and_load_state_dict_in_model(self._model, tensors, options)
        self._model.requires_grad_(False)
