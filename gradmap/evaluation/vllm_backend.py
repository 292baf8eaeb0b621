"""Scores with vLLM in this process: for speed where there is a GPU, and for what is going to be
served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmap.evaluation.backends import IsDone, Score, ScoreRequest, never
from gradmap.model.ends import until_end
from gradmap.model.model_sizes import context_length
from gradmap.runtimes.vllm_engine import VllmEngine

MAX_TOKENS = 4096


class VllmBackend:
    """Scores with vLLM. directory: a checkpoint. dtype: a name that vLLM knows, see
    `gradmap.runtimes.vllm_environment.vllm_dtype`."""

    name = "vllm"

    def __init__(
        self, directory: Path, config: Mapping[str, Any], dtype: str, end_tokens: Sequence[int]
    ) -> None:
        window = min(MAX_TOKENS, context_length(config) or MAX_TOKENS)
        self._engine = VllmEngine(directory, dtype, window)
        # vLLM reads the whole request, and insists on generating a token after it.
        self.max_tokens = window - 2
        self.vocabulary: int | None = int(config["vocab_size"])
        own = self._engine.end_token
        self.end_tokens = {*end_tokens, *([] if own is None else [own])}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = self._engine.generate(
            [request.context + request.continuation for request in requests], sampling
        )
        return [
            score_of_logprobs(_prompt_logprobs(output)[-len(request.continuation) :])
            for request, output in zip(requests, outputs, strict=True)
        ]

    def log_probabilities(self, request: ScoreRequest) -> None:
        """vLLM shows those of some tokens only."""

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone = never
    ) -> list[list[int]]:
        from vllm import SamplingParams

        outputs = self._engine.generate(
            prompts, SamplingParams(max_tokens=new_tokens, temperature=0, detokenize=False)
        )
        return [until_end(output.outputs[0].token_ids, self.end_tokens) for output in outputs]

    def close(self) -> None:
        self._engine.close()


def _prompt_logprobs(output: Any) -> list[tuple[float, int]]:
    """Log probability and rank of every token of a prompt but the first, which has none."""
    pairs = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
    return [
        (entry[token].logprob, entry[token].rank) for entry, token in pairs if entry is not None
    ]


def score_of_logprobs(logprobs: Sequence[tuple[float, int]]) -> Score:
    """The score of a continuation, from the log probability (nats) and the rank of every token of
    it; rank 1 is the most likely one."""
    log_likelihood = sum(value for value, _ in logprobs)
    return Score(log_likelihood, sum(rank == 1 for _, rank in logprobs))
