"""Scores with an exported ONNX graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax
from torch import Tensor

from gradmap.common.finite import require_finite
from gradmap.evaluation.backends import LOGITS, UNLIMITED_TOKENS, IsDone, Score, ScoreRequest, never
from gradmap.model.model_sizes import context_length
from gradmap.runtimes.onnx_session import OnnxCausalLM

BATCH_TOKENS = 1024


class OnnxBackend:
    """Scores with ONNX Runtime. directory: holds model.onnx and the model's config.json (config:
    its contents)."""

    name = "onnxruntime"

    def __init__(self, directory: Path, config: dict[str, Any], end_tokens: Sequence[int]) -> None:
        self._session = OnnxCausalLM(directory)
        self.end_tokens = set(end_tokens)
        self.max_tokens = context_length(config) or UNLIMITED_TOKENS
        self.vocabulary: int | None = int(config["vocab_size"])

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        by_input: dict[tuple[int, ...], list[ScoreRequest]] = {}
        # Answers of one token share their input: the context.
        for request in requests:
            by_input.setdefault(request.context + request.continuation[:-1], []).append(request)
        inputs = sorted(by_input, key=len, reverse=True)
        scores: dict[ScoreRequest, Score] = {}
        while inputs:
            batch = inputs[: max(1, BATCH_TOKENS // len(inputs[0]))]
            # Padded on the right, which causal attention does not see.
            ids = np.zeros((len(batch), len(batch[0])), dtype=np.int64)
            for row, tokens in zip(ids, batch, strict=True):
                row[: len(tokens)] = tokens
            logits, _ = self._session.step(ids, None)
            for row_logits, tokens in zip(logits, batch, strict=True):
                scores |= {request: _score(row_logits, request) for request in by_input[tokens]}
            inputs = inputs[len(batch) :]
        return [scores[request] for request in requests]

    def log_probabilities(self, request: ScoreRequest) -> Tensor:
        tokens = request.context + request.continuation[:-1]
        logits, _ = self._session.step(np.array([tokens], dtype=np.int64), None)
        return torch.from_numpy(logits[0, len(request.context) - 1 :]).double().log_softmax(dim=-1)

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone = never
    ) -> list[list[int]]:
        return [self._generate(prompt, new_tokens, is_done) for prompt in prompts]

    def _generate(self, prompt: Sequence[int], new_tokens: int, is_done: IsDone) -> list[int]:
        answer: list[int] = []
        logits, cache = self._session.step(np.array([prompt], dtype=np.int64), None)
        while len(answer) < new_tokens:
            token = _most_likely(logits[0, -1])
            if token in self.end_tokens:
                break
            answer.append(token)
            if is_done(answer):
                break
            logits, cache = self._session.step(np.array([[token]], dtype=np.int64), cache)
        return answer


def _most_likely(logits: npt.NDArray[np.float32]) -> int:
    """The most likely token by logits (V,)."""
    require_finite(LOGITS, torch.from_numpy(logits))
    return int(logits.argmax())


def _score(logits: npt.NDArray[np.float32], request: ScoreRequest) -> Score:
    """The score of a request. logits: (L, V), at least up to the position that predicts the last
    token of the continuation."""
    first = len(request.context) - 1
    predicting = logits[first : first + len(request.continuation)]
    chosen = (np.arange(len(predicting)), np.array(request.continuation))
    log_likelihood = log_softmax(predicting.astype(np.float64), axis=1)[chosen].sum()
    greedy_tokens = int((predicting[chosen] >= predicting.max(axis=1)).sum())
    return Score(float(log_likelihood), greedy_tokens)
