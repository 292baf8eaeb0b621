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
Prompt = dict[str, list[int]]
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
    """input_ids: (B, T). Log-probabilities and their tokens are (B, T - 1, k), those of the text
    (B, T - 1), or one position fewer where no token is to be generated; greedy_ids (G,)."""
    length = input_ids.shape[1] + greedy_tokens
    dtype = "float32" if cpu_wants_float32() else read_vllm_file(directory).dtype or "auto"
    engine = open_engine(directory, dtype, length)
    # vLLM generates one token at least, for which a model may have no room behind the whole probe
    prompts = [{"prompt_token_ids": sample} for sample in input_ids[:, : length - 1].tolist()]
    tensors = score(engine, prompts) | {
        "greedy_ids": decode(engine, prompts[0], greedy_tokens),
    }
    distribution = packages_distributions()["vllm"][0]
    return tensors, f"{distribution} {version(distribution)}, {dtype}"


def open_engine(directory: Path, dtype: str, length: int) -> Any:
    """vLLM's engine for texts of so many tokens, without compiling and without the tokenizer."""
    from vllm import LLM

    return LLM(
        str(directory),
        dtype=dtype,
        trust_remote_code=False,
        max_model_len=length,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )


def score(engine: Any, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Of every position of B prompts of T tokens but the first: the most likely tokens (B, T - 1,
    k), their log-probabilities, and that of the prompt's own token (B, T - 1)."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=TOP_LOGPROBS, detokenize=False
    )
    ids, logprobs, own = [], [], []
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    for output, prompt in zip(outputs, prompts, strict=True):
        positions = output.prompt_logprobs[1:]
        best = list(map(ranked, positions))
        ids.append(torch.stack([tokens for tokens, _ in best]))
        logprobs.append(torch.stack([values for _, values in best]))
        following = zip(positions, prompt["prompt_token_ids"][1:], strict=True)
        own.append(torch.tensor([position[token].logprob for position, token in following]))
    return {
        "logprob_ids": torch.stack(ids),
        "logprobs": torch.stack(logprobs),
        "text_logprobs": torch.stack(own),
    }


def decode(engine: Any, prompt: Prompt, tokens: int) -> Tensor:
    """What follows the prompt greedily: (tokens,), end-of-text tokens included."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=max(tokens, 1), temperature=0, ignore_eos=True, detokenize=False
    )
    (output,) = engine.generate([prompt], sampling, use_tqdm=False)
    return torch.tensor(output.outputs[0].token_ids[:tokens], dtype=torch.int64)


def ranked(logprobs: dict[int, Any]) -> tuple[Tensor, Tensor]:
    """The most likely tokens of one position, the best first, and their log-probabilities: (k,)
    each. vLLM adds the prompt's own token where it is not among them."""
    best = sorted(logprobs.items(), key=lambda item: item[1].rank)[:TOP_LOGPROBS]
    ids = torch.tensor([token for token, _ in best])
    return ids, torch.tensor([entry.logprob for _, entry in best])


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)  # before vLLM is imported
    run(outcome_of)
