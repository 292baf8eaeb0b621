"""Loads an ONNX artifact in a plain onnxruntime session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from export.runners.probe_io import Step, decode_greedily, run
from gradmap.onnx_session import OnnxCausalLM


def onnx_step(model: OnnxCausalLM) -> Step:
    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, longer = model.step(ids.numpy(), cache)
        return torch.from_numpy(logits[:, -1]), longer

    return step


def outcome_of(directory: Path, input_ids: Tensor, greedy_tokens: int) -> tuple[dict[str, Tensor], str]:
    model = OnnxCausalLM(directory)
    step = onnx_step(model)
    _, cache = step(input_ids[:, :-1].contiguous(), None)
    tensors = {
        "logits": torch.from_numpy(model.step(input_ids.numpy(), None)[0]),
        "cached_logits": step(input_ids[:, -1:].contiguous(), cache)[0],
        "greedy_ids": decode_greedily(step, input_ids[:1], greedy_tokens)[0],
    }
    return tensors, f"onnxruntime {onnxruntime.__version__}, {model.provider}"


if __name__ == "__main__":
    run(outcome_of)
