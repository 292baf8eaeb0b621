"""Eight-bit weights for vLLM, as the compressed-tensors library defines its schemes INT8 (W8A8) and
FP8_DYNAMIC.

Data-free: every output channel's weights are rounded to the nearest of 255 steps, or to the nearest
floating-point number of eight bits (E4M3), with one scale each. Activations are quantised per token
while serving, so nothing else is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmap.model.architectures import Architecture
from gradmap.model.safetensors_reader import TensorSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

# The output layer, and the maps of OPT-350M around its layers: an error there reaches every logit.
AROUND_LAYERS = ["lm_head", "re:.*project_(in|out)$"]
# Of a config.json.
CONFIG_KEY = "quantization_config"


@dataclass(frozen=True)
class EightBits:
    """preset: what compressed-tensors calls the scheme; stored: the dtype of the weights; packing:
    its name for how they are stored."""

    preset: str
    stored: torch.dtype
    packing: str

    @property
    def scheme(self) -> QuantizationScheme:
        from compressed_tensors.quantization import preset_name_to_scheme

        return preset_name_to_scheme(self.preset, ["Linear"])


# By the name that --quantise has for them.
EIGHT_BITS = {
    "int8": EightBits("INT8", torch.int8, "int-quantized"),
    "fp8": EightBits("FP8_DYNAMIC", torch.float8_e4m3fn, "float-quantized"),
}


def unquantised(architecture: Architecture) -> list[str]:
    """The linear maps that stay as they are, as compressed-tensors names them: those around the
    layers, and what chooses among experts, where an error is another expert."""
    return [*AROUND_LAYERS, *(rf"re:.*\.{router}$" for router in architecture.routers)]


def quantised_specs(spec: TensorSpec, quantise: str) -> tuple[TensorSpec, TensorSpec]:
    """What is stored for a weight (d_out, d_in): the eight-bit weight, and its scales (d_out,
    1)."""
    weight = TensorSpec(spec.name, EIGHT_BITS[quantise].stored, spec.shape)
    return weight, TensorSpec(f"{spec.name}_scale", torch.float32, (spec.shape[0], 1))


def quantise_weight(weight: Tensor, quantise: str) -> tuple[Tensor, Tensor]:
    """Returns the eight-bit weight (d_out, d_in) and scales (d_out, 1) float32, whose product is
    near `weight`."""
    from compressed_tensors.quantization import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    kind = EIGHT_BITS[quantise]
    args = kind.scheme.weights
    low, high = weight.float().aminmax(dim=1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, args)
    return quantize(weight.float(), scale, zero_point, args, dtype=kind.stored), scale


def quantisation_config(quantise: str, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, which vLLM and transformers recognise. ignore:
    what stays as it is."""
    from compressed_tensors.quantization import QuantizationConfig

    kind = EIGHT_BITS[quantise]
    config: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": kind.scheme},
        format=kind.packing,
        quantization_status="compressed",
        ignore=ignore,
    ).to_dict()
    return config
