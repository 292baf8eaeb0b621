"""GradMAP's stage 2 as it was published: W' trained by Adam (Table 8). For reproduction; the closed form is exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradmap.compensation import Compensation, Correction, Pruned
from gradmap.compensators.projection import mean_drift
from gradmap.compensators.ridge import Fit, features_and_missing
from gradmap.console import progress
from gradmap.corrections import Place, Projection

LEARNING_RATE = 1e-3
REGULARISATION = 1e-3
EPOCHS = 10  # the paper does not say


def project_with_adam(pruned: Pruned) -> Compensation:
    """For the most drifted layer, as `project_most_drifted`."""
    drift = mean_drift(pruned)
    layer = max(drift, key=drift.__getitem__)
    batches = list(features_and_missing(pruned, Fit(layer, goal=layer), {}))
    added, missing = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    *_, matrix = train_projection(added, missing, EPOCHS, pruned.calibration.seed)
    place, change = Place(layer, pruned.architecture.down_projection), Projection(matrix.double().cpu())
    losses = pruned.loss({}), pruned.loss({place: (change,)})
    return Compensation((Correction(place, change, *losses, lam=REGULARISATION),), drift)


def train_projection(added: Tensor, missing: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """W' (d, d) after every epoch. added: A, missing: X_O - H', both (N, T, d); a step takes one sample.

    W' A + X_F - X_O is (W' - I) A - missing, so W' - I is trained, from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    update = torch.zeros(added.shape[-1], added.shape[-1], dtype=added.dtype, device=added.device, requires_grad=True)
    optimizer = torch.optim.Adam([update], LEARNING_RATE)
    identity = torch.eye(len(update), dtype=update.dtype, device=update.device)
    with progress("Training W' (samples)", epochs * len(added)) as advance:
        for _ in range(epochs):
            for row in torch.randperm(len(added), generator=generator):
                optimizer.zero_grad()
                objective(update, added[row][None], missing[row][None]).backward()
                optimizer.step()
                advance(1)
            yield identity + update.detach()


def objective(update: Tensor, added: Tensor, missing: Tensor) -> Tensor:
    """Eq. 11 and 12 for W' = I + update, mean over samples: (d, d), (N, T, d), (N, T, d) -> scalar."""
    errors = added @ update.mT - missing
    return errors.square().sum() / len(added) + REGULARISATION * update.square().sum()
