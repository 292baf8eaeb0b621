"""ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819): one block of consecutive layers is replaced
by a linear map T of what the FFN before it adds, which folds into that FFN's down projection.

Of all tokens, a1 (n, d) is what the FFN adds, and a2 = L + a1 - Y, with Y the hidden state in front
of the block and L that behind it in the dense model. T is to make a1 T like a2: by least squares,
T = (a1^T a1)^-1 a1^T a2, or by the cosine, which is trained. W' = T^T stands on the left of W_down.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradmap.common.console import progress
from gradmap.common.distributed import gathered
from gradmap.common.errors import UserError
from gradmap.costs.timing import replace_me_cosine_seconds, replace_me_seconds
from gradmap.methods.base import Compensator
from gradmap.methods.compensation import Compensation, Pruned, Run
from gradmap.methods.features import Fit, all_features
from gradmap.methods.ridge import fitted_matrix
from gradmap.model.corrections import Projection
from gradmap.model.precision import widened

LEARNING_RATE = 1e-4
EPOCHS = 10
BATCH_TOKENS = 1024


def replace_block(pruned: Pruned) -> Compensation:
    """T by least squares in float64, without regularisation, as the paper's tables have it."""
    block = the_block(pruned)
    _require_enough_tokens(pruned)
    fit = Fit(block.before, block.last, exact=True)
    return _folded(pruned, block, fitted_matrix(pruned, fit, {}, lam=0.0))


def replace_block_by_cosine(pruned: Pruned) -> Compensation:
    """T that turns what the FFN adds into the direction of what is wanted."""
    block = the_block(pruned)
    samples = len(pruned.calibration.fit_ids)
    added, missing = (
        gathered(widened(part), samples).flatten(end_dim=-2)
        for part in all_features(pruned, Fit(block.before, block.last), {})
    )
    matrix = train_direction(added, added + missing, pruned.calibration.seed)
    return _folded(pruned, block, Projection(matrix))


def the_block(pruned: Pruned) -> Run:
    """The only run that was removed, which has a sublayer before it. Raises UserError if it is
    not."""
    if pruned.kept[0] != pruned.sublayers[0]:
        raise UserError(
            "replace-me puts the removed block into the layer before it, and here the first layer "
            "is removed; give --protect-first 1, or use --compensator sequential."
        )
    first, *others = pruned.runs()
    if others:
        raise UserError(
            f"replace-me replaces one block of consecutive layers, and the removed ones are "
            f"{1 + len(others)} blocks; choose with --selector uidl, or use --compensator "
            "sequential, which does the same for several."
        )
    return first


def train_direction(added: Tensor, wanted: Tensor, seed: int) -> Tensor:
    """W' (d, d) with the least mean of 1 - cos(W' a, w) over tokens, by Adam from I on: (n, d)
    both. seed: of the order of tokens."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(added.shape[1]).to(added).requires_grad_(True)
    optimizer = torch.optim.Adam([matrix], LEARNING_RATE)
    with (
        # beside the ones of I, bfloat16 has no room for a step
        torch.autocast(added.device.type, enabled=False),
        progress("Training W' (tokens)", EPOCHS * len(added)) as advance,
    ):
        for _ in range(EPOCHS):
            order = torch.randperm(len(added), generator=generator).to(added.device)
            for tokens in order.split(BATCH_TOKENS):
                optimizer.zero_grad()
                mean_turn(added[tokens] @ matrix.mT, wanted[tokens]).backward()
                optimizer.step()
                advance(len(tokens))
    return matrix.detach()


def mean_turn(given: Tensor, wanted: Tensor) -> Tensor:
    """The mean of 1 - cos over tokens: (n, d) both -> ()."""
    return (1 - cosine_similarity(given, wanted, dim=-1)).mean()


def replacement_reference(added: Tensor, wanted: Tensor) -> Tensor:
    """W' = T^T as the paper writes it: a1 and a2, (n, d) both -> (d, d)."""
    transform: Tensor = torch.linalg.inv(added.mT @ added) @ added.mT @ wanted
    return transform.mT


def _folded(pruned: Pruned, block: Run, matrix: Projection) -> Compensation:
    place = pruned.model.output_of(block.before)
    return Compensation(pruned.judge([(place, matrix)], {}))


def _require_enough_tokens(pruned: Pruned) -> None:
    """Raises UserError if they are fewer than the equations that they are to tell apart. The first
    tokens of all samples are one, if they are BOS."""
    calibration, width = pruned.calibration, pruned.model.config.hidden_size
    samples = len(calibration.fit_ids)
    tokens = calibration.fit_ids.numel() - (samples - 1 if calibration.bos is not None else 0)
    if tokens < width:
        raise UserError(
            f"replace-me fits {width} inputs without regularisation, on {tokens} different tokens; "
            "give more --samples, or use --compensator sequential."
        )


PAPER = "ReplaceMe (arXiv 2505.02819)"
COMPENSATOR = Compensator(
    name="replace-me",
    about="folds a W' into the linear map before the one removed block, by plain least squares",
    paper=PAPER,
    run=replace_block,
    linear_output=True,
    seconds=replace_me_seconds,
)
BY_COSINE = Compensator(
    name="replace-me-cosine",
    about="folds a W' into the linear map before the one removed block, trained for the direction "
    "of what is missing",
    paper=PAPER,
    run=replace_block_by_cosine,
    linear_output=True,
    seconds=replace_me_cosine_seconds,
)
