"""LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), and LinearPatch (arXiv 2505.24680) after it:
the one block of consecutive layers that turns the hidden state least goes, all of it at once.

LLM-Streamline puts one layer in its place, which begins as the first of the block and is trained to
give what the block gave. So the layer before a run of removed ones is the first of a block that is
one layer longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import (
    gathered,
    say_if_some_are_idle,
    share_of,
    share_of_step,
)
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.costs.steps import CalibrationSize, Hardware, influence_flops
from gradmap.costs.timing import Pruning, in_rounds
from gradmap.methods.base import Compensator, Job, Selector
from gradmap.methods.compensation import (
    Compensation,
    Correction,
    Pruned,
    Run,
    correct_in_turn,
)
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.shortgpt import block_influences
from gradmap.methods.training import set_gradients
from gradmap.model.batching import Batches
from gradmap.model.corrections import (
    Changes,
    Place,
    Update,
    gather_changes,
    weight_of,
)
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import LayerCalls
from gradmap.model.precision import widened
from gradmap.model.shape import Shape
from gradmap.model.sublayers import (
    PIECES,
    Pair,
    Part,
    Sublayer,
    Unit,
    candidates,
    pieces,
    sublayers_of,
)
from gradmap.model.walk import Walk

# The paper's; how often the samples are seen, and together, is ours.
HIGHEST_RATE, LOWEST_RATE, WEIGHT_DECAY = 2e-4, 5e-5, 1e-3
EPOCHS = 20
STEP_SAMPLES = 4
# Of a layer that is trained: forward, and backward for its activations; of what is trained, which
# is as large, the gradient besides.
PASSES_OF_TRAINING = 2 + 3

# What each block of so many units in a row is worth, (C,) float64, from samples (N, T).
BlockMeasure = Callable[[LayeredModel, Tensor, Unit, Advance, int], Tensor]


def windows(places: int, count: int) -> list[range]:
    """All blocks of so many consecutive places."""
    return [range(first, first + count) for first in range(places - count + 1)]


def blocks(layers: int, count: int, unit: Unit) -> list[tuple[Pair, ...]]:
    """All blocks of so many units in a row, front to back."""
    found = pieces(sublayers_of(range(layers)), unit)
    return [
        tuple(candidates(list(chain.from_iterable(found[place] for place in window)), "layer"))
        for window in windows(len(found), count * PIECES[unit])
    ]


def require_room(job: Job, options: None) -> None:
    """Raises UserError if the protected layers leave no room for a block of `job.remove` layers."""
    if not any(
        _is_allowed(block, job.protected) for block in blocks(job.layers, job.remove, job.unit)
    ):
        raise UserError(
            f"The protected layers leave no {job.remove} consecutive ones to remove; protect or "
            "remove fewer."
        )


def _is_allowed(block: Sequence[Pair], protected: Collection[int]) -> bool:
    return not any(pair.is_in(protected) for pair in block)


def least_turning_block(subject: Subject) -> BlockScorer:
    """By block influence: over all positions of the samples."""
    return BlockScorer(subject, block_influences)


class BlockScorer:
    """Scores what is in the block of the lowest measure alone, all with that. Of equal blocks the
    first one goes."""

    def __init__(self, subject: Subject, measure: BlockMeasure) -> None:
        self._subject, self._measure = subject, measure
        self._blocks = blocks(len(subject.layers), subject.count, subject.unit)

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        subject = self._subject
        measured = self._measure(
            subject.model, subject.calibration.input_ids, subject.unit, advance, subject.count
        )
        of_block = dict(zip(self._blocks, measured.tolist(), strict=True))
        require_finite_scores({block[0].words: found for block, found in of_block.items()})
        allowed = [block for block in of_block if _is_allowed(block, subject.protected)]
        best = min(allowed, key=of_block.__getitem__)
        return dict.fromkeys(best, of_block[best])


def block_influences_reference(model: Any, input_ids: Tensor, count: int) -> list[float]:
    """`block_influences` of each block of layers by itself, from the hidden states that
    transformers returns. What leaves the last layer is not among them as it is, but behind the last
    norm, so that the last block is left out. input_ids: (N, T)."""
    states = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
    influences = []
    for first, last in zip(states[:-1], states[count:-1], strict=False):
        cosines = (first * last).sum(dim=-1) / (first.norm(dim=-1) * last.norm(dim=-1))
        influences.append(1 - cosines.mean().item())
    return influences


def one_pass_flops(shape: Shape, rounds: int, size: CalibrationSize) -> float:
    """However many layers go, all of the model's are passed once."""
    return influence_flops(shape, 1, size)


