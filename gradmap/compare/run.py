"""`gradmap compare`: methods x removal counts x calibration seeds, under one calibration and one
evaluation.

Every selection, every repair and every evaluation is a stage of its own (gradmap.common.stages):
done once, kept, and gone on with after a crash. One selection of the most layers serves every
smaller count and every compensator; a selector whose choices are not nested is asked once for each
count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json, write_text
from gradmap.common.flags import as_flags
from gradmap.common.outputs import results_in
from gradmap.common.stages import Stage, run_stage, stage_record
from gradmap.compare.methods import (
    OF_COMPENSATORS,
    OF_SELECTORS,
    Method,
    is_nested,
    parse_methods,
    split_variant,
)
from gradmap.compare.options import CompareOptions
from gradmap.data.text_specs import source_files
from gradmap.evaluation.options import EvaluatedOn
from gradmap.evaluation.result import SCHEMA_VERSION as EVALUATION_SCHEMA
from gradmap.evaluation.result import read_evaluation, records_beside
from gradmap.evaluation.table import with_error
from gradmap.pruning.plan import SCHEMA_VERSION as PLAN_SCHEMA
from gradmap.pruning.plan import Plan, load_plan
from gradmap.pruning.settings import CalibrationOptions

RESULT_FILE = "compare.json"
# Of the table, behind one column for each text.
LAST_COLUMNS = (
    "average accuracy (%)",
    "agreement (%)",
    "select (s)",
    "repair (s)",
    "peak (GB)",
)


@dataclass(frozen=True)
class CompareSettings:
    """What to compare. evaluation: options of `gradmap eval`, calibration: of `gradmap prune`, by
    name."""

    model: dict[str, Any]
    methods: tuple[Method, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]


def settings_of(options: CompareOptions, model: str, gguf_file: str | None) -> CompareSettings:
    """The comparison that these options ask for. Raises UserError for an unknown method."""
    calibration = options.model_dump(include=set(CalibrationOptions.model_fields))
    evaluation = options.model_dump(include=set(EvaluatedOn.model_fields))
    return CompareSettings(
        model={"model": model, "gguf_file": gguf_file},
        methods=parse_methods(options.methods),
        counts=tuple(sorted(set(options.remove))),
        seeds=tuple(options.seeds),
        calibration=calibration | {"dtype": options.dtype, "device": options.device},
        evaluation=evaluation | {"dtype": options.eval_dtype, "device": options.device},
    )


def plan_selections(settings: CompareSettings, out: Path) -> Iterator[Stage]:
    """The stages that select layers: one for each selector and seed, of as many layers as any count
    asks for; for each count, too, where choices are not nested."""
    selections = dict.fromkeys(
        (method.selection, selected_count(settings, method, count))
        for method, count in product(settings.methods, settings.counts)
    )
    for (selection, count), seed in product(selections, settings.seeds):
        name, variant = split_variant(selection, OF_SELECTORS)
        options = {
            "selector": name,
            "unit": "layer",
            **variant,
            "compensator": "none",
            "seed": seed,
        }
        directory = _selection(out, selection, count, seed)
        flags = as_flags(
            {**settings.model, **settings.calibration, **options, "remove": count, "out": directory}
        )
        yield Stage(
            directory.name, ("prune", *flags), _inputs(settings), (directory,), schema=PLAN_SCHEMA
        )


def selected_count(settings: CompareSettings, method: Method, count: int) -> int:
    """How many layers are in the selection that serves a method at this count."""
    return max(settings.counts) if is_nested(method.selection) else count


def plan_repairs(settings: CompareSettings, out: Path) -> Iterator[Stage]:
    """The stages that repair: one for each method, count and seed."""
    device = {"device": settings.calibration.get("device")}
    for method, count, seed in product(settings.methods, settings.counts, settings.seeds):
        source = _selection(out, method.selection, selected_count(settings, method, count), seed)
        directory = _plan(out, method, count, seed)
        compensator, variant = split_variant(method.repair, OF_COMPENSATORS)
        options = {
            "from_plan": source,
            "compensator": compensator,
            **variant,
            "remove": count,
            "out": directory,
        }
        flags = as_flags({**settings.model, **device, **options})
        inputs = (source, *_inputs(settings))
        yield Stage(directory.name, ("prune", *flags), inputs, (directory,), schema=PLAN_SCHEMA)


def plan_evaluations(settings: CompareSettings, out: Path) -> Iterator[Stage]:
    """The stages that evaluate: one for each plan."""
    for method, count, seed in product(settings.methods, settings.counts, settings.seeds):
        plan = _plan(out, method, count, seed)
        target = out / "evaluations" / f"{plan.name}.json"
        flags = as_flags({**settings.model, **settings.evaluation, "plan": plan, "out": target})
        inputs, outputs = (plan, *_inputs(settings)), (target, records_beside(target))
        yield Stage(
            f"eval {plan.name}", ("eval", *flags), inputs, outputs, schema=EVALUATION_SCHEMA
        )


def compare_methods(settings: CompareSettings, out: Path) -> dict[str, Any]:
    """Does what is not done yet; writes compare.json, compare.md and perplexity.svg; returns
    compare.json."""
    with results_in(out, RESULT_FILE):
        write_json(out / RESULT_FILE, {"finished": False})
        stages = [
            *plan_selections(settings, out),
            *plan_repairs(settings, out),
            *plan_evaluations(settings, out),
        ]
        for number, stage in enumerate(stages, start=1):
            run_stage(stage, f"[{number}/{len(stages)}]", out, forced=False)
        return _write_result(settings, out)


def _write_result(settings: CompareSettings, out: Path) -> dict[str, Any]:
    from gradmap.compare.figure import draw_perplexities

    rows = [
        describe_row(settings, out, method, count)
        for method, count in product(settings.methods, settings.counts)
    ]
    first = _read_evaluation(out, settings.methods[0], settings.counts[0], settings.seeds[0])
    result = {
        "finished": True,
        "settings": asdict(settings),
        "evaluation_schema_version": EVALUATION_SCHEMA,
        "texts": first["texts"],
        "dense": {
            key: first["dense"][key]
            for key in ("layers", "perplexity", "accuracy", "average_accuracy")
        },
        "rows": rows,
        "environment": describe_environment(),
    }
    write_text(out / "perplexity.svg", draw_perplexities(result))
    write_text(out / "compare.md", to_markdown(result))
    write_json(out / RESULT_FILE, result)
    return result


def describe_row(
    settings: CompareSettings, out: Path, method: Method, count: int
) -> dict[str, Any]:
    """One method at one count: what it removed with each seed, and means over the seeds.

    perplexity, ratio (to dense), average_accuracy, agreement (with the dense model's answers):
    `value`, the mean over seeds; `stderr`, of the evaluation; `spread`, the standard deviation over
    seeds (None with one). select_s: of the selection of the largest count. peak_bytes: of the CPU's
    memory that this selection or the repair had resident; evaluation is left out.
    """
    evaluations = [_read_evaluation(out, method, count, seed) for seed in settings.seeds]
    chosen = selected_count(settings, method, count)
    selections = [_selection(out, method.selection, chosen, seed) for seed in settings.seeds]
    repairs = [_plan(out, method, count, seed) for seed in settings.seeds]
    selected = [load_plan(directory) for directory in selections]
    repaired = [load_plan(directory) for directory in repairs]
    stages = [stage_record(out, directory.name) for directory in (*selections, *repairs)]
    return {
        "method": method.name,
        "removed": count,
        "layers": [[pair.written for pair in plan.removal_order] for plan in repaired],
        **_quality_over_seeds(evaluations),
        **_costs_over_seeds(selected, repaired, stages),
    }


def _quality_over_seeds(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of what was measured. evaluations: the contents of eval.json of each seed."""
    ratios = [evaluation["comparison"]["perplexity_ratio"] for evaluation in evaluations]
    perplexities = [evaluation["pruned"]["perplexity"] for evaluation in evaluations]
    accuracies = [evaluation["pruned"]["average_accuracy"] for evaluation in evaluations]
    followed = [evaluation["comparison"]["answers"] for evaluation in evaluations]
    return {
        "perplexity": _means_by_text(perplexities),
        "ratio": _means_by_text(ratios),
        "average_accuracy": _mean(accuracies) if evaluations[0]["tasks"] else None,
        "agreement": _mean([each["agreement"] for each in followed]) if all(followed) else None,
    }


def _costs_over_seeds(
    selected: Sequence[Plan], repaired: Sequence[Plan], stages: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Seconds and bytes. selected, repaired: the plans of each seed; stages: what their stages
    recorded."""
    return {
        "select_s": statistics.mean(plan.timings_s["select"] for plan in selected),
        "repair_s": statistics.mean(plan.timings_s["compensate"] for plan in repaired),
        "peak_bytes": max(stage["peak_bytes"] for stage in stages),
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The table, for a pull request or a paper."""
    texts = list(result["dense"]["perplexity"])
    dense = [f"{result['dense']['perplexity'][text]['value']:.1f}" for text in texts]
    heading = [
        "method",
        "removed",
        *(f"{text} (dense {value})" for text, value in zip(texts, dense, strict=True)),
    ]
    heading += LAST_COLUMNS
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    lines += [list(cells) for cells in table_rows(result)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each method and count: perplexity ± standard error (x ratio to dense), and what
    it cost."""
    rows = []
    for row in result["rows"]:
        cells = [
            _cell(perplexity, row["ratio"][text]) for text, perplexity in row["perplexity"].items()
        ]
        shares = [row["average_accuracy"], row["agreement"]]
        percents = ["" if share is None else with_error(share, 100, 1) for share in shares]
        costs = (
            f"{row['select_s']:.0f}",
            f"{row['repair_s']:.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        )
        rows.append((row["method"], str(row["removed"]), *cells, *percents, *costs))
    return rows


def _cell(perplexity: dict[str, Any], ratio: dict[str, Any]) -> str:
    over_seeds = "" if ratio["spread"] is None else f" ± {ratio['spread']:.2f} over seeds"
    return f"{with_error(perplexity, 1, 1)} (x {ratio['value']:.2f}{over_seeds})"


def _means_by_text(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """estimates: text -> estimate, of each seed. Returns text -> mean over the seeds."""
    means = {}
    for text in estimates[0]:
        means[text] = _mean([by_text[text] for by_text in estimates])
    return means


def _mean(estimates: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The mean over seeds. stderr: the mean of the estimates' own, where they have one."""
    values = [estimate["value"] for estimate in estimates]
    errors = [estimate["stderr"] for estimate in estimates if estimate.get("stderr") is not None]
    return {
        "value": statistics.mean(values),
        "stderr": statistics.mean(errors) if errors else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def _selection(out: Path, selection: str, count: int, seed: int) -> Path:
    of_count = "" if is_nested(selection) else f"-{count}"
    return out / "selections" / f"{selection}{of_count}-seed-{seed}"


def _plan(out: Path, method: Method, count: int, seed: int) -> Path:
    return out / "plans" / f"{method.name}-{count}-seed-{seed}"


def _evaluation(out: Path, method: Method, count: int, seed: int) -> Path:
    return out / "evaluations" / f"{_plan(out, method, count, seed).name}.json"


def _read_evaluation(out: Path, method: Method, count: int, seed: int) -> dict[str, Any]:
    return read_evaluation(_evaluation(out, method, count, seed), of_two=True).contents()


def _inputs(settings: CompareSettings) -> tuple[Path, ...]:
    model = Path(settings.model["model"], settings.model.get("gguf_file") or "")
    texts = settings.evaluation["perplexity"].values()
    specs = (settings.calibration["calibration"], *texts)
    return (model, *chain.from_iterable(map(source_files, specs)))
