"""vLLM in this process, to generate with."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.orphans import Watch
from gradmap.runtimes.vllm_environment import threads_within_quota, vllm_defaults


class VllmEngine:
    """directory: a checkpoint. dtype: a name that vLLM knows, see
    `gradmap.runtimes.vllm_environment.vllm_dtype`. window: the most tokens of a request, with its
    answer. Raises UserError if vLLM is not installed."""

    def __init__(self, directory: Path, dtype: str, window: int) -> None:
        defaults = vllm_defaults() | threads_within_quota() | {"VLLM_LOGGING_LEVEL": "ERROR"}
        for variable, value in defaults.items():
            os.environ.setdefault(variable, value)
        try:
            from vllm import LLM
        except ImportError:
            raise UserError(
                "vLLM is not installed; pip install 'gradmap[gpu]', or 'gradmap[cpu]'."
            ) from None
        # Compiling takes longer than an evaluation on a CPU; scores are the same.
        self._llm = LLM(
            str(directory),
            dtype=dtype,
            max_model_len=window,
            enforce_eager=True,
            max_logprobs=1,
            trust_remote_code=False,
        )
        self._watch = Watch()

    @property
    def end_token(self) -> int | None:
        """Of the tokenizer."""
        token: int | None = self._llm.get_tokenizer().eos_token_id
        return token

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
        """vLLM's outputs. sampling: its SamplingParams, or one for each prompt."""
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        # its progress bar divides by zero where TQDM_DISABLE is set
        outputs: list[Any] = self._llm.generate(inputs, sampling, use_tqdm=False)
        return outputs

    def close(self) -> None:
        """Ends vLLM's own process, so that the next model has the memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._watch.close()
        del self._llm
        gc.collect()
