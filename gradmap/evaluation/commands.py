"""`gradmap eval`. Heavy imports wait until the command runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.common.arguments import AllowPickleOption, GgufOption, JsonOption
from gradmap.common.console import heartbeat, importing, print_json_line, print_table, so_far
from gradmap.common.errors import UserError
from gradmap.common.options import takes
from gradmap.evaluation.options import EvalOptions, QualityOptions


@heartbeat(so_far("gradmap eval"))
@takes(EvalOptions, QualityOptions)
def evaluate(
    options: EvalOptions,
    quality: QualityOptions,
    model: Annotated[
        str,
        typer.Option("--model", help="The dense model: a directory, a hub id, or a server's URL."),
    ],
    out: Annotated[
        Path, typer.Option(help="The JSON file to write; the raw records go beside it.")
    ],
    gguf_file: GgufOption = None,
    allow_pickle: AllowPickleOption = False,
    plan: Annotated[
        Path | None, typer.Option(help="Also evaluate the model pruned by this plan.")
    ] = None,
    pruned: Annotated[
        str | None,
        typer.Option(
            help="Also evaluate this pruned model: a directory, or a server's URL (of which "
            "overlaps with its calibration are not known)."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="transformers, vllm, onnxruntime, endpoint; auto goes by what --model is."
        ),
    ] = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the tokenizer; needed for a URL.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Score again what was scored before.")
    ] = False,
    json_line: JsonOption = False,
) -> int:
    """Measure perplexity, accuracy and answers of a model, and of the same model pruned; compare,
    and judge."""
    with importing():
        from gradmap.common.verdict import EXIT_CODES
        from gradmap.evaluation.evaluate import evaluate as measure
        from gradmap.evaluation.evaluated_models import Where, find_models

    models = find_models(
        model, gguf_file, allow_pickle, plan, pruned, Where(backend, options.dtype, options.device)
    )
    tokenizer = tokenizer or models[0].tokenizer
    if tokenizer is None:
        raise UserError("A server has no tokenizer to be read; give --tokenizer DIR.")
    evaluation = measure(
        models,
        tokenizer,
        options,
        out,
        gate=quality,
        fresh=fresh,
        plan=plan,
        pruned=pruned,
    )
    result = evaluation.contents()
    _print_result(result)
    if json_line:
        print_json_line(result)
    return 0 if evaluation.quality is None else EXIT_CODES[evaluation.quality.verdict]


def _print_result(result: dict[str, Any]) -> None:
    from gradmap.evaluation.table import describe_retained, tabulate

    table = tabulate(result)
    print_table("Evaluation", table.columns, table.rows)
    if retained := describe_retained(result):
        print(retained)
    if result["quality"]:
        print(f"Verdict: {result['quality']['verdict']}: {result['quality']['reason']}")
