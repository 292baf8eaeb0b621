"""What `gradmap prune` is asked for, and whether it fits the model and itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gradmap.common.errors import UserError
from gradmap.methods.compensation import ProjectionOptions
from gradmap.methods.compensators import COMPENSATORS
from gradmap.methods.selectors import NOT_NESTED, SELECTORS
from gradmap.model.architectures import architecture_of, layer_count
from gradmap.model.checkpoint import Checkpoint
from gradmap.pruning.presets import ALWAYS, HELD_OUT, Methods

# Repairs that need no linear map behind which nothing follows but the addition to the hidden state.
ANYWHERE = ("none", "distil", "mka", "gradpruner", "linear-patch")
# Methods that change or differentiate every weight, so that all must be in memory.
IN_MEMORY = ("distil", "mka", "gradpruner")
# So many do all generators know that draw something: NumPy's take 32 bits.
SEEDS = 2**32


@dataclass(frozen=True)
class PruneSettings:
    """How to prune. remove: number of layers K; samples x tokens: size of the calibration set, a
    BOS token included.

    layers: the order of removal, for selector manual. protect_first, protect_last: so many layers
    at either end stay. accept, held_out: see Methods. top_z, side, target, unregularised: see
    ProjectionOptions. stream: read layers from disk one at a time, for a model that is larger than
    memory. budget_minutes: fewer samples are used if all would take longer on this machine.
    """

    remove: int
    calibration: str
    selector: str
    compensator: str
    accept: str = HELD_OUT
    held_out: int | None = None
    one_shot: bool = False
    layers: list[int] = field(default_factory=list)
    protect_first: int = 0
    protect_last: int = 0
    top_z: int = 1
    side: str = "left"
    target: str = "down"
    unregularised: bool = False
    samples: int = 128
    tokens: int = 128
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    budget_minutes: float | None = None

    @property
    def at_once(self) -> bool:
        """Whether all layers are chosen by the first scores."""
        return self.one_shot or self.selector in NOT_NESTED

    @property
    def projection(self) -> ProjectionOptions:
        return ProjectionOptions(self.top_z, self.side, self.target, self.unregularised)


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


def check_settings(checkpoint: Checkpoint, settings: PruneSettings) -> None:
    """Raises UserError if the settings do not fit the model."""
    layers = layer_count(checkpoint.config)
    require_removable(settings.remove, layers, checkpoint.name)
    if checkpoint.positions is not None and settings.tokens > checkpoint.positions:
        raise UserError(
            f"{checkpoint.name} takes {checkpoint.positions} tokens at once; lower --tokens to "
            "that."
        )
    protected = protected_layers(checkpoint, settings)
    if layers - len(protected) < settings.remove:
        raise UserError(
            f"{len(protected)} of the {layers} layers are protected, so that {settings.remove} "
            "cannot be removed; lower --protect-first, --protect-last or --remove."
        )
    for kind, name, known in (
        ("selector", settings.selector, SELECTORS),
        ("compensator", settings.compensator, COMPENSATORS),
    ):
        if name not in known:
            raise UserError(f"Unknown {kind} {name!r}; known are {', '.join(known)}.")
    uncorrectable = architecture_of(checkpoint.config).uncorrectable
    if uncorrectable is not None and settings.compensator not in ANYWHERE:
        raise UserError(
            f"The down projections of a {checkpoint.config['model_type']} model cannot be fitted "
            f"in closed form: {uncorrectable}; use --compensator distil or none."
        )
    if settings.stream and settings.compensator in IN_MEMORY:
        raise UserError(
            f"--compensator {settings.compensator} needs all weights in memory; leave out "
            "--stream, or use sequential."
        )
    if settings.projection != ProjectionOptions() and settings.compensator not in (
        "projection",
        "projection-adam",
    ):
        raise UserError(
            "--top-z, --side, --target and --unregularised are for --compensator projection and "
            "projection-adam."
        )
    if settings.budget_minutes is not None and settings.budget_minutes <= 0:
        raise UserError(f"--budget-minutes is {settings.budget_minutes:g}; give a number above 0.")
    if not 0 <= settings.seed < SEEDS:
        raise UserError(f"--seed is {settings.seed}; give a number from 0 to {SEEDS - 1}.")
    if settings.accept not in (HELD_OUT, ALWAYS):
        raise UserError(f"--accept is {settings.accept}; give {HELD_OUT} or {ALWAYS}.")
    if settings.held_out == 0:
        _require_nothing_held_out(settings)
    if settings.side not in ("left", "right"):
        raise UserError(f"--side is {settings.side}; give left or right.")
    if bool(settings.layers) != (settings.selector == "manual"):
        raise UserError(
            "--layers is the order of removal for --selector manual; give both, or neither."
        )


def _require_nothing_held_out(settings: PruneSettings) -> None:
    name = Methods(settings.selector, settings.compensator).by_held_out_samples
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


def protected_layers(checkpoint: Checkpoint, settings: PruneSettings) -> frozenset[int]:
    """The layers that are protected."""
    layers = range(layer_count(checkpoint.config))
    return frozenset(
        (*layers[: settings.protect_first], *layers[len(layers) - settings.protect_last :])
    )
