"""Loads an ONNX artifact in a plain onnxruntime session, as a program would that knows optimum's
names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from export.runners.probe_io import decode_greedily, run

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
ARRAY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Arrays = dict[str, npt.NDArray[Any]]


class Session:
    """DIRECTORY/model.onnx with every input and output as an array: the slow, obvious way to run
    it."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings of optimisations that do not apply
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        self._session = onnxruntime.InferenceSession(
            directory / "model.onnx", options, providers=providers
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    @property
    def provider(self) -> str:
        return str(self._session.get_providers()[0])

    def logits(self, ids: Tensor, past: Arrays | None) -> tuple[Tensor, Arrays]:
        """Logits of tokens (B, n) after those in `past`, by the inputs' names: float32 (B, n, V);
        and the longer past."""
        past = self._empty_past(len(ids)) if past is None else past
        before = next(iter(past.values())).shape[2]
        positions = np.arange(before, before + ids.shape[1], dtype=np.int64)
        of_tokens = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((len(ids), before + ids.shape[1]), dtype=np.int64),
            "position_ids": np.tile(positions, (len(ids), 1)),
        }
        known = {name: array for name, array in of_tokens.items() if name in self._inputs}
        feeds = past | known
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        logits = torch.from_numpy(found.pop("logits").astype(np.float32))
        longer = {
            name.replace("present", "past_key_values", 1): array for name, array in found.items()
        }
        return logits, longer

    def last_logits(self, ids: Tensor, past: Arrays | None) -> tuple[Tensor, Arrays]:
        """Logits of the last of tokens (B, n), (B, V); and the longer past."""
        logits, longer = self.logits(ids, past)
        return logits[:, -1], longer

    def _empty_past(self, batch: int) -> Arrays:
        """(B, heads, 0, head size) each."""
        empty = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                shape = (batch, value.shape[1], 0, value.shape[3])
                empty[name] = np.zeros(shape, dtype=ARRAY_TYPES[value.type])
        return empty


def outcome_of(
    directory: Path, input_ids: Tensor, greedy_tokens: int
) -> tuple[dict[str, Tensor], str]:
    """input_ids: (B, T). Logits are (B, T, V), those through the cache (B, V), greedy_ids (G,)."""
    session = Session(directory)
    _, past = session.logits(input_ids[:, :-1], None)
    tensors = {
        "logits": session.logits(input_ids, None)[0],
        "cached_logits": session.last_logits(input_ids[:, -1:], past)[0],
        "greedy_ids": decode_greedily(session.last_logits, input_ids[:1], greedy_tokens)[0],
    }
    return tensors, f"onnxruntime {onnxruntime.__version__}, {session.provider}"


if __name__ == "__main__":
    run(outcome_of)
