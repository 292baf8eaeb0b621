"""Methods that go together, by one name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.reading import checked
from gradmap.methods.registry import compensator, selector
from gradmap.pruning.checks import layers_to_remove
from gradmap.pruning.plan import PLAN_FILE, load_plan
from gradmap.pruning.settings import ALWAYS, HELD_OUT, Accept, PruneOptions, PruneSettings


@dataclass(frozen=True)
class Methods:
    """How layers are chosen and the loss is repaired.

    accept: which repairs are applied, those that bring the model nearer to the dense one on
    held-out samples, or `always` all of them. held_out: how many samples are not fitted on, None
    for a quarter.
    """

    selector: str
    compensator: str
    accept: Accept = HELD_OUT
    held_out: int | None = None

    @property
    def by_held_out_samples(self) -> str | None:
        """The one that chooses by what it does on held-out samples (layers, or a lambda that no
        paper says), if one does."""
        methods = selector(self.selector), compensator(self.compensator)
        return next((method.name for method in methods if method.by_held_out), None)


# best: what did best in our own comparison. gradmap: the method as it was published, which holds
# nothing out.
DEFAULT_PRESET = "best"
PRESETS = {
    "best": Methods("repair", "distil"),
    "gradmap": Methods("gradient", "projection", accept=ALWAYS, held_out=0),
}


def choose_methods(preset: str | None, from_plan: Path | None = None, **given: Any) -> Methods:
    """The methods that are given (not None), else the preset's, else those of the larger plan.

    What a preset says about held-out samples ends where another method is given that needs some.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}; known are {', '.join(PRESETS)}.")
    chosen = PRESETS[preset or DEFAULT_PRESET]
    if preset is None and from_plan is not None:
        chosen = checked(Methods, load_plan(from_plan).recipe, from_plan / PLAN_FILE)
    given = {name: value for name, value in given.items() if value is not None}
    methods = replace(chosen, **given)
    if methods.by_held_out_samples and not chosen.by_held_out_samples:
        methods = replace(Methods(methods.selector, methods.compensator), **given)
    return methods


def settle(
    options: PruneOptions, config: dict[str, Any], from_plan: Path | None = None
) -> PruneSettings:
    """What options come to for a model with this config. Raises UserError unless they say how many
    layers go."""
    given = options.model_dump()
    remove = layers_to_remove(config, given.pop("remove"), given.pop("ratio"))
    methods = {field.name: given.pop(field.name) for field in fields(Methods)}
    chosen = choose_methods(given.pop("preset"), from_plan, **methods)
    return PruneSettings(remove=remove, **asdict(chosen), **given)
