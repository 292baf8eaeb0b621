"""FFNs side by side (FlattenGPT, arXiv 2602.08858, and CoMe, arXiv 2510.15304): a removed layer's
best FFN channels move into the layer before it, in place of channels that matter less there.

Layers that are alike do much the same to a hidden state one after the other or side by side, on
one input. Side by side, all their FFNs are one that is several times as wide; of its channels as
many stay as a layer has, and the down projection is then fitted in closed form. The removed layers'
weights take the norm's gain along, so that the retained layer's norm serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradmap.common.distributed import summed
from gradmap.common.errors import UserError
from gradmap.costs.timing import flatten_seconds
from gradmap.methods.base import Compensator, Job
from gradmap.methods.compensation import Compensation, Correction, Pruned, Run
from gradmap.methods.features import Fit, Walks
from gradmap.methods.merging import WHOLE_LAYERS
from gradmap.methods.ridge import fit_correction, say_if_tokens_are_few
from gradmap.methods.sequential import goals_around_runs
from gradmap.model.corrections import Changes, Place, Update, followed_by, weight_of
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import capturing
from gradmap.model.precision import widened
from gradmap.model.sublayers import Part, Sublayer

HAS_BIASES = (
    "its FFN has biases, which no correction moves from layer to layer; use --compensator refit"
)
HAS_NO_NORM = (
    "its FFN reads what its attention reads, behind the same norm; use --compensator refit"
)


def flatten_runs(pruned: Pruned) -> Compensation:
    """Before each run of removed layers, channels of all of them or, if that is better on held-out
    samples, a refit of the retained layer's own; behind it a refit, as `refit` does."""
    require_no_biases(pruned.model)
    say_if_tokens_are_few(pruned, "refit")
    walks, runs = Walks.start(pruned), {run.before: run for run in pruned.runs()}
    so_far = Compensation()
    for sublayer, goal in sorted(goals_around_runs(pruned).items()):
        fit = Fit(sublayer, goal, "refit", weighted=True)
        known = so_far.held_out_divergence
        found = fit_correction(pruned, fit, so_far.changes, walks=walks, before=known)
        if sublayer in runs:
            flattened = flatten_run(pruned, runs[sublayer], fit, so_far.changes, walks, found[0])
            found = min(found, flattened, key=_divergence)
        so_far = Compensation((*so_far.corrections, *found))
    return so_far


def flatten_run(
    pruned: Pruned, run: Run, fit: Fit, changes: Changes, walks: Walks, own: Correction
) -> tuple[Correction, ...]:
    """Corrections of all linear maps of the FFN before the run, on top of `changes`. own: what else
    could be done to it, whose held-out divergence before is theirs too."""
    ffns = [run.before, *(Sublayer(layer, Part.FFN) for layer in removed_layers(run))]
    channels = choose_channels(channel_scores(pruned, ffns, walks))
    *reading, (place, writing) = moved_channels(pruned.model, ffns, channels)
    together = followed_by(changes, [*reading, (place, writing)])
    before = own.held_out_divergence_before
    (refitted,) = fit_correction(pruned, fit, together, walks=walks, before=before)
    assert isinstance(refitted.change, Update)
    both = Update(writing.matrix.to(refitted.change.matrix) + refitted.change.matrix)
    after, accepted = refitted.held_out_divergence_after, refitted.accepted
    moved = [Correction(at, change, before, after, accepted) for at, change in reading]
    return (*moved, replace(refitted, change=both))


def removed_layers(run: Run) -> range:
    return range(run.before.layer + 1, run.last.layer + 1)


@torch.no_grad()
def channel_scores(pruned: Pruned, ffns: Sequence[Sublayer], walks: Walks) -> Tensor:
    """How much each channel of these FFNs, side by side on what enters the first, adds to the
    hidden state (CoMe's sensitivity): the root of the sum over tokens of its squares, times the
    norm of its column of W_down; (m, k) float64.

    Tokens count by 1 / |hidden state|^2, as for a weighted Fit. The walk through the pruned model
    is in front of the first of them.
    """
    maps = [pruned.model.map_at(pruned.model.output_of(ffn)) for ffn in ffns]
    squares = torch.zeros(len(maps), weight_of(maps[0]).shape[1], dtype=torch.float64)

    def add_batch(samples: slice) -> None:
        entering = widened(walks.pruned.hidden[samples]).flatten(end_dim=-2)
        weights = entering.square().sum(dim=1).reciprocal()
        for place, (ffn, output_map) in enumerate(zip(ffns, maps, strict=True)):
            with capturing([output_map]) as captured:
                walks.pruned.run([ffn], samples)
            channels = widened(captured[output_map][0]).flatten(end_dim=-2)
            squares[place] += (weights @ channels.square()).double().cpu()

    pruned.batches.run(len(walks.pruned.hidden), add_batch)
    norms = torch.stack([weight_of(module).double().norm(dim=0).cpu() for module in maps])
    return summed(squares).sqrt() * norms


