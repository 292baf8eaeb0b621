"""`gradmap export` and `gradmap verify`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.comparison import MIN_AGREEMENT
from export.options import ExportOptions
from gradmap.common.arguments import AllowPickleOption, GgufOption, JsonOption, ModelOption
from gradmap.common.console import heartbeat, importing, print_json_line, print_table, say, so_far
from gradmap.common.options import takes

if TYPE_CHECKING:
    from export.comparison import LogitComparison
    from export.integrity import ArtifactRecord

# Differences of logits are relative and typical (see LogitComparison); "same" counts most likely
# tokens, "greedy" generated ones before the first other one.
CHECK_COLUMNS = ("difference", "cached", "tolerance", "same", "KL", "perplexity", "greedy")


MinAgreementOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Refuse a quantised model whose best token agrees more rarely."
    ),
]


@heartbeat(so_far("gradmap export"))
@takes(ExportOptions)
def export(
    options: ExportOptions,
    model: ModelOption,
    out: Annotated[
        Path, typer.Option(help="Each format is written to a subdirectory of its name.")
    ],
    plan: Annotated[
        Path | None,
        typer.Option(help="The plan to apply; without one the dense model is exported."),
    ] = None,
    samples_of: Annotated[
        Path | None,
        typer.Option(
            help="Without --plan: a plan of this model, on whose samples quantisation is "
            "calibrated and judged."
        ),
    ] = None,
    gguf_file: GgufOption = None,
    allow_pickle: AllowPickleOption = False,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Results of `gradmap eval` for the model card.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Also upload the artifact to this repository (owner/name); the token is HF_TOKEN."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    json_line: JsonOption = False,
) -> None:
    """Fold a plan into a stock checkpoint, or an ONNX graph, and prove that it is right."""
    with importing():
        from export.artifact import export_artifacts, open_source, read_quality
        from export.hub import check_hub_access, push
        from gradmap.common.errors import UserError
        from gradmap.model.checkpoint import open_checkpoint

    if push_to_hub is not None:
        if len(options.formats) != 1:
            raise UserError(
                "A repository holds one artifact; give one --format with --push-to-hub."
            )
        check_hub_access(push_to_hub)
    source = open_source(open_checkpoint(model, gguf_file, allow_pickle), plan, samples_of)
    quality = {} if evaluation is None else read_quality(evaluation, source)
    records = export_artifacts(source, options, out, quality)
    rows = list(chain.from_iterable(map(_summary_rows, records.values())))
    print_table(f"Exported to {out}", ("", "layers", "parameters", "weights", *CHECK_COLUMNS), rows)
    if push_to_hub is not None:
        say(f"Uploaded: {push(out / options.formats[0], push_to_hub, private=not public)}")
    if json_line:
        print_json_line({name: record.model_dump(mode="json") for name, record in records.items()})


@heartbeat(so_far("gradmap verify"))
def verify(
    directory: Annotated[Path, typer.Argument(help="An artifact, as it was received.")],
    expect_sha256: Annotated[
        str | None,
        typer.Option(
            help="SHA-256 of gradmap.json, as its exporter knows it; the other files' are in it."
        ),
    ] = None,
    min_agreement: MinAgreementOption = MIN_AGREEMENT,
    json_line: JsonOption = False,
) -> None:
    """Check an artifact: every file's hash, and its logits against the probe stored in it."""
    with importing():
        from export.artifact import verify_directory

    result = verify_directory(directory, expect_sha256, min_agreement)
    rows = [(runner, *_check_cells(check)) for runner, check in result.verification.items()]
    print_table(f"{directory} is {result.name}, whole and faithful", ("", *CHECK_COLUMNS), rows)
    if json_line:
        print_json_line(asdict(result))


def _summary_rows(record: ArtifactRecord) -> list[tuple[str, ...]]:
    """One row for every runtime that checked the artifact; what it is stands in the first."""
    stored = f"{record.weight_bytes / 1e6:.0f} MB {record.quantise or record.dtype}"
    facts = (str(record.layers), f"{record.parameters / 1e6:.1f} M", stored)
    rows = []
    for check in record.verification.values():
        rows.append(
            (f"{record.format} in {check.runtime.split()[0]}", *facts, *_check_cells(check))
        )
        facts = ("", "", "")
    return rows


def _check_cells(check: LogitComparison) -> tuple[str, ...]:
    return (
        _number(check.typical_difference),
        _number(check.cached_difference),
        _number(check.tolerance),
        f"{check.argmax_agreement:.1%}",
        _number(check.divergence),
        "-" if check.perplexity_ratio is None else f"x {check.perplexity_ratio:.3f}",
        f"{check.greedy_identical}/{check.greedy_tokens}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
