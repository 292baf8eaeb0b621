"""The model card (README.md) of an artifact, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from export.comparison import LogitComparison
from export.formats import FORMATS
from export.integrity import ArtifactRecord
from export.writers import JUDGING_SAMPLES
from gradmap.common.quoting import markdown
from gradmap.evaluation.table import with_error
from gradmap.model.sublayers import Pair
from gradmap.pruning.plan import Plan

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def render_card(plan: Plan | None, record: ArtifactRecord, quality: dict[str, Any]) -> str:
    """Renders the card from the plan (None for a dense model), gradmap.json, and what was
    evaluated.

    quality: what `export.artifact.read_quality` found, or empty.
    """
    sections = [f"---\n{_metadata(record, quality)}\n---", f"# {markdown(record.name)}"]
    if plan is None:
        sections.append(
            f"The unpruned weights of {markdown(record.base_model.name)} in {record.dtype} "
            "precision."
        )
    else:
        sections.append(_describe_pruning(plan))
    if record.calibration is not None:
        sections.append(_describe_calibration(record))
    if quality:
        sections.append(_describe_quality(quality))
    sections.append(
        "Before it was released, the directory was run in a fresh process and compared with the "
        "reference:"
    )
    sections.append("\n".join(_describe_check(check) for check in record.verification.values()))
    sections.append(FORMATS[record.format].use)
    sections.append(
        "`gradmap.json` lists the SHA-256 of every file, and `gradmap.probe` holds the highest "
        "logits of a few texts: `gradmap verify DIRECTORY` checks both. Nothing here needs "
        "gradmap, or remote code, to run."
    )
    return "\n\n".join(sections) + "\n"


def _metadata(record: ArtifactRecord, quality: dict[str, Any]) -> str:
    base = record.base_model.name
    card = ModelCardData(
        license=record.base_model.license,
        base_model=base if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        library_name=FORMATS[record.format].library,
        pipeline_tag="text-generation",
        tags=["gradmap"] if record.plan is None else ["gradmap", "pruned", "layer-pruning"],
        model_name=record.name,
        eval_results=_eval_results(quality) or None,
    )
    return str(card.to_yaml())


def _eval_results(quality: dict[str, Any]) -> list[EvalResult]:
    if not quality:
        return []
    segments = f"perplexity of {quality['segment']}-token segments"
    results = []
    for name, estimate in quality["perplexity"].items():
        value = round(estimate["value"], 3)
        results.append(_eval_result(name, "perplexity", segments, value))
    for name, estimate in quality["accuracy"].items():
        metric, value = estimate["metric"], round(100 * estimate["value"], 2)
        results.append(_eval_result(name, metric, f"{metric}, {quality['asked'][name]}, %", value))
    return results


def _eval_result(dataset: str, metric: str, metric_name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=value,
    )


def _describe_pruning(plan: Plan) -> str:
    base, calibration = plan.base_model, plan.calibration
    lines = [
        f"Pruned from {markdown(base.name)} with gradmap: {len(plan.kept_layers)} of "
        f"{base.layers} layers are left.",
        "- removed layers (original indices, in order of removal): "
        f"{', '.join(map(_named, plan.removal_order))}",
        f"- calibration: {calibration.samples} x {calibration.tokens} tokens of "
        f"{markdown(calibration.source)}, seed {calibration.seed}",
    ]
    lines += [f"- {group.describe()}" for group in plan.correction_groups if group.accepted]
    return "\n".join([lines[0], "", *lines[1:]])


def _describe_calibration(record: ArtifactRecord) -> str:
    texts = record.calibration
    assert texts is not None
    looked_at = texts.samples - JUDGING_SAMPLES
    return (
        f"The weights were quantised to {record.quantise} on {looked_at} samples of "
        f"{markdown(texts.source)}, {texts.tokens} tokens each, and compared below on the others."
    )


def _named(removed: Pair) -> str:
    if removed.is_layer:
        return str(removed)
    return f"{removed} ({removed.first.words} and {removed.second.words})"


def _describe_quality(quality: dict[str, Any]) -> str:
    segments = f"perplexity of {quality['segment']}-token segments"
    rows = ["| evaluated on | value ± standard error |", "|---|---:|"]
    for name, estimate in quality["perplexity"].items():
        rows.append(f"| {markdown(name)}, {segments} | {with_error(estimate, 1, 1)} |")
    for name, estimate in quality["accuracy"].items():
        task = f"{markdown(name)}, {estimate['metric']}, {quality['asked'][name]}"
        rows.append(f"| {task} | {with_error(estimate, 100, 1)} % |")
    return "\n".join(rows)


def _describe_check(check: LogitComparison) -> str:
    bound = (
        f"tolerance {check.tolerance:.2g}"
        if check.tolerance is not None
        else f"quantised; at least {check.min_agreement:.0%} of positions must agree"
    )
    others = f" without the worst {check.stray_share:.0%} of positions" if check.stray_share else ""
    same = f"the most likely token is the same at {check.argmax_agreement:.1%} of positions"
    if check.min_agreement is not None and check.divergence is not None:
        same += f" (KL {check.divergence:.4f} nats per token)"
    if check.min_agreement is not None and check.perplexity_ratio is not None:
        same += f", perplexity is {check.perplexity_ratio:.3f} times the reference's"
    return (
        f"- {check.runtime}: logits differ by {check.typical_difference:.2g} "
        f"(root mean square{others}, relative; {bound}), {same}, "
        f"{check.greedy_identical} of {check.greedy_tokens} generated tokens are the same"
    )