def choose_channels(scores: Tensor) -> Tensor:
    """Which channel of all FFNs in a row takes each place of the first one: (m, k) -> (k,). Of its
    own, those that stay keep their places."""
    places = scores.shape[1]
    best = scores.flatten().topk(places).indices.sort().values
    chosen = torch.arange(places)
    is_free = ~torch.isin(chosen, best)
    chosen[is_free] = best[best >= places]
    return chosen


def moved_channels(
    model: LayeredModel, ffns: Sequence[Sublayer], channels: Tensor
) -> list[tuple[Place, Update]]:
    """What makes the first FFN compute these channels (k,) of all in a row, as each does behind its
    own norm. The last is of the map that writes, which adds what they added."""
    first, writing = ffns[0], model.output_of(ffns[0])
    maps = [dict(model.linear_maps([ffn])) for ffn in ffns]
    scales = [gain_ratio(model, ffn, first) for ffn in ffns]
    reading = [place for place in maps[0] if place != writing]
    updates: list[tuple[Place, Update]] = []
    for place in reading:
        rows = [
            weight_of(of_ffn[Place(ffn.layer, place.target)]).double() * scale
            for ffn, of_ffn, scale in zip(ffns, maps, scales, strict=True)
        ]
        updates.append((place, Update(chosen_rows(rows, channels) - rows[0])))
    columns = [
        weight_of(of_ffn[model.output_of(ffn)]).double().mT
        for ffn, of_ffn in zip(ffns, maps, strict=True)
    ]
    return [*updates, (writing, Update((chosen_rows(columns, channels) - columns[0]).mT))]


def chosen_rows(weights: Sequence[Tensor], channels: Tensor) -> Tensor:
    """Those of some channels (k,) of all weights in a row; each (n k, d), where a map makes n
    numbers of each channel, as of gate and up in one."""
    of_each = [weight.unflatten(0, (-1, len(channels))) for weight in weights]
    return torch.cat(of_each, dim=1)[:, channels.to(weights[0].device)].flatten(end_dim=1)


@torch.no_grad()
def gain_ratio(model: LayeredModel, ffn: Sublayer, first: Sublayer) -> Tensor:
    """The gain of the norm before an FFN over that before another, by channel: (d,) float64. Raises
    UserError where the other takes a channel away."""
    gains = []
    for sublayer in (ffn, first):
        norm = _norm_of(model, sublayer)
        # of ones, whose root mean square is 1, a norm makes its gain, however that is stored
        ones = torch.ones_like(norm.get_parameter("weight"))
        gains.append(norm(ones).double())
    ratio: Tensor = gains[0] / gains[1]
    if not ratio.isfinite().all():
        raise UserError(
            f"The norm before {first.words} has a gain of 0, so that no channel of {ffn.words} can "
            "move there; use --compensator refit."
        )
    return ratio


def require_no_biases(model: LayeredModel) -> None:
    """Raises UserError if what reads for the FFN adds something that is no linear map."""
    ffn = Sublayer(0, Part.FFN)
    modules = [_norm_of(model, ffn), *(module for _, module in model.linear_maps([ffn]))]
    if any(getattr(module, "bias", None) is not None for module in modules):
        raise UserError(f"flatten does not work with this model: {HAS_BIASES}.")


def require_movable(job: Job, options: None) -> None:
    """Raises UserError where FFNs have no norm of their own, or the config tells that they have
    biases."""
    family, architecture = job.config["model_type"], job.architecture
    reason = None
    if family in ("gpt2", "opt") or job.config.get("mlp_bias"):
        reason = HAS_BIASES
    elif architecture.down_projection.startswith(f"{architecture.feed_forward[0]}."):
        reason = HAS_NO_NORM
    if reason is not None:
        raise UserError(f"flatten does not work with this {family} model: {reason}.")


def _norm_of(model: LayeredModel, ffn: Sublayer) -> nn.Module:
    return model.layers[ffn.layer].get_submodule(model.architecture.feed_forward[0])


def _divergence(corrections: Sequence[Correction]) -> float:
    after = corrections[0].held_out_divergence_after
    assert after is not None  # nothing is chosen without held-out samples
    return after


COMPENSATOR = Compensator(
    name="flatten",
    about="moves the best FFN channels of removed layers into the layer before them, and fits; or "
    "does what `refit` does, if that is better",
    paper="FlattenGPT (arXiv 2602.08858), CoMe (arXiv 2510.15304)",
    run=flatten_runs,
    linear_output=True,
    in_memory=True,
    by_held_out=True,
    whole_layers=WHOLE_LAYERS,
    check=require_movable,
    no_experts="The experts of two layers do not correspond, so their channels cannot move",
    seconds=flatten_seconds,
)
