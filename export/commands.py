"""`gradmap export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.commands import GgufOption, JsonOption, ModelOption
from gradmap.console import print_json_line, print_table


def export(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Each format is written to a subdirectory of its name.")],
    format_names: Annotated[list[str], typer.Option("--format", help="hf or vllm; may be given several times.")],
    plan: Annotated[
        Path | None, typer.Option(help="The plan to apply; without one the dense model is exported.")
    ] = None,
    gguf_file: GgufOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="keep, float32, float16, bfloat16; default: hf keeps, vllm bfloat16.")
    ] = None,
    shard_size_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest size of a weight file, in 10^9 bytes.")
    ] = 5.0,
    json_line: JsonOption = False,
) -> None:
    """Fold a plan into a stock checkpoint and prove that it is right."""
    from export.artifact import export_artifacts, open_source
    from gradmap.checkpoint import open_checkpoint

    source = open_source(open_checkpoint(model, gguf_file), plan)
    records = export_artifacts(source, format_names, out, dtype, int(shard_size_gb * 1e9))
    print_table(f"Exported to {out}", ("", *records), _summary_rows(list(records.values())))
    if json_line:
        print_json_line(records)


def _summary_rows(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    checks = [record["verification"] for record in records]
    return [
        ("layers", *(str(record["layers"]) for record in records)),
        ("parameters", *(f"{record['parameters'] / 1e6:.1f} M" for record in records)),
        ("weights", *(f"{record['weight_bytes'] / 1e6:.0f} MB" for record in records)),
        ("dtype", *(record["dtype"] for record in records)),
        ("logit difference (relative)", *(f"{check['relative_difference']:.1e}" for check in checks)),
        ("… through the KV cache", *(f"{check['cached_difference']:.1e}" for check in checks)),
        ("tolerance", *(f"{check['tolerance']:.1e}" for check in checks)),
        ("same most likely token", *(f"{check['argmax_agreement']:.1%}" for check in checks)),
    ]
