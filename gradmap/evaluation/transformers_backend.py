"""Scores with a transformers model. A context is computed once, however many continuations are
scored after it.

The continuations of one context follow it in one sequence; each sees the context and itself, and
counts positions from the end of the context. So a question with four answers costs one pass over
the question and the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.failures import is_out_of_memory
from gradmap.common.finite import require_finite
from gradmap.evaluation.backends import LOGITS, UNLIMITED_TOKENS, IsDone, Score, ScoreRequest, never
from gradmap.evaluation.packing import (
    Pack,
    Together,
    inputs_of,
    predicting_rows,
    what_goes_together,
)
from gradmap.model.ends import until_end
from gradmap.model.model_sizes import context_length
from gradmap.model.precision import computing_in

# Tokens in one pass; halved when memory runs out. More brings no speed.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
# Logits in float32 at once: what stays in a CPU's cache, and is no fresh memory every time.
LOGITS_BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}
# Answers that are written together; halved when memory runs out. A batch goes on until its last
# answer ends, and a CPU computes no less for those that have ended.
GENERATION_BATCH = {"cpu": 8, "cuda": 32}


class TransformersBackend:
    """Scores with a transformers model. dtype: the name (of gradmap.model.precision) that `model`
    was loaded for.

    The model loses its generation settings (generation_config.json): `generate` would apply
    penalties, bans and beams of them to greedy decoding as well, and other backends have others or
    none. An answer is what the model finds most likely.
    """

    name = "transformers"

    def __init__(self, model: Any, dtype: str, end_tokens: Sequence[int] = ()) -> None:
        model.generation_config = GenerationConfig()
        self._model = model
        self._dtype = dtype
        self.end_tokens = tuple(end_tokens)
        self._batch_tokens = BATCH_TOKENS[model.device.type]
        self._generation_batch = GENERATION_BATCH[model.device.type]
        config = model.config
        self.max_tokens = context_length(config.to_dict()) or UNLIMITED_TOKENS
        self.vocabulary: int | None = int(config.vocab_size)
        # A packed sequence is longer than each of its requests; within a sliding window, or a chunk
        # of attention, that makes no difference.
        windows = [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
        ]
        self._longest_packed = min(window or self.max_tokens for window in windows)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        packs = list(self._pack(requests))
        # Never in one batch: the mask that branches need would let plain sequences see beyond a
        # sliding window.
        plain = self._score_packs([pack for pack in packs if not pack.is_branched])
        scores = plain | self._score_packs([pack for pack in packs if pack.is_branched])
        return [scores[request] for request in requests]

    def _score_packs(self, packs: Sequence[Pack]) -> dict[ScoreRequest, Score]:
        scores: dict[ScoreRequest, Score] = {}
        packs = sorted(packs, key=lambda pack: len(pack.tokens), reverse=True)
        while packs:
            batch = packs[: max(1, self._batch_tokens // len(packs[0].tokens))]
            try:
                with computing_in(self._dtype, self._model):
                    scores |= _score_batch(self._model, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_batches(len(batch))
                continue
            packs = packs[len(batch) :]
        return scores

    @torch.inference_mode()
    def log_probabilities(self, request: ScoreRequest) -> Tensor:
        pack = Pack.of([request])
        inputs = {"input_ids": torch.tensor([pack.tokens], device=self._model.device)}
        with computing_in(self._dtype, self._model):
            logits = _logits_at(self._model, torch.tensor(pack.predictions[0]), inputs)
        return logits.cpu().double().log_softmax(dim=-1)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone = never
    ) -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        # Prompts of one length together: a shorter one is padded.
        rest = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
        while rest:
            rows = self._next_rows(rest, prompts)
            try:
                with computing_in(self._dtype, self._model):
                    written = self._generate_batch(
                        [prompts[row] for row in rows], new_tokens, is_done
                    )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_answers(len(rows))
                continue
            answers |= zip(rows, written, strict=True)
            rest = rest[len(rows) :]
        return [answers[row] for row in range(len(prompts))]

    @cached_property
    def _together(self) -> Together:
        """Tried when requests come that could go together."""
        return what_goes_together(self._model.config.to_dict())

    def _next_rows(self, rest: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """The first of these prompts that are answered together, which are sorted by length."""
        rows = list(rest[: self._generation_batch])
        of_one_length = [row for row in rows if len(prompts[row]) == len(prompts[rows[0]])]
        return rows if len(rows) > len(of_one_length) and self._together.padding else of_one_length

    def _pack(self, requests: Sequence[ScoreRequest]) -> Iterator[Pack]:
        by_context: dict[tuple[int, ...], dict[ScoreRequest, None]] = {}
        for request in requests:
            by_context.setdefault(request.context, {})[request] = None
        for group in by_context.values():
            together = Pack.of(list(group))
            fits = len(together.tokens) <= self._longest_packed
            if fits and (not together.is_branched or self._together.branches):
                yield together
            else:
                yield from (Pack.of([request]) for request in group)

    def _halve_batches(self, packs: int) -> None:
        _require_several(packs)
        self._batch_tokens //= 2
        say(f"Memory ran out; going on with {self._batch_tokens} tokens at once")

    def _halve_answers(self, answers: int) -> None:
        _require_several(answers)
        self._generation_batch = answers // 2
        say(f"Memory ran out; going on with {self._generation_batch} answers at once")

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, is_done: IsDone
    ) -> list[list[int]]:
        """The answers to prompts of one batch, which goes on until the last one ends or is done."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor(
            [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        )
        mask = torch.arange(longest) >= torch.tensor(padding)[:, None]

        def which_are_done(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor(
                [is_done(answer) for answer in ids[:, longest:].tolist()], device=ids.device
            )

        output = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.long().to(self._model.device),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(self.end_tokens) or None,
                pad_token_id=0,
            ),
            stopping_criteria=[which_are_done],
            logits_processor=[_require_finite_logits],
        )
        return [until_end(answer, self.end_tokens) for answer in output[:, longest:].tolist()]


