"""Requests in one pass: the continuations of one context in one sequence, and prompts of
different lengths in one batch. Not every model gives each then what it gives it by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from gradmap.common.errors import UserError
from gradmap.evaluation.backends import ScoreRequest
from gradmap.model.configs import cached_by_config
from gradmap.model.layer_runs import is_same
from gradmap.model.small_model import trying_small_model

_PADDING = -1
# Masks lead to other products, and some parts of many families are float32 whatever they are given.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Together:
    """What a model takes together and still gives each what it gives it by itself.

    branches: several continuations behind one context, which see it and themselves. padding:
    prompts of different lengths, padded on the left.
    """

    branches: bool
    padding: bool


def what_goes_together(config: Mapping[str, Any]) -> Together:
    """Tried on a small model of this config; nothing where none can be made. Positions that follow
    from the mask (Bloom, MPT), recurrent states and chunks are in the way."""
    try:
        return _tried(config)
    except UserError:
        return Together(branches=False, padding=False)


@cached_by_config
def _tried(config: dict[str, Any]) -> Together:
    with trying_small_model(config) as model:
        return Together(_takes_branches(model), _takes_padding(model))


def _takes_branches(model: Any) -> bool:
    requests = [ScoreRequest((5, 6, 7), (8, 9, 10)), ScoreRequest((5, 6, 7), (11, 12))]
    pack = Pack.of(requests)
    try:
        logits = model(**inputs_of([pack], model), use_cache=False).logits[0]
    except (RuntimeError, ValueError, TypeError):  # it takes no such mask
        return False
    return all(
        is_same(logits[places], _plain_logits(model, request)[-len(places) :], _ROUNDING)
        for request, places in zip(requests, pack.predictions, strict=True)
    )


def _plain_logits(model: Any, request: ScoreRequest) -> Tensor:
    tokens = [*request.context, *request.continuation[:-1]]
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def _takes_padding(model: Any) -> bool:
    """Two tokens behind a padded prompt, the second with a cache."""
    asked = GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    written = model.generate(
        input_ids=torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        generation_config=asked,
    )
    tokens = written.sequences[:1, 2:-1]
    plain = model(input_ids=tokens, use_cache=False).logits[0, -2:]
    padded = torch.stack([logits[0] for logits in written.logits])
    return is_same(padded, plain, _ROUNDING)


@dataclass(frozen=True)
class Pack:
    """One context and its continuations as one sequence.

    tokens: the context, then every continuation but for its last token, which is only predicted.
    positions: of each token, as if its continuation followed the context directly.
    branches: 0 for the context, j for the j-th continuation that has tokens here.
    predictions: of each request, the places in `tokens` that predict its continuation.
    """

    requests: tuple[ScoreRequest, ...]
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    predictions: list[list[int]]

    @property
    def is_branched(self) -> bool:
        """Whether the pack needs a mask: causal attention alone would let a continuation see
        another one."""
        return max(self.branches) > 1

    @classmethod
    def of(cls, requests: Sequence[ScoreRequest]) -> Pack:
        """The pack of requests that share one context."""
        context = requests[0].context
        tokens, positions, branches = list(context), list(range(len(context))), [0] * len(context)
        predictions = []
        for request in requests:
            inside = request.continuation[:-1]
            predictions.append([len(context) - 1, *range(len(tokens), len(tokens) + len(inside))])
            tokens += inside
            positions += range(len(context), len(context) + len(inside))
            branches += [max(branches) + 1] * len(inside)
        return cls(tuple(requests), tokens, positions, branches, predictions)


def inputs_of(packs: Sequence[Pack], model: Any) -> dict[str, Tensor]:
    """What a model is called with for some packs, all of them branched or none."""
    longest = max(len(pack.tokens) for pack in packs)
    inputs = {"input_ids": _padded([pack.tokens for pack in packs], longest, 0).to(model.device)}
    if packs[0].is_branched:
        branches = _padded([pack.branches for pack in packs], longest, _PADDING).to(model.device)
        inputs["position_ids"] = _padded([pack.positions for pack in packs], longest, 0).to(
            model.device
        )
        inputs["attention_mask"] = _additive(
            _tree_mask(branches), model.get_input_embeddings().weight.dtype
        )
    # else every sequence is an ordinary one, padded on the right: causal attention alone is right
    return inputs


def predicting_rows(packs: Sequence[Pack], longest: int) -> list[int]:
    """Places of the flattened (B * L) positions that predict the continuations, in the order of the
    requests."""
    rows: list[int] = []
    for number, pack in enumerate(packs):
        for places in pack.predictions:
            rows += [number * longest + place for place in places]
    return rows


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _tree_mask(branches: Tensor) -> Tensor:
    """(B, L) -> (B, L, L), True where a query (row) attends a key: one not after it, in the context
    or its own branch.

    Padding is a branch of its own, so that no row is empty.
    """
    queries, keys = branches[:, :, None], branches[:, None, :]
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    return causal & ((keys == queries) | ((keys == 0) & (queries != _PADDING)))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, L) bool -> (B, 1, L, L): what every attention implementation of transformers takes."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
