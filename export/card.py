"""The model card (README.md) of an artifact, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gradmap.plan import Plan

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
USE = {
    "hf": "A stock checkpoint: `AutoModelForCausalLM.from_pretrained(DIRECTORY)`.",
    "vllm": "A stock checkpoint, ready to be served: `vllm serve DIRECTORY --config DIRECTORY/vllm.yaml`.",
    "onnx": "ONNX with optimum's names: `ORTModelForCausalLM.from_pretrained(DIRECTORY)`, or any ONNX Runtime session.",
    "onnx-genai": "ONNX for onnxruntime-genai: `onnxruntime_genai.Model(DIRECTORY)`.",
    "gguf": "One file for llama.cpp and what builds on it: `llama-server -m DIRECTORY/model.gguf`.",
}
LIBRARIES = {"hf": "transformers", "vllm": "transformers", "onnx": "onnx", "onnx-genai": "onnx", "gguf": "gguf"}


def render_card(plan: Plan | None, record: dict[str, Any], quality: dict[str, Any]) -> str:
    """Renders the card from the plan (None for a dense model), the contents of gradmap.json, and what was evaluated.

    quality: `{"perplexity": {NAME: {"value": …, "stderr": …}}}`, or empty.
    """
    sections = [f"---\n{_metadata(record, quality)}\n---", f"# {record['name']}"]
    if plan is None:
        sections.append(f"The unpruned weights of {record['base_model']['name']} in {record['dtype']} precision.")
    else:
        sections.append(_describe_pruning(plan))
    if quality.get("perplexity"):
        sections.append(_describe_quality(quality["perplexity"]))
    sections.append("Before it was released, the directory was run in a fresh process and compared with the reference:")
    sections.append("\n".join(_describe_check(check) for check in record["verification"].values()))
    sections.append(USE[record["format"]])
    sections.append(
        "`gradmap.json` lists the SHA-256 of every file, and `gradmap.probe` holds the highest logits of a few "
        "texts: `gradmap verify DIRECTORY` checks both. Nothing here needs gradmap, or remote code, to run."
    )
    return "\n\n".join(sections) + "\n"


def _metadata(record: dict[str, Any], quality: dict[str, Any]) -> str:
    hub_id = record["base_model"]["name"]
    card = ModelCardData(
        base_model=hub_id if HUB_ID.fullmatch(hub_id) else None,
        library_name=LIBRARIES[record["format"]],
        pipeline_tag="text-generation",
        tags=["gradmap"] if record["plan"] is None else ["gradmap", "pruned", "layer-pruning"],
        model_name=record["name"],
        eval_results=_eval_results(quality) or None,
    )
    return str(card.to_yaml())


def _eval_results(quality: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type="perplexity",
            metric_name="perplexity of 128-token segments",
            metric_value=round(estimate["value"], 3),
        )
        for name, estimate in quality.get("perplexity", {}).items()
    ]


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


def _describe_quality(perplexities: dict[str, Any]) -> str:
    rows = [f"| {name} | {value['value']:.1f} ± {value['stderr']:.1f} |" for name, value in perplexities.items()]
    return "\n".join(["| text | perplexity ± standard error |", "|---|---:|", *rows])


def _describe_check(check: dict[str, Any]) -> str:
    bound = (
        f"tolerance {check['tolerance']:.2g}"
        if check["tolerance"] is not None
        else f"quantised; at least {check['min_agreement']:.0%} of positions must agree"
    )
    return (
        f"- {check['runtime']}: logits differ by {check['relative_difference']:.2g} (root mean square, relative; "
        f"{bound}), "
        f"the most likely token is the same at {check['argmax_agreement']:.1%} of positions, "
        f"{check['greedy_identical']} of {check['greedy_tokens']} generated tokens are the same"
    )
