"""GradMAP's stage 2 as it was published: W' trained by Adam (Table 8). For reproduction; the closed
form is exact.

Also for maps that the layer's output does not follow linearly, which have no closed form (the
ablation of Table 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gradmap.common.console import progress
from gradmap.common.errors import UserError
from gradmap.common.processes import process_count
from gradmap.methods.base import Compensator, Job
from gradmap.methods.compensation import (
    Compensation,
    Correction,
    Pruned,
    correct_in_turn,
)
from gradmap.methods.features import Fit, all_features, output_weight
from gradmap.methods.gradmap.projection import mean_drift, most_drifted, require_enough_layers
from gradmap.methods.options import AS_PUBLISHED, ProjectionOptions
from gradmap.methods.ridge import REGULARISATION
from gradmap.model.corrections import (
    Change,
    Changes,
    Place,
    Projection,
    Update,
    followed_by,
    weight_of,
)
from gradmap.model.precision import widened
from gradmap.model.sublayers import Part, Sublayer

LEARNING_RATE = 1e-3
EPOCHS = 10  # the paper does not say

# (W' - I, index of a sample) -> what the layer's output lacks, (T, d)
Errors = Callable[[Tensor, int], Tensor]


def project_with_adam(pruned: Pruned, options: ProjectionOptions = AS_PUBLISHED) -> Compensation:
    """For the most drifted layer, as `project_most_drifted`; any linear map of it
    (ProjectionOptions.target)."""
    drift = mean_drift(pruned)
    regularisation = 0.0 if options.unregularised else REGULARISATION
    samples, seed = len(pruned.calibration.fit_ids), pruned.calibration.seed

    def correct(layer: int, changes: Changes) -> tuple[Correction, ...]:
        place, module = find_map(pruned, layer, options.target)
        start, errors_of = _problem(pruned, place, layer, changes, options.side)
        *_, update = train_projection(start, errors_of, samples, EPOCHS, seed, regularisation)
        return pruned.judge(
            [(place, _as_change(update.double().cpu(), module, options.side))], changes
        )

    return Compensation(correct_in_turn(most_drifted(drift, options.top_z), correct), drift)


def require_one_process(job: Job, options: ProjectionOptions) -> None:
    """Raises UserError if it is to be shared by several."""
    if process_count() > 1:
        raise UserError(
            "--compensator projection-adam takes a sample a step; start one process, or use "
            "projection."
        )
    require_enough_layers(job, options)


def find_map(pruned: Pruned, layer: int, target: str) -> tuple[Place, nn.Module]:
    """The linear map that is called `target`_proj in the layer with this FFN; `down` is known for
    every family. Raises UserError."""
    if target == "down":
        place = Place(layer, pruned.model.architecture.down_projection)
        return place, pruned.model.down_projection(layer)
    maps = dict(pruned.model.linear_maps(_sublayers(pruned, layer)))
    for place, module in maps.items():
        if place.target.rpartition(".")[2] == f"{target}_proj":
            return place, module
    names = ", ".join(place.target for place in maps)
    raise UserError(
        f"--target {target}: this model has no {target}_proj; the linear maps of a layer are "
        f"{names}."
    )


def train_projection(
    start: Tensor,
    errors_of: Errors,
    samples: int,
    epochs: int,
    seed: int,
    regularisation: float = REGULARISATION,
) -> Iterator[Tensor]:
    """W' - I after every epoch, beginning with `start`, zeros (s, s). A step takes one sample."""
    generator = torch.Generator().manual_seed(seed)
    update = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([update], LEARNING_RATE)
    with progress("Training W' (samples)", epochs * samples) as advance:
        for _ in range(epochs):
            for index in torch.randperm(samples, generator=generator).tolist():
                optimizer.zero_grad()
                objective(update, errors_of(update, index)[None], regularisation).backward()
                optimizer.step()
                advance(1)
            yield update.detach()


def objective(update: Tensor, errors: Tensor, regularisation: float = REGULARISATION) -> Tensor:
    """Eq. 11 and 12 for W' = I + update: (s, s), (N, T, d) -> scalar.

    Eq. 11 as a mean over tokens and channels, as a loss of that name is: beside a sum, Table 8's
    weight does nothing.
    """
    return errors.square().mean() + regularisation * update.square().sum()


def errors_of_output(added: Tensor, missing: Tensor) -> Errors:
    """For W' on the left of the down projection: W' A + X_F - X_O is (W' - I) A - missing.

    added: A, missing: X_O - H', both (N, T, d).
    """
    return lambda update, index: added[index] @ update.mT - missing[index]


def _sublayers(pruned: Pruned, layer: int) -> list[Sublayer]:
    """Of the retained layer with the FFN of this one."""
    attention = next(joined.attention for joined in pruned.kept_layers if joined.ffn == layer)
    return [Sublayer(attention, Part.ATTENTION), Sublayer(layer, Part.FFN)]


def _problem(
    pruned: Pruned, place: Place, layer: int, changes: Changes, side: str
) -> tuple[Tensor, Errors]:
    """W' - I to begin with, in float32 at least, which a learning rate of 1e-3 needs; and what is
    to become small."""
    if place.target != pruned.model.architecture.down_projection:
        weight = widened(weight_of(pruned.model.map_at(place)))
        size = weight.shape[0 if side == "left" else 1]
        return weight.new_zeros(size, size), _errors_in_layer(pruned, place, layer, changes, side)
    ffn = Sublayer(layer, Part.FFN)
    fit = Fit(ffn, ffn, side)
    features, missing = map(widened, all_features(pruned, fit, changes))
    start = features.new_zeros(features.shape[-1], features.shape[-1])
    if fit.kind == "left":
        return start, errors_of_output(features, missing)
    weight = output_weight(pruned, ffn).to(features)
    return start, lambda update, index: features[index] @ update.mT @ weight.mT - missing[index]


@torch.no_grad()
def _errors_in_layer(
    pruned: Pruned, place: Place, layer: int, changes: Changes, side: str
) -> Errors:
    """For any other map: the layer with this FFN runs."""
    model, fit_ids = pruned.model, pruned.calibration.fit_ids
    attention, ffn = _sublayers(pruned, layer)
    dense, walk = pruned.walk(pruned.sublayers, fit_ids), pruned.walk(pruned.kept, fit_ids)
    dense.go_behind(ffn, {})
    walk.go_to(attention, changes)
    module = model.map_at(place)

    def errors_of(update: Tensor, index: int) -> Tensor:
        change = _as_change(update, module, side)
        sample = slice(index, index + 1)
        with model.changed(followed_by(changes, [(place, change)])):
            return (walk.run([attention, ffn], sample) - dense.hidden[sample])[0]

    return errors_of


def _as_change(update: Tensor, module: nn.Module, side: str) -> Change:
    if side == "left":
        return Projection(torch.eye(len(update)).to(update) + update)
    return Update(weight_of(module).to(update) @ update)


COMPENSATOR = Compensator(
    name="projection-adam",
    about="folds a W' that Adam trained (Table 8), for any linear map of the layer",
    paper="GradMAP",
    run=project_with_adam,
    options=ProjectionOptions,
    check=require_one_process,
    linear_output=True,
)
