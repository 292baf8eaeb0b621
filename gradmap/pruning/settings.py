"""What `gradmap prune` can be asked for, and what that comes to once methods are chosen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gradmap.common.reading import Strict
from gradmap.methods.options import ManualOptions, MethodOptions, ProjectionOptions
from gradmap.methods.registry import compensator, compensator_names, selector, selector_names
from gradmap.model.options import ComputingOptions
from gradmap.model.sublayers import Unit

HELD_OUT: Literal["held-out"] = "held-out"
ALWAYS: Literal["always"] = "always"
Accept = Literal["held-out", "always"]
# So many do all generators know that draw something: NumPy's take 32 bits.
SEEDS = 2**32


class CalibrationOptions(Strict):
    """calibration: SPEC of a text (gradmap.data.text_specs). samples x tokens: size of the set, a
    BOS token included."""

    calibration: str = Field(
        "wikipedia", description="Text source, see gradmap/data/text_specs.py."
    )
    samples: int = Field(128, description="Calibration samples.")
    tokens: int = Field(128, description="Tokens per sample, with BOS.")


class _Computing(ComputingOptions):
    """stream: read layers from disk one at a time, for a model that is larger than memory.
    budget_minutes: fewer samples are used if all would take longer on this machine."""

    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = Field(
        42,
        description="Draws the calibration samples.",
        json_schema_extra={"cure": f"give a number from 0 to {SEEDS - 1}"},
    )
    stream: bool = Field(False, description="Read layers one by one: for models beyond memory.")
    budget_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Use fewer samples if so many would take longer on this machine.",
        json_schema_extra={"cure": "give a number above 0"},
    )


class _Protection(Strict):
    """protect_first, protect_last: so many layers at either end stay."""

    protect_first: int = Field(0, ge=0, description="So many first layers stay.")
    protect_last: int = Field(0, ge=0, description="So many last layers stay.")


class _Rounds(Strict):
    one_shot: bool = Field(False, description="Score once instead of after every removal.")


# Fields come in the order of the last base first.
class _Common(
    _Computing, CalibrationOptions, _Rounds, ProjectionOptions, _Protection, ManualOptions
):
    """What holds whichever methods are chosen."""


class _Asked(Strict):
    remove: int | None = Field(None, description="How many layers to remove.")
    ratio: float | None = Field(
        None, description="Which share of the layers to remove, such as 0.25."
    )
    preset: str | None = Field(
        None,
        description="best: repair and distil, the default. gradmap, the published method: "
        "gradient and projection, --accept always, --held-out 0.",
    )
    selector: str | None = Field(
        None, description=f"How layers are chosen: {', '.join(selector_names())}."
    )
    compensator: str | None = Field(
        None, description=f"How the loss is repaired: {', '.join(compensator_names())}."
    )
    unit: Unit | None = Field(
        None,
        description="What goes at a time: layer, the default, or pair, any two neighbours of the "
        "sequence of attention and FFN: a layer, or the FFN of one and the attention of the next.",
    )
    accept: Accept | None = Field(
        None,
        description="Which repairs are applied: held-out, those that bring the model nearer to "
        "the dense one on held-out samples, or always all.",
    )
    held_out: int | None = Field(
        None, ge=0, description="So many samples are not fitted on; a quarter if not given."
    )


class PruneOptions(_Common, _Asked):
    """The options of `gradmap prune`, of the command line and of a recipe. One of remove and ratio
    says how many layers go; what is left out of the methods is the preset's."""


class Methods(Strict):
    """How layers are chosen and the loss is repaired.

    accept: which repairs are applied, those that bring the model nearer to the dense one on
    held-out samples, or `always` all of them. held_out: how many samples are not fitted on, None
    for a quarter. unit: what goes at a time.
    """

    selector: str
    compensator: str
    accept: Accept = HELD_OUT
    held_out: int | None = None
    unit: Unit = "layer"

    @property
    def by_held_out_samples(self) -> str | None:
        """The one that chooses by what it does on held-out samples (layers, or a lambda that no
        paper says), if one does."""
        methods = selector(self.selector), compensator(self.compensator)
        return next((method.name for method in methods if method.by_held_out), None)


class _Count(Strict):
    remove: int


class PruneSettings(_Common, Methods, _Count):
    """How to prune. remove: number of layers K, or of pairs, which are as large."""

    @property
    def at_once(self) -> bool:
        """Whether all layers are chosen by the first scores."""
        return self.one_shot or not selector(self.selector).nested

    def options_of(self, kind: type[MethodOptions] | None) -> MethodOptions | None:
        """What of it are the options of a method, which names their class."""
        if kind is None:
            return None
        return kind(**{name: getattr(self, name) for name in kind.model_fields})


# What the order of removals depends on, samples and model aside.
OF_SELECTION = (
    "selector",
    "unit",
    *ManualOptions.model_fields,
    *_Protection.model_fields,
    "one_shot",
)
# What a plan that is made from a larger one may have differently.
OF_REPAIR = (
    "remove",
    "compensator",
    "accept",
    "held_out",
    "device",
    *ProjectionOptions.model_fields,
)
