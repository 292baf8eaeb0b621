"""Eight-bit weights for vLLM, as the compressed-tensors library defines its INT8 scheme (W8A8).

Data-free: every output channel's weights are rounded to the nearest of 255 steps, with one scale
each. Activations are quantised per token while serving, so nothing else is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmap.model.safetensors_reader import TensorSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

# The output layer, and the maps of OPT-350M around its layers, stay as they are: an error there
# reaches every logit.
UNQUANTISED = ["lm_head", "re:.*project_(in|out)$"]


def quantised_specs(spec: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """What is stored for a weight (d_out, d_in): the eight-bit weight, and its scales (d_out,
    1)."""
    weight = TensorSpec(spec.name, torch.int8, spec.shape)
    return weight, TensorSpec(f"{spec.name}_scale", torch.float32, (spec.shape[0], 1))


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eight-bit weight (d_out, d_in) and scales (d_out, 1) float32, whose product is
    near `weight`."""
    from compressed_tensors.quantization import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = _scheme().weights
    low, high = weight.float().aminmax(dim=1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, args)
    return quantize(weight.float(), scale, zero_point, args, dtype=torch.int8), scale


def quantisation_config() -> dict[str, Any]:
    """The `quantization_config` of a config.json, which vLLM and transformers recognise."""
    from compressed_tensors.quantization import QuantizationConfig

    config: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": _scheme()},
        format="int-quantized",
        quantization_status="compressed",
        ignore=UNQUANTISED,
    ).to_dict()
    return config


def _scheme() -> QuantizationScheme:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme("INT8", ["Linear"])
