"""What a fit looks at: the features and what is missing, of every calibration sample, and their
Gram matrices.

Where an RMS norm follows the map that is fitted, features are over the root mean square of what
the map gives (gradmap.methods.normed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import summed
from gradmap.common.errors import UserError
from gradmap.common.machine import available_bytes
from gradmap.methods.compensation import Pruned
from gradmap.methods.least_squares import ridge_sums
from gradmap.model.corrections import Changes, linear_output, weight_of
from gradmap.model.norms import root_mean_square
from gradmap.model.precision import widened
from gradmap.model.sublayers import Sublayer
from gradmap.model.walk import Walk


@dataclass(frozen=True)
class Fit:
    """What to fit. sublayer: whose output map is changed, W_down or the attention's output
    projection. goal: the sublayer behind which the hidden state should be what it is in the dense
    model.

    kind: `left` or `right`, a W' on that side of the map, or `refit`, the map itself; or `state`, a
    matrix on all of the hidden state behind the sublayer, which no map holds. weighted: whether
    every token counts by 1 / |target|^2, so that the few with huge norms (attention sinks) do not
    own the fit. exact: whether products are of float64, as a fit needs that is not regularised.
    """

    sublayer: Sublayer
    goal: Sublayer
    kind: str = "left"
    weighted: bool = False
    exact: bool = False


# Of one batch: F (B, T, f), D (B, T, d) and the target (B, T, d).
Visit = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Walks:
    """The samples to fit on, on their way through the dense and through the pruned model, and the
    held-out ones, if there are any, through the pruned one. Fits from front to back share them, so
    that none begins at layer 0 again.

    wanted: see Pruned.
    """

    dense: Walk
    pruned: Walk
    held_out: Walk | None = None
    wanted: Tensor | None = None

    @classmethod
    def start(cls, pruned: Pruned) -> Walks:
        fit_ids, held_out_ids = pruned.calibration.fit_ids, pruned.calibration.held_out_ids
        to_fit_on = pruned.walk(pruned.sublayers, fit_ids), pruned.walk(pruned.kept, fit_ids)
        if not len(held_out_ids):
            return cls(*to_fit_on)
        return cls(*to_fit_on, pruned.walk(pruned.kept, held_out_ids), pruned.wanted)

    def held_out_divergence(self, changes: Changes) -> float | None:
        """Nats per token, if the rest of the way is gone with the changes; None if nothing is held
        out."""
        if self.held_out is None or self.wanted is None:
            return None
        return self.held_out.divergence(self.wanted, changes)


def accumulate_gram(
    pruned: Pruned, fit: Fit, changes: Changes, walks: Walks | None = None
) -> tuple[Tensor, Tensor]:
    """Returns F F^T (f, f) and D F^T (d, f), float64, over all tokens of the samples to fit on.

    On the model's device, where they are solved with too: a GPU gets little done while it hands out
    matrices of this size for every batch. In the CPU's memory if the device has no room.
    """
    sums: list[Tensor] = []

    def add(features: Tensor, missing: Tensor, target: Tensor) -> None:
        if fit.exact:
            features, missing = features.double(), missing.double()
        device = sums[0].device if sums else device_with_room(features.shape[-1], features.device)
        of_batch = [
            part.to(device)
            for part in ridge_sums(features, missing, target if fit.weighted else None)
        ]
        sums[:] = (
            [total + part for total, part in zip(sums, of_batch, strict=True)] if sums else of_batch
        )

    visit_features(pruned, fit, changes, add, walks)
    gram, cross = sums
    return summed(gram), summed(cross)


def visit_features(
    pruned: Pruned,
    fit: Fit,
    changes: Changes,
    visit: Visit,
    walks: Walks | None = None,
) -> None:
    """Calls `visit` with one batch after the other of the samples to fit on."""
    walks = walks or Walks.start(pruned)
    output_map = pruned.model.map_at(pruned.model.output_of(fit.sublayer))
    multiplier = pruned.model.multiplier(fit.sublayer)
    norm = pruned.model.norm_behind(fit.sublayer)
    title = f"Fitting {fit.sublayer.words} (samples)"
    with progress(title, len(walks.pruned.hidden)) as advance:

        def visit_batch(
            samples: slice, captured: list[tuple[Tensor, Tensor]], output: Tensor
        ) -> None:
            ((inputs, added),) = captured
            target = walks.dense.hidden[samples].to(output.device)
            if fit.kind == "state":
                features = output
            elif fit.kind == "left":
                # hooks that correct come first, so that `added` is what the corrected map adds
                features = multiplier * linear_output(output_map, added)
            else:
                features = multiplier * inputs
            if norm is not None and fit.kind != "state":
                features = widened(features) / root_mean_square(widened(added))
            features = features.reshape(*target.shape[:2], -1)
            visit(features, widened(target) - widened(output), target)
            advance(len(target))

        walks.dense.go_behind(fit.goal, {})
        walks.pruned.go_to(fit.sublayer, changes)
        walks.pruned.look(fit.sublayer, [output_map], changes, visit_batch)


def all_features(pruned: Pruned, fit: Fit, changes: Changes) -> tuple[Tensor, Tensor]:
    """F (N, T, f) and D (N, T, d) of all samples to fit on, at once."""
    batches: list[tuple[Tensor, Tensor]] = []
    visit_features(
        pruned, fit, changes, lambda features, missing, target: batches.append((features, missing))
    )
    features, missing = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return features, missing


def output_weight(pruned: Pruned, sublayer: Sublayer) -> Tensor:
    """Of its last map, (d, k) float64; of a mixture of experts, each expert has its own, and there
    is none."""
    output_map = pruned.model.map_at(pruned.model.output_of(sublayer))
    return weight_of(output_map).double().cpu()


def device_with_room(size: int, device: torch.device) -> torch.device:
    """`device` or, if a fit of that size does not fit there, the CPU. Raises UserError if it fits
    nowhere."""
    needed = 4 * 8 * size**2  # the sum, one batch's part, the regularised matrix and its factor
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0]:
        return device
    available = available_bytes()
    if needed > available:
        raise UserError(
            f"Gram matrices of {size} x {size} need {needed / 1e9:.1f} GB and "
            f"{available / 1e9:.1f} GB are free; use --compensator sequential, whose matrices are "
            "as wide as the hidden state."
        )
    return torch.device("cpu")
