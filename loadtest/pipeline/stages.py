"""What a recipe comes to: stages with their command lines, and what can be known to be wrong
with them before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.choices import choose_storage
from export.integrity import SCHEMA_VERSION as ARTIFACT_SCHEMA
from export.options import ExportOptions
from gradmap.common.errors import UserError
from gradmap.common.files import ARTIFACT_FILE
from gradmap.common.flags import as_flags, flags_of
from gradmap.common.stages import Stage, is_within
from gradmap.data.text_specs import source_files
from gradmap.evaluation.result import SCHEMA_VERSION as EVALUATION_SCHEMA
from gradmap.evaluation.result import records_beside
from gradmap.evaluation.tasks import expand_names, require_tasks
from gradmap.healing.options import HealOptions
from gradmap.healing.tracking import require_trackers
from gradmap.model.loading import resolve_device
from gradmap.model.precision import weights_dtype
from gradmap.pruning.checks import layers_to_remove
from gradmap.pruning.plan import SCHEMA_VERSION as PLAN_SCHEMA
from loadtest.outcome import measured_facts
from loadtest.pipeline.recipe import PruneSection, Recipe, Turn
from loadtest.records import REPORTS
from loadtest.schema import SCHEMA_VERSION as LOAD_TEST_SCHEMA


@dataclass(frozen=True)
class Places:
    """Where the stages of a run write, below its directory `out`. dense, pruned: the artifacts that
    are served."""

    out: Path

    @property
    def plan(self) -> Path:
        return self.out / "plan"

    @property
    def unhealed(self) -> Path:
        """The plan before it is healed, if it is."""
        return self.out / "unhealed"

    def plans_of(self, turn: Turn) -> tuple[Path, Path]:
        """The plan before it is healed, and behind that; on the way, or at the end."""
        if turn.removed is None:
            return self.unhealed, self.plan
        way = self.out / "schedule"
        return way / f"unhealed{turn.suffix}", way / f"plan{turn.suffix}"

    @property
    def evaluation(self) -> Path:
        return self.out / "eval.json"

    @property
    def pruned(self) -> Path:
        return self.out / "vllm"

    @property
    def dense(self) -> Path:
        return self.out / "dense" / "vllm"

    @property
    def load_test(self) -> Path:
        return self.out / "loadtest"


def plan_stages(recipe: Recipe, out: Path) -> list[Stage]:
    """The stages in the order in which they run."""
    places = Places(out)
    return [
        *_plan_stages(recipe, places),
        _eval_stage(recipe, places),
        _export_stage(recipe, places),
        _baseline_stage(recipe, places),
        _load_test_stage(recipe, places),
    ]


def _plan_stages(recipe: Recipe, places: Places) -> list[Stage]:
    """Those that make the plan."""
    asked = recipe.heal
    if asked is None:
        return [_prune_stage("prune", recipe, recipe.prune, places.plan)]
    stages: list[Stage] = []
    before: Path | None = None
    for turn in asked.turns:
        so_many = {} if turn.removed is None else {"remove": turn.removed, "ratio": None}
        pruning = recipe.prune.model_copy(update=so_many)
        unhealed, healed = places.plans_of(turn)
        stages += [
            _prune_stage(f"prune{turn.suffix}", recipe, pruning, unhealed, before),
            _heal_stage(f"heal{turn.suffix}", recipe, asked.of_each, unhealed, healed),
        ]
        before = healed
    return stages


def _prune_stage(
    name: str, recipe: Recipe, asked: PruneSection, plan: Path, before: Path | None = None
) -> Stage:
    """before: the plan to go on from, if there is one."""
    arguments = ["prune", *_model_arguments(recipe), *flags_of(asked)]
    arguments += [] if before is None else ["--from-plan", str(before)]
    known = [] if before is None else [before]
    return Stage(
        name,
        (*arguments, "--out", str(plan)),
        inputs=(_model_files(recipe), *source_files(asked.calibration), *known),
        outputs=(plan,),
        schema=PLAN_SCHEMA,
    )


def _heal_stage(name: str, recipe: Recipe, asked: HealOptions, unhealed: Path, plan: Path) -> Stage:
    arguments = ["heal", *_model_arguments(recipe), "--plan", str(unhealed)]
    texts = [path for text in asked.text for path in source_files(text)]
    return Stage(
        name,
        (*arguments, *flags_of(asked), "--out", str(plan)),
        inputs=(_model_files(recipe), unhealed, *texts),
        outputs=(plan,),
        schema=PLAN_SCHEMA,
    )


def _eval_stage(recipe: Recipe, places: Places) -> Stage:
    asked, out = recipe.eval, places.evaluation
    arguments = ["eval", *_model_arguments(recipe), "--plan", str(places.plan), "--out", str(out)]
    inputs = [_model_files(recipe), places.plan]
    for source in asked.perplexity.values():
        inputs += source_files(source)
    if asked.task_data is not None:
        inputs.append(asked.task_data)
    return Stage(
        "eval",
        (*arguments, *flags_of(asked), *flags_of(recipe.quality)),
        inputs=tuple(inputs),
        outputs=(out, records_beside(out)),
        schema=EVALUATION_SCHEMA,
        verdicts=True,
    )


def _export_stage(recipe: Recipe, places: Places) -> Stage:
    asked = _exported_in(recipe.export.formats, recipe)
    arguments = ["export", *_model_arguments(recipe), "--plan", str(places.plan)]
    arguments += ["--eval", str(places.evaluation), "--out", str(places.out)]
    return Stage(
        "export",
        (*arguments, *flags_of(asked)),
        inputs=(_model_files(recipe), places.plan, places.evaluation),
        outputs=tuple(places.out / name for name in asked.formats),
        schema=ARTIFACT_SCHEMA,
    )


def _baseline_stage(recipe: Recipe, places: Places) -> Stage:
    """The dense model, exported as the pruned one is, to be served."""
    asked = _exported_in([places.dense.name], recipe)
    arguments = ["export", *_model_arguments(recipe), "--samples-of", str(places.plan)]
    arguments += ["--eval", str(places.evaluation), "--out", str(places.dense.parent)]
    return Stage(
        "baseline",
        (*arguments, *flags_of(asked)),
        inputs=(_model_files(recipe), places.plan, places.evaluation),
        outputs=(places.dense,),
        schema=ARTIFACT_SCHEMA,
    )


def _load_test_stage(recipe: Recipe, places: Places) -> Stage:
    asked, out = recipe.loadtest, places.load_test
    arguments = ["loadtest", "--dense", str(places.dense), "--pruned", str(places.pruned)]
    inputs = [places.dense / ARTIFACT_FILE, places.pruned / ARTIFACT_FILE]
    inputs += [asked.against] if asked.against else []
    inputs += source_files(asked.prompts) if asked.prompts else []
    return Stage(
        "loadtest",
        (*arguments, *flags_of(asked), "--out", str(out)),
        inputs=tuple(inputs),
        outputs=(out,),
        schema=LOAD_TEST_SCHEMA,
        verdicts=True,
        redrawn=tuple(out / name for name in REPORTS),
        facts=partial(measured_facts, out),
    )


def _model_arguments(recipe: Recipe) -> list[str]:
    options = {"gguf_file": recipe.gguf_file, "allow_pickle": recipe.allow_pickle}
    return ["--model", recipe.model, *as_flags(options)]


def _model_files(recipe: Recipe) -> Path:
    return Path(recipe.model, recipe.gguf_file or "")


def _exported_in(formats: list[str], recipe: Recipe) -> ExportOptions:
    others = recipe.export.model_dump(exclude_unset=True, exclude={"formats"})
    return ExportOptions(formats=formats, **others)


def require_inputs(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises UserError for what a late stage would not find, before the first one has taken its
    hours."""
    if recipe.heal is not None:
        require_trackers(recipe.heal.track)
    model = _model_files(recipe)  # open_checkpoint looks for it, and it may be on the hub
    written: list[Path] = []
    for stage in stages:
        for path in stage.inputs:
            if path != model and not is_within(path, written) and not path.exists():
                raise UserError(f"{path}, which the recipe names, does not exist; check the path.")
        written += stage.outputs


def require_schedule(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises UserError if a model with this config would be healed without more layers than are
    removed."""
    schedule = recipe.heal.schedule if recipe.heal is not None else []
    remove = layers_to_remove(config, recipe.prune.remove, recipe.prune.ratio)
    if schedule and schedule[-1] >= remove:
        raise UserError(
            f"heal.schedule heals without {schedule[-1]} layers, and {remove} are removed in all; "
            "name lower counts, for behind the last removal the model is healed anyway."
        )


def require_formats(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raises UserError for what cannot be exported of a model with this config."""
    for name in recipe.export.formats:
        choose_storage(name, recipe.export, config)


def require_evaluation(recipe: Recipe) -> None:
    """Raises UserError for what cannot be evaluated anywhere, or not on this machine."""
    asked = recipe.eval
    resolve_device(asked.device)
    if asked.dtype != "auto":
        weights_dtype(asked.dtype)
    require_tasks(expand_names(asked.tasks))