def replace_runs(pruned: Pruned) -> Compensation:
    """Trains the layer before each run, front to back, to give what the run gave."""
    fit_ids = pruned.calibration.fit_ids
    dense, walk = pruned.walk(pruned.sublayers, fit_ids), pruned.walk(pruned.kept, fit_ids)

    def correct(run: Run, changes: Changes) -> tuple[Correction, ...]:
        dense.go_behind(run.last, {})
        walk.go_to(Sublayer(run.before.layer, Part.ATTENTION), changes)
        return pruned.judge(trained_layer(pruned, run.before.layer, walk, dense), changes)

    return Compensation(correct_in_turn(pruned.runs(), correct))


def trained_layer(
    pruned: Pruned, layer: int, entering: Walk, wanted: Walk
) -> list[tuple[Place, Update]]:
    """Changes of all linear maps of a layer, which make of what enters it what is wanted behind
    it."""
    model, samples = pruned.model, len(pruned.calibration.fit_ids)
    given, goal = (gathered(walk.hidden, samples) for walk in (entering, wanted))
    calls = LayerCalls(model, pruned.calibration.fit_ids)
    updates = [
        (place, _untrained(weight_of(module)))
        for place, module in model.linear_maps(sublayers_of([layer]))
    ]
    parameters = [update.matrix for _, update in updates]
    optimizer = torch.optim.AdamW(parameters, HIGHEST_RATE, weight_decay=WEIGHT_DECAY)
    orders = _orders(samples, pruned.calibration.seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(orders), LOWEST_RATE)
    batches = Batches(STEP_SAMPLES)

    def run(hidden: Tensor) -> Tensor:
        return calls.of(layer, len(hidden)).run(model.layers[layer], hidden)

    say_if_some_are_idle(STEP_SAMPLES)
    with (
        progress(f"Training layer {layer} (steps)", len(orders)) as advance,
        model.changed(gather_changes(updates)),
    ):
        for rows in orders:
            _set_gradients(run, given[rows], goal[rows], parameters, batches)
            optimizer.step()
            schedule.step()
            advance(1)
    return [(place, Update(update.matrix.detach())) for place, update in updates]


def _set_gradients(
    run: Callable[[Tensor], Tensor],
    given: Tensor,
    goal: Tensor,
    parameters: Sequence[Tensor],
    batches: Batches,
) -> None:
    """Those of the mean relative error of a step's samples, (B, T, d) both."""
    tokens = given[..., 0].numel()
    given, goal = share_of_step(given), share_of_step(goal)

    def loss_of(batch: slice) -> tuple[Tensor, None]:
        errors = relative_errors(run(given[batch]), goal[batch])
        return errors.sum() / tokens, None

    set_gradients(parameters, len(given), loss_of, batches)


def relative_errors(given: Tensor, wanted: Tensor) -> Tensor:
    """|given - wanted|^2 / |wanted|^2 of each token: (B, T, d) both -> (B, T)."""
    wanted = widened(wanted)
    return (widened(given) - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)


def _untrained(weight: Tensor) -> Update:
    """A change to train, which changes nothing yet."""
    dtype = widened(weight).dtype
    return Update(torch.zeros(weight.shape, dtype=dtype, device=weight.device).requires_grad_(True))


def _orders(samples: int, seed: int) -> list[Tensor]:
    """The samples of every step: all of them in each epoch, in random order."""
    generator = torch.Generator().manual_seed(seed)
    return [
        rows
        for _ in range(EPOCHS)
        for rows in torch.randperm(samples, generator=generator).split(STEP_SAMPLES)
    ]


def _training_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for walks through both models, the training, and the held-out divergence before the
    first run and behind each."""
    shape, size = hardware.sees(shape), pruning.size
    left = shape.layers - pruning.remove
    trained = EPOCHS * PASSES_OF_TRAINING * shape.layer_flops(pruning.runs)
    flops = size.fit_tokens * (shape.layer_flops(shape.layers + left) + trained)
    flops += size.held_out_tokens * (pruning.runs + 1) * shape.forward_flops(left)
    return flops / hardware.sustained_flops


SELECTOR = Selector(
    name="window",
    about="the one block of consecutive layers that turns the hidden state least",
    paper="LLM-Streamline (arXiv 2403.19135), LinearPatch (arXiv 2505.24680)",
    make=least_turning_block,
    check=require_room,
    nested=False,
    score_label="influence of the block",
    round_takes="one forward pass, once",
    seconds=in_rounds(one_pass_flops),
)
COMPENSATOR = Compensator(
    name="streamline",
    about="trains the layer before each cut to give what the removed ones gave",
    paper="LLM-Streamline (arXiv 2403.19135)",
    run=replace_runs,
    in_memory=True,
    whole_layers="trains a layer in place of several, so that whole layers must go",
    no_experts="The experts of a layer are not trained, which streamline would have to",
    seconds=_training_seconds,
)
