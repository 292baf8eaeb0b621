"""A causal language model in a plain ONNX Runtime session, with its KV cache kept where the session
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

ONNX_FILE = "model.onnx"
PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Cache = list[Any]


class OnnxCausalLM:
    """Reads DIRECTORY/model.onnx, whose inputs and outputs are named as optimum names them.

    provider: the execution provider the session really uses; onnxruntime's list of available ones
    promises more. threads: of one operator; None leaves the choice to onnxruntime.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        available = [
            name for name in PREFERRED_PROVIDERS if name in onnxruntime.get_available_providers()
        ]
        self._session = onnxruntime.InferenceSession(
            directory / ONNX_FILE, options, providers=available
        )
        self.provider = str(self._session.get_providers()[0])
        self._device = "cuda" if self.provider.startswith("CUDA") else "cpu"
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._wants_positions = "position_ids" in inputs
        self._past = [
            value for name, value in inputs.items() if name.startswith("past_key_values.")
        ]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def step(
        self, input_ids: npt.NDArray[np.int64], cache: Cache | None
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Runs new tokens (B, n) after what the cache holds. Returns their logits (B, n, V) and the
        longer cache."""
        binding = self._session.io_binding()
        cache = self._empty_cache(len(input_ids)) if cache is None else cache
        for value, past in zip(self._past, cache, strict=True):
            binding.bind_ortvalue_input(value.name, past)
        # held until the run is over: a binding does not keep its inputs alive
        arrays = self._token_inputs(input_ids, past_tokens=cache[0].shape()[2])
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy().astype(np.float32), present

    def _token_inputs(
        self, input_ids: npt.NDArray[np.int64], past_tokens: int
    ) -> dict[str, npt.NDArray[np.int64]]:
        batch, tokens = input_ids.shape
        inputs = {
            "input_ids": input_ids,
            "attention_mask": np.ones((batch, past_tokens + tokens), dtype=np.int64),
        }
        if self._wants_positions:
            positions = np.arange(past_tokens, past_tokens + tokens, dtype=np.int64)
            inputs["position_ids"] = np.tile(positions, (batch, 1))
        return inputs

    def _empty_cache(self, batch: int) -> Cache:
        """(B, heads, 0, head size) for each: nothing is cached yet."""
        cache = []
        for value in self._past:
            shape = (batch, int(value.shape[1]), 0, int(value.shape[3]))
            empty = np.zeros(shape, dtype=_NUMPY_TYPES[value.type])
            cache.append(onnxruntime.OrtValue.ortvalue_from_numpy(empty, self._device, 0))
        return cache
