"""The model card (README.md) of an artifact, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from typing import Any

import yaml

from gradmap.plan import Plan

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def render_card(plan: Plan | None, record: dict[str, Any]) -> str:
    """Renders the card from the plan (None for a dense model) and the contents of gradmap.json."""
    sections = [f"---\n{yaml.safe_dump(_metadata(record), sort_keys=False)}---", f"# {record['name']}"]
    if plan is None:
        sections.append(f"The unpruned weights of {record['base_model']['name']} in {record['dtype']} precision.")
    else:
        sections.append(_describe_pruning(plan))
    sections.append(_describe_verification(record["verification"]))
    sections.append(
        "`gradmap.json` lists the SHA-256 of every file. The directory is a stock checkpoint: it loads in "
        "transformers and vLLM without gradmap and without remote code."
    )
    return "\n\n".join(sections) + "\n"


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gradmap"] if record["plan"] is None else ["gradmap", "pruned", "layer-pruning"],
    }
    if HUB_ID.fullmatch(record["base_model"]["name"]):
        metadata["base_model"] = record["base_model"]["name"]
    return metadata


def _describe_pruning(plan: Plan) -> str:
    base, calibration = plan.base_model, plan.calibration
    lines = [
        f"Pruned from {base.name} with GradMAP: {len(plan.kept_layers)} of {base.layers} layers are left.",
        f"- removed layers (original indices, in order of removal): {', '.join(map(str, plan.removal_order))}",
        f"- calibration: {calibration.samples} x {calibration.tokens} tokens of `{calibration.source}`, "
        f"seed {calibration.seed}",
    ]
    for correction in plan.corrections:
        if correction.accepted:
            lines.append(
                f"- the {correction.target} of layer {correction.layer} (original index) carries the projection "
                f"compensation W'; held-out loss {correction.held_out_loss_before:.3f} -> "
                f"{correction.held_out_loss_after:.3f} nats per token"
            )
    return "\n".join([lines[0], "", *lines[1:]])


def _describe_verification(verification: dict[str, Any]) -> str:
    return (
        "Before it was released, the directory was loaded by stock transformers in a fresh process: its logits differ "
        f"from the reference by {verification['relative_difference']:.2g} (root mean square, relative; tolerance "
        f"{verification['tolerance']:.2g}), through the KV cache by {verification['cached_difference']:.2g}; the most "
        f"likely token is the same at {verification['argmax_agreement']:.1%} of positions."
    )
