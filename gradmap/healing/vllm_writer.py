"""The dense model writes by vLLM: many times as fast as transformers on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradmap.runtimes.vllm_engine import VllmEngine


class VllmWriter:
    """Goes on with prompts. ends: tokens that end an answer; where there are none, texts go on
    behind EOS. seed: of the first text that is written; each has the next."""

    def __init__(self, engine: VllmEngine, ends: Collection[int], seed: int) -> None:
        self._engine, self._ends, self._seed = engine, ends, seed

    @classmethod
    @contextmanager
    def started(
        cls, directory: Path, dtype: str, window: int, ends: Collection[int], seed: int
    ) -> Iterator[VllmWriter]:
        """dtype, window: see VllmEngine."""
        engine = VllmEngine(directory, dtype, window)
        try:
            yield cls(engine, ends, seed)
        finally:
            engine.close()

    def continued(
        self,
        prompts: Sequence[list[int]],
        most: int,
        first: int,
        advance: Callable[[int], None],
    ) -> list[tuple[int, ...]]:
        """Each prompt with what follows, `most` tokens if it does not end before; drawn from the
        whole next-token distribution. first: how many texts were written before these."""
        seeds = range(self._seed + first, self._seed + first + len(prompts))
        outputs = self._engine.generate(prompts, [self._sampling(most, seed) for seed in seeds])
        written = [
            (*prompt, *output.outputs[0].token_ids)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        advance(sum(map(len, written)))
        return written

    def _sampling(self, most: int, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=1.0,
            max_tokens=most,
            seed=seed,
            ignore_eos=not self._ends,
            stop_token_ids=sorted(self._ends),
            detokenize=False,
        )
