"""Methods that go together, by one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.reading import checked
from gradmap.pruning.checks import layers_to_remove
from gradmap.pruning.plan import PLAN_FILE, load_plan
from gradmap.pruning.settings import ALWAYS, Methods, PruneOptions, PruneSettings

# best: what did best in our own comparison. gradmap: the method as it was published, which holds
# nothing out.
DEFAULT_PRESET = "best"
PRESETS = {
    "best": Methods(selector="repair", compensator="distil"),
    "gradmap": Methods(selector="gradient", compensator="projection", accept=ALWAYS, held_out=0),
}


def choose_methods(preset: str | None, from_plan: Path | None = None, **given: Any) -> Methods:
    """The methods that are given (not None), else the preset's, else those of the larger plan.

    What a preset says about held-out samples ends where another method is given that needs some.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}; known are {', '.join(PRESETS)}.")
    chosen = PRESETS[preset or DEFAULT_PRESET]
    if preset is None and from_plan is not None:
        recipe = load_plan(from_plan).recipe
        recorded = {name: recipe[name] for name in Methods.model_fields if name in recipe}
        chosen = checked(Methods, recorded, from_plan / PLAN_FILE)
    given = {name: value for name, value in given.items() if value is not None}
    methods = Methods(**chosen.model_dump() | given)
    if methods.by_held_out_samples and not chosen.by_held_out_samples:
        kept = methods.model_dump(include={"selector", "compensator", "unit"})
        methods = Methods(**kept | given)
    return methods


def settle(
    options: PruneOptions, config: dict[str, Any], from_plan: Path | None = None
) -> PruneSettings:
    """What options come to for a model with this config. Raises UserError unless they say how many
    layers go."""
    given = options.model_dump()
    remove = layers_to_remove(config, given.pop("remove"), given.pop("ratio"))
    methods = {name: given.pop(name) for name in Methods.model_fields}
    chosen = choose_methods(given.pop("preset"), from_plan, **methods)
    return PruneSettings(remove=remove, **chosen.model_dump(), **given)
