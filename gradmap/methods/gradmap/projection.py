"""GradMAP's stage 2 (Eq. 8-13): one projection matrix W' for the retained layer that drifted
most."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gradmap.common.console import progress
from gradmap.common.distributed import share_of
from gradmap.common.errors import UserError
from gradmap.costs.timing import projection_seconds
from gradmap.methods.base import Compensator, Job
from gradmap.methods.compensation import (
    Compensation,
    Correction,
    Pruned,
    correct_in_turn,
    run_and_capture,
)
from gradmap.methods.features import Fit
from gradmap.methods.options import AS_PUBLISHED, ProjectionOptions
from gradmap.methods.ridge import fit_correction
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import stacked_on_cpu
from gradmap.model.sublayers import Part, Sublayer


def project_most_drifted(pruned: Pruned, options: ProjectionOptions = AS_PUBLISHED) -> Compensation:
    """With the exact solution of Eq. 10; lambda by the divergence on held-out samples."""
    drift = mean_drift(pruned)
    lambdas = (0.0,) if options.unregularised else None

    def correct(layer: int, changes: Changes) -> tuple[Correction, ...]:
        ffn = Sublayer(layer, Part.FFN)
        return fit_correction(pruned, Fit(ffn, ffn, options.side), changes, lambdas)

    return Compensation(correct_in_turn(most_drifted(drift, options.top_z), correct), drift)


def require_enough_layers(job: Job, options: ProjectionOptions) -> None:
    """Raises UserError if fewer than `top_z` layers are left, or W' is to stand on the right of
    many down projections."""
    left = job.layers - job.remove
    if options.top_z > left:
        raise UserError(
            f"--top-z is {options.top_z}, but only {left} layers are left; give a smaller one."
        )
    of_experts = job.architecture.expert_down_projections is not None
    if of_experts and options.side == "right" and options.target == "down":
        raise UserError(
            "A mixture of experts has many down projections, on the right of which no one W' can "
            "stand; use --side left."
        )


def require_closed_form(job: Job, options: ProjectionOptions) -> None:
    """Raises UserError for a map other than the down projection: the layer's output does not follow
    it linearly."""
    if options.target != "down":
        raise UserError(
            f"--target {options.target} has no closed form; use --compensator projection-adam."
        )
    require_enough_layers(job, options)


def most_drifted(drift: dict[int, float], count: int) -> list[int]:
    """The `count` layers with the largest drift (Eq. 9: one), front to back."""
    return sorted(sorted(drift, key=drift.__getitem__)[-count:])


def mean_drift(pruned: Pruned) -> dict[int, float]:
    """Eq. 8: || E[H_i] - E[H'_i] ||_2 behind every retained layer, by the original index of its
    FFN; expectation over samples and positions."""
    model, kept = pruned.model, [layer.ffn for layer in pruned.kept_layers]
    input_ids, batch_size = pruned.calibration.fit_ids, pruned.batches.size
    dense = _mean_outputs(model, [model.layers[layer] for layer in kept], input_ids, batch_size)
    with model.without(pruned.removed):
        without = _mean_outputs(model, list(model.layers), input_ids, batch_size)
    return dict(zip(kept, (dense - without).norm(dim=1).tolist(), strict=True))


def _mean_outputs(
    model: LayeredModel, modules: Sequence[nn.Module], input_ids: Tensor, batch_size: int
) -> Tensor:
    """Mean output of each module over samples and positions: (len(modules), d) float64."""

    def of_batch(batch: Tensor) -> Tensor:
        outputs = [output for _, output in run_and_capture(model, modules, batch)]
        return stacked_on_cpu(
            [output.flatten(end_dim=-2).double().sum(dim=0) for output in outputs]
        )

    passes = len(share_of(input_ids)[0]) * len(model.layers)
    with progress("Measuring drift (passes through layers)", passes) as advance:
        return model.total(input_ids, of_batch, advance, batch_size) / input_ids.numel()


COMPENSATOR = Compensator(
    name="projection",
    about="folds a W' into the down projection of the layer that drifted most, in closed form",
    paper="GradMAP",
    run=project_most_drifted,
    options=ProjectionOptions,
    check=require_closed_form,
    linear_output=True,
    seconds=projection_seconds,
)
