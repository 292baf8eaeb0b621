"""Whether what `gradmap prune` is asked for fits the model and itself: before the model is
loaded."""

from __future__ import annotations

from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.flags import flag_of
from gradmap.common.wording import listed
from gradmap.methods.base import Job, Method
from gradmap.methods.options import ManualOptions, MethodOptions, ProjectionOptions
from gradmap.methods.registry import (
    compensator,
    compensator_names,
    selector,
    selector_names,
)
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.configs import layer_count
from gradmap.model.proof import require_prunable
from gradmap.pruning.settings import ALWAYS, PruneSettings


def layers_to_remove(config: dict[str, Any], remove: int | None, ratio: float | None) -> int:
    """Returns K from --remove, or from --ratio rounded to whole layers. Exactly one of the two must
    be given."""
    if (remove is None) == (ratio is None):
        raise UserError("Give either --remove K or --ratio R.")
    if remove is not None:
        return remove
    assert ratio is not None
    if not 0 < ratio < 1:
        raise UserError(f"--ratio is {ratio}; give a share between 0 and 1, such as 0.25.")
    return max(1, round(ratio * layer_count(config)))


def require_removable(remove: int, layers: int, name: str) -> None:
    """Raises UserError if nothing would go, or nothing stay."""
    if not 1 <= remove < layers:
        raise UserError(
            f"Cannot remove {remove} of the {layers} layers of {name}; remove between 1 and "
            f"{layers - 1}."
        )


def require_positions(checkpoint: Checkpoint, tokens: int) -> None:
    """Raises UserError if samples are longer than the model takes."""
    if checkpoint.positions is not None and tokens > checkpoint.positions:
        raise UserError(
            f"{checkpoint.name} takes {checkpoint.positions} tokens at once; lower --tokens to "
            "that."
        )


def protected_layers(layers: int, settings: PruneSettings) -> frozenset[int]:
    """The indices of those that stay."""
    indices = range(layers)
    return frozenset(
        (*indices[: settings.protect_first], *indices[layers - settings.protect_last :])
    )


def check_settings(checkpoint: Checkpoint, settings: PruneSettings) -> None:
    """Raises UserError if the settings do not fit the model, or each other."""
    layers = layer_count(checkpoint.config)
    require_removable(settings.remove, layers, checkpoint.name)
    require_positions(checkpoint, settings.tokens)
    require_prunable(checkpoint.config)
    protected = protected_layers(layers, settings)
    if layers - len(protected) < settings.remove:
        raise UserError(
            f"{len(protected)} of the {layers} layers are protected, so that {settings.remove} "
            "cannot be removed; lower --protect-first, --protect-last or --remove."
        )
    chosen = selector(settings.selector), compensator(settings.compensator)
    if settings.held_out == 0:
        _require_nothing_held_out(settings)
    for kind in (ManualOptions, ProjectionOptions):
        _require_readers(settings, kind, chosen)
    job = Job(
        checkpoint.config,
        architecture_of(checkpoint.config),
        layers,
        settings.remove,
        protected,
        settings.samples,
        settings.unit,
    )
    for method in chosen:
        method.require_possible(job, settings.stream, settings.options_of(method.options))


def _require_nothing_held_out(settings: PruneSettings) -> None:
    name = settings.by_held_out_samples
    if name is not None:
        raise UserError(
            f"{name} chooses by what it does on held-out samples, and --held-out is 0; leave it "
            "out."
        )
    if settings.accept != ALWAYS and settings.compensator != "none":
        raise UserError(
            f"With --held-out 0 no repair can be judged; give --accept {ALWAYS}, or hold samples "
            "out."
        )


def _require_readers(
    settings: PruneSettings, kind: type[MethodOptions], chosen: tuple[Method, ...]
) -> None:
    """Raises UserError if options are given that none of the chosen methods reads."""
    if settings.options_of(kind) == kind() or any(method.options is kind for method in chosen):
        return
    flags = [flag_of(name) for name in kind.model_fields]
    what = " ".join(["is" if len(flags) == 1 else "are", kind.purpose]).strip()
    raise UserError(f"{listed(flags, 'and')} {what} for {_readers(kind)}; give both, or neither.")


def _readers(kind: type[MethodOptions]) -> str:
    """The methods that read such options, as one chooses them."""
    roles = (
        ("selector", selector_names(), selector),
        ("compensator", compensator_names(), compensator),
    )
    for role, names, find in roles:
        readers = [name for name in names if find(name).options is kind]
        if readers:
            return f"--{role} {listed(readers, 'and')}"
    raise AssertionError(f"no method reads {kind.__name__}")
