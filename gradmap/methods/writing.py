"""Texts that the dense model writes: samples of its own next-token distribution, on which it can
teach (as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.data.calibration import with_bos, without_bos
from gradmap.model.batching import Batches, states_batch
from gradmap.model.layered import LayeredModel

# How many tokens texts begin with, and how many texts a CPU writes at once.
PROMPT_TOKENS = 4
WRITTEN_TOGETHER = 64


def uniform_numbers(count: int, tokens: int, seed: int) -> Tensor:
    """From 0 to 1, one for every token of so many texts that is drawn: (count, tokens) float64.

    In the CPU's memory, wherever the model is: generators of other devices give other numbers. What
    a CPU writes at once has a seed of its own.
    """
    parts: list[Tensor] = []
    for number, start in enumerate(range(0, count, WRITTEN_TOGETHER)):
        generator = torch.Generator().manual_seed(seed + number)
        shape = tokens, min(WRITTEN_TOGETHER, count - start)
        parts.append(torch.rand(shape, dtype=torch.float64, generator=generator).mT)
    return torch.cat(parts)


def draw_prompts(known: Tensor, bos: int | None, count: int, seed: int) -> Tensor:
    """PROMPT_TOKENS tokens from random places of random samples (N, T); before them the BOS token,
    where samples begin with it: (count, PROMPT_TOKENS or one more)."""
    texts = without_bos(known, bos)
    length = min(PROMPT_TOKENS, texts.shape[1])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(texts), (count, 1), generator=generator)
    starts = torch.randint(texts.shape[1] - length + 1, (count, 1), generator=generator)
    return with_bos(texts[rows, starts + torch.arange(length)], bos)


def write_all(model: LayeredModel, prompts: Tensor, numbers: Tensor) -> Tensor:
    """`write_on`, as many prompts (N, P) at once as is fast: (N, P + n)."""
    length = prompts.shape[1] + numbers.shape[1]
    parts: list[Tensor] = []
    with progress("The dense model writes (tokens)", len(prompts) * length) as advance:

        def write_batch(batch: slice) -> None:
            parts.append(write_on(model, prompts[batch], numbers[batch]))
            advance(parts[-1].numel())

        Batches(written_together(model, prompts, length)).run(len(prompts), write_batch)
    return torch.cat(parts)


@torch.no_grad()
def written_together(model: LayeredModel, prompts: Tensor, length: int) -> int:
    """How many prompts (N, P) are continued at once to so many tokens. A GPU takes as long for a
    few as for many, so there it is as many as have room for their KV cache."""
    if model.device.type == "cpu":
        return WRITTEN_TOGETHER
    cache = model.network(
        input_ids=prompts[:1].to(model.device), use_cache=True, logits_to_keep=1
    ).past_key_values
    of_prompt = sum(
        states.nbytes for layer in cache.layers for states in (layer.keys, layer.values)
    )
    return states_batch(of_prompt * length // prompts.shape[1], model.device)


@torch.no_grad()
def write_on(model: LayeredModel, prompts: Tensor, numbers: Tensor) -> Tensor:
    """Continues each prompt (B, P) by a token for each of its `numbers` (B, n), which is drawn by
    that number from the model's whole next-token distribution.

    Unlike transformers' own sampling, whatever the model's generation config says: what is wanted
    is its knowledge.
    """
    ids = prompts.to(model.device, non_blocking=True)
    return torch.cat([ids, *_drawn(model, ids, numbers)], dim=1).cpu()


@torch.no_grad()
def write_answers(
    model: LayeredModel,
    prompts: Sequence[list[int]],
    numbers: Tensor,
    ends: Collection[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """As `write_on` for prompts of several lengths; each is continued until one of `ends`, which is
    its last token then. numbers: (B, n); advance: is told how many tokens more there are.

    A longer prompt is read while a shorter one is continued already, so that nothing is padded,
    which not every family's attention takes as nothing.
    """
    shortest, most = min(map(len, prompts)), numbers.shape[1]
    steps = max(map(len, prompts)) - shortest + most
    given = torch.full((len(prompts), steps), -1)
    placed = numbers.new_zeros(len(prompts), steps)
    for row, prompt in enumerate(prompts):
        rest = len(prompt) - shortest
        given[row, :rest] = torch.tensor(prompt[shortest:])
        placed[row, rest : rest + most] = numbers[row]
    written = [prompt[:shortest] for prompt in prompts]
    begun = torch.tensor(written).to(model.device)
    advance(begun.numel())
    for tokens in _drawn(model, begun, placed, given.to(model.device)):
        going_on = [
            (ids, token)
            for ids, prompt, token in zip(written, prompts, tokens[:, 0].tolist(), strict=True)
            if not _has_ended(ids, len(prompt), most, ends)
        ]
        if not going_on:
            break
        for ids, token in going_on:
            ids.append(token)
        advance(len(going_on))
    return written


def _has_ended(ids: list[int], prompt: int, most: int, ends: Collection[int]) -> bool:
    """Whether nothing follows these ids any more, which began with a prompt of so many."""
    return len(ids) == prompt + most or (len(ids) > prompt and ids[-1] in ends)


@torch.no_grad()
def _drawn(
    model: LayeredModel, ids: Tensor, numbers: Tensor, given: Tensor | None = None
) -> Iterator[Tensor]:
    """The tokens (B, 1) that follow each other behind ids (B, P), as many as there are numbers
    (B, n). given: (B, n), tokens that are not drawn, or -1."""
    entering = ids
    cache: Any = None
    for place, number in enumerate(numbers.to(ids.device, non_blocking=True).split(1, dim=1)):
        output = model.network(
            input_ids=entering, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits, cache = output.logits[:, -1], output.past_key_values
        # drawn where the logits are: to hand them to the CPU takes as long as the model does
        entering = draw_tokens(logits, number.to(logits.device)).to(ids.device)
        if given is not None:
            known = given[:, place : place + 1]
            entering = torch.where(known < 0, entering, known)
        yield entering


def draw_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """One token (B, 1) from each distribution (B, V): the first whose cumulative probability
    exceeds the number between 0 and 1, (B, 1) float64.

    torch.multinomial draws a number for every token of the vocabulary, which takes a CPU as long as
    the model does.
    """
    chances = (logits.double() - logits.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    return torch.searchsorted(chances, numbers * chances[:, -1:], right=True).clamp(
        max=chances.shape[1] - 1
    )
