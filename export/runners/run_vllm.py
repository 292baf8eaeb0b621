"""Loads an artifact in stock vLLM, as `vllm serve DIRECTORY --config DIRECTORY/vllm.yaml` would."""

from __future__ import annotations

import os
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.runners.probe_io import run
from export.vllm_file import read_vllm_file
from gradmap.runtimes.vllm_environment import cpu_wants_float32

TOP_LOGPROBS = 20  # what vLLM gives without being asked for more
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONSAFEPATH": "1",  # what it starts takes no module from the working directory
}


def outcome_of(
    directory: Path, input_ids: Tensor, greedy_tokens: int
) -> tuple[dict[str, Tensor], str]:
    from vllm import LLM, SamplingParams

    length = input_ids.shape[1] + greedy_tokens
    dtype = "float32" if cpu_wants_float32() else read_vllm_file(directory).dtype or "auto"
    engine = LLM(
        str(directory),
        dtype=dtype,
        trust_remote_code=False,
        max_model_len=length,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    scoring = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=TOP_LOGPROBS, detokenize=False
    )
    decoding = SamplingParams(
        max_tokens=max(greedy_tokens, 1), temperature=0, ignore_eos=True, detokenize=False
    )
    # vLLM generates one token at least, for which a model may have no room behind the whole probe
    prompts = [{"prompt_token_ids": sample} for sample in input_ids[:, : length - 1].tolist()]
    scored = engine.generate(prompts, scoring, use_tqdm=False)
    decoded = engine.generate(prompts[:1], decoding, use_tqdm=False)
    best = [[_best(position) for position in output.prompt_logprobs[1:]] for output in scored]
    tensors = {
        "logprob_ids": torch.tensor(
            [[[token for token, _ in row] for row in rows] for rows in best]
        ),
        "logprobs": torch.tensor([[[value for _, value in row] for row in rows] for rows in best]),
        "greedy_ids": torch.tensor(
            decoded[0].outputs[0].token_ids[:greedy_tokens], dtype=torch.int64
        ),
    }
    distribution = packages_distributions()["vllm"][0]
    return tensors, f"{distribution} {version(distribution)}, {dtype}"


def _best(logprobs: dict[int, Any]) -> list[tuple[int, float]]:
    """The most likely tokens of one position; vLLM adds the prompt's own token where it is not
    among them."""
    ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)
    return [(token, entry.logprob) for token, entry in ranked[:TOP_LOGPROBS]]


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)  # before vLLM is imported
    run(outcome_of)
