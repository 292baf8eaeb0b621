"""`gradmap prune`, and options that several commands share. Heavy imports wait until a command
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmap.common.console import heartbeat, importing, print_json_line, print_table, so_far
from gradmap.common.options import takes
from gradmap.compare.options import CompareOptions
from gradmap.pruning.settings import PruneOptions

ModelOption = Annotated[
    str, typer.Option("--model", help="Model directory, or hub id such as org/name.")
]
GgufOption = Annotated[
    str | None, typer.Option(help="A GGUF file inside the model directory; it is dequantised.")
]
AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Convert legacy .bin weights to safetensors, with torch's safe reader.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="auto, float32, float64, bfloat16, float16, or autocast (only products in bfloat16)."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, or spread (over all GPUs).")]


@heartbeat(so_far("gradmap prune"))
@takes(PruneOptions)
def prune(
    options: PruneOptions,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The plan directory to write.")],
    gguf_file: GgufOption = None,
    allow_pickle: AllowPickleOption = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--fresh",
            help="Insist on going on with an interrupted run, or on starting over.",
        ),
    ] = None,
    from_plan: Annotated[
        Path | None,
        typer.Option(
            help="Take the order of removals from this plan, which removes as many or more."
        ),
    ] = None,
    json_line: JsonOption = False,
) -> None:
    """Choose which layers to remove, compute the corrections, and write a plan."""
    with importing():
        from gradmap.model.checkpoint import open_checkpoint
        from gradmap.pruning.presets import settle
        from gradmap.pruning.prune import prune as make_plan
        from gradmap.pruning.prune import prune_less, summarise

    checkpoint = open_checkpoint(model, gguf_file, allow_pickle)
    settings = settle(options, checkpoint.config, from_plan)
    if from_plan is None:
        plan = make_plan(checkpoint, settings, out, resume)
    else:
        plan = prune_less(checkpoint, from_plan, settings, out)
    print_table(f"Plan {out}", ("", "value"), summarise(plan))
    if json_line:
        print_json_line(
            {"plan": str(out), "removal_order": plan.removal_order, "timings_s": plan.timings_s}
        )


@takes(CompareOptions)
def compare(
    options: CompareOptions,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The directory of the results.")],
    gguf_file: GgufOption = None,
    json_line: JsonOption = False,
) -> None:
    """Compare methods at several removal counts, with the same calibration and the same
    evaluation."""
    with importing():
        from gradmap.compare.run import compare_methods, settings_of, table_rows

    result = compare_methods(settings_of(options, model, gguf_file), out)
    texts = tuple(f"perplexity, {text}" for text in result["dense"]["perplexity"])
    costs = ("average accuracy (%)", "select (s)", "repair (s)", "peak (GB)")
    print_table("Comparison", ("method", "removed", *texts, *costs), table_rows(result))
    if json_line:
        print_json_line({"out": str(out), "rows": result["rows"]})