def _require_several(requests: int) -> None:
    """Raises UserError for a batch that cannot be made smaller."""
    if requests == 1:
        raise UserError(
            "One request does not fit into memory; use --dtype bfloat16 or a machine with more "
            "memory."
        )


def _require_finite_logits(ids: Tensor, logits: Tensor) -> Tensor:
    require_finite(LOGITS, logits)
    return logits


def _score_batch(model: Any, packs: Sequence[Pack]) -> dict[ScoreRequest, Score]:
    inputs = inputs_of(packs, model)
    longest = inputs["input_ids"].shape[1]
    requests = list(chain.from_iterable(pack.requests for pack in packs))
    targets = list(chain.from_iterable(request.continuation for request in requests))
    logits = _logits_at(model, torch.tensor(predicting_rows(packs, longest)), inputs)
    log_likelihoods, greedy = _token_scores(logits, torch.tensor(targets, device=logits.device))
    lengths = [len(request.continuation) for request in requests]
    parts = zip(requests, log_likelihoods.split(lengths), greedy.split(lengths), strict=True)
    return {
        request: Score(of_tokens.sum().item(), int(are_greedy.sum()))
        for request, of_tokens, are_greedy in parts
    }


def _logits_at(model: Any, rows: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (N, V) of the given `rows` (N,) of the flattened (B * L) positions: the output layer
    runs for these only."""

    def keep_rows(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(end_dim=1)[rows.to(args[0].device)][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_rows, prepend=True)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


def _token_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V), (N,) -> log likelihood of each target (N,), float64, and whether it is the most
    likely token."""
    rows = max(1, LOGITS_BYTES[logits.device.type] // (4 * logits.shape[1]))
    log_likelihoods, greedy = [], []
    for part, part_targets in zip(logits.split(rows), targets.split(rows), strict=True):
        part = part if part.dtype == torch.float64 else part.float()
        chosen = part.gather(1, part_targets[:, None])[:, 0]
        log_likelihoods.append(chosen.double() - part.logsumexp(dim=1).double())
        greedy.append(chosen >= part.amax(dim=1))
    return torch.cat(log_likelihoods).cpu(), torch.cat(greedy).cpu()


@torch.inference_mode()
def score_reference(model: Any, request: ScoreRequest) -> Score:
    """The score of one request by one plain pass over it (1, L), with all logits (L, V): for
    tests."""
    ids = torch.tensor([request.context + request.continuation], device=model.device)
    log_probabilities = model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
    places = range(len(request.context) - 1, ids.shape[1] - 1)
    pairs = list(zip(places, request.continuation, strict=True))
    greedy_tokens = sum(log_probabilities[place].argmax() == token for place, token in pairs)
    log_likelihood = sum(log_probabilities[place, token].item() for place, token in pairs)
    return Score(log_likelihood, int(greedy_tokens))
