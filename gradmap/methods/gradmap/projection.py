"""GradMAP's stage 2 (Eq. 8-13): one projection matrix W' for the retained layer that drifted
most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmap.common.console import progress
from gradmap.common.distributed import share_of, summed
from gradmap.common.errors import UserError
from gradmap.methods.compensation import (
    Compensation,
    Correction,
    Pruned,
    correct_in_turn,
    run_and_capture,
)
from gradmap.methods.ridge import RELATIVE_LAMBDAS, Fit, fit_correction
from gradmap.model.architectures import without_layers
from gradmap.model.corrections import Changes
from gradmap.model.layerwise import stacked_on_cpu


def project_most_drifted(pruned: Pruned) -> Compensation:
    """With the exact solution of Eq. 10; lambda by the divergence on held-out samples.

    Raises UserError for a map other than the down projection: the layer's output does not follow it
    linearly.
    """
    options = pruned.options
    if options.target != "down":
        raise UserError(
            f"--target {options.target} has no closed form; use --compensator projection-adam."
        )
    drift = mean_drift(pruned)
    lambdas = (0.0,) if options.unregularised else RELATIVE_LAMBDAS

    def correct(layer: int, changes: Changes) -> list[Correction]:
        return [fit_correction(pruned, Fit(layer, layer, options.side), changes, lambdas)]

    return Compensation(correct_in_turn(most_drifted(drift, options.top_z), correct), drift)


def most_drifted(drift: dict[int, float], count: int) -> list[int]:
    """The `count` layers with the largest drift (Eq. 9: one), front to back. Raises UserError if
    there are fewer."""
    if count > len(drift):
        raise UserError(
            f"--top-z is {count}, but only {len(drift)} layers are left; give a smaller one."
        )
    return sorted(sorted(drift, key=drift.__getitem__)[-count:])


def mean_drift(pruned: Pruned) -> dict[int, float]:
    """Eq. 8: || E[H_i] - E[H'_i] ||_2 of every retained layer, expectation over samples and
    positions."""
    layers = pruned.architecture.layer_list(pruned.model)
    modules = [layers[index] for index in pruned.kept]
    input_ids, batch_size = pruned.calibration.fit_ids, pruned.batches.size
    dense = _mean_outputs(pruned.model, modules, input_ids, batch_size)
    with without_layers(pruned.model, pruned.architecture, pruned.removed):
        without = _mean_outputs(pruned.model, modules, input_ids, batch_size)
    return dict(zip(pruned.kept, (dense - without).norm(dim=1).tolist(), strict=True))


def _mean_outputs(
    model: Any, modules: Sequence[nn.Module], input_ids: Tensor, batch_size: int
) -> Tensor:
    """Mean output of each module over samples and positions: (len(modules), d) float64."""
    total = torch.zeros((), dtype=torch.float64)
    share, _ = share_of(input_ids)
    with progress("Measuring drift (samples)", len(share)) as advance:
        for batch in share.split(batch_size):
            outputs = [output for _, output in run_and_capture(model, modules, batch)]
            total = total + stacked_on_cpu(
                [output.flatten(end_dim=-2).double().sum(dim=0) for output in outputs]
            )
            advance(len(batch))
    return summed(total) / input_ids.numel()
