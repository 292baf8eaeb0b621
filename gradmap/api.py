"""What `gradmap prune`, `heal` and `eval` do, as functions: the options are the commands'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmap.common.options import checked_options
from gradmap.evaluation.evaluate import evaluate as evaluate_models
from gradmap.evaluation.evaluated_models import Where, checkpoint_models
from gradmap.evaluation.options import EvalOptions
from gradmap.evaluation.result import Evaluation
from gradmap.healing.heal import heal as heal_plan
from gradmap.healing.options import HealOptions
from gradmap.model.checkpoint import Checkpoint
from gradmap.pruning.from_plan import prune_as_asked
from gradmap.pruning.plan import Plan
from gradmap.pruning.plan import load_plan as read_plan
from gradmap.pruning.settings import PruneOptions


def prune(
    checkpoint: Checkpoint, out: Path | str, *, from_plan: Path | str | None = None, **options: Any
) -> Plan:
    """Chooses which layers go, repairs the rest, and writes the plan directory `out`.

    from_plan: a plan to begin with (gradmap.pruning.from_plan). options: fields of
    gradmap.pruning.settings.PruneOptions, such as remove=8 or
    calibration="file:calibration.jsonl". Raises UserError on bad input.
    """
    asked = checked_options(PruneOptions, options)
    known = None if from_plan is None else Path(from_plan)
    return prune_as_asked(checkpoint, asked, Path(out), known)


def heal(checkpoint: Checkpoint, plan: Path | str, out: Path | str, **options: Any) -> Plan:
    """Trains corrections of what a plan leaves on texts, and writes the plan directory `out`.

    options: fields of gradmap.healing.options.HealOptions, such as text=["file:texts.jsonl"] and
    budget_tokens=600_000. Raises UserError on bad input, and where training diverges.
    """
    return heal_plan(checkpoint, Path(plan), checked_options(HealOptions, options), Path(out))


def load_plan(directory: Path | str) -> Plan:
    """What `prune` wrote. Raises UserError if that is missing, damaged or of another version."""
    return read_plan(Path(directory))


def evaluate(
    checkpoint: Checkpoint, out: Path | str, *, plan: Path | str | None = None, **options: Any
) -> Evaluation:
    """Measures the model and, with a plan, the same model pruned; writes `out` (JSON) and the raw
    records beside it.

    options: fields of gradmap.evaluation.options.EvalOptions, such as
    perplexity={"wiki": "file:test.txt"}. Raises UserError on bad input.
    """
    asked = checked_options(EvalOptions, options)
    directory = None if plan is None else Path(plan)
    where = Where("transformers", asked.dtype, asked.device)
    models = checkpoint_models(checkpoint, directory, where)
    return evaluate_models(models, checkpoint.directory, asked, Path(out), plan=directory)
