"""`gradmap loadtest`, `gradmap run`, and `gradmap doctor`, which knows what every stage takes.

A verdict is an exit code: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 4 INVALID.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmap.common.arguments import GgufOption, JsonOption
from gradmap.common.console import (
    heartbeat,
    importing,
    print_json_line,
    print_table,
    so_far,
    waiting,
)
from gradmap.common.errors import UserError
from gradmap.common.options import takes
from gradmap.common.quoting import visible
from gradmap.common.verdict import EXIT_CODES, Verdict
from loadtest.options import DENSE, PRUNED, LoadTestOptions

if TYPE_CHECKING:
    from loadtest.pipeline.result import Result

AgainstOption = Annotated[
    Path | None,
    typer.Option(help="report.json of an earlier test: FAIL where a speed-up is surely lower now."),
]
ParquetOption = Annotated[
    bool, typer.Option("--parquet", help="Write the raw records as Parquet too.")
]
ESTIMATED = "estimated within a factor of two"
DEFAULT_WORK = (
    "This is for 128 x 128 tokens of calibration, 100 documents of each of the paper's tasks, 100 "
    "segments of a text, formats hf and vllm, and a full load test; `gradmap run RECIPE "
    "--dry-run` estimates a recipe."
)
ESTIMATE_COLUMNS = ("minutes", "memory (GB)", "available (GB)")


@heartbeat(so_far("gradmap loadtest"))
@takes(LoadTestOptions)
def loadtest(
    options: LoadTestOptions,
    dense: Annotated[
        str,
        typer.Option(help="The unpruned model: a vLLM-ready directory, or the URL of a server."),
    ],
    out: Annotated[
        Path, typer.Option(help="Directory for records.jsonl, blocks.jsonl and report.json.")
    ],
    pruned: Annotated[
        str | None,
        typer.Option(help="The pruned model: a vLLM-ready directory, or the URL of a server."),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TARGET: one more model to compare; may be given several times."),
    ] = None,
    dense_model: Annotated[
        str | None, typer.Option(help="Name of the unpruned model, at a URL that serves several.")
    ] = None,
    pruned_model: Annotated[
        str | None, typer.Option(help="Name of the pruned model, at a URL that serves several.")
    ] = None,
    candidate_model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL: the same of a --candidate; may be given several times."),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Token ids the models know; needed for URLs only.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its directory; needed for --prompts with URLs only.")
    ] = None,
    parquet: ParquetOption = False,
    json_line: JsonOption = False,
) -> int:
    """Drive dense and pruned with the same requests and say whether the pruned model is faster."""
    with importing():
        from loadtest.conclusions import SpeedGate
        from loadtest.outcome import read_report, run_load_test
        from loadtest.records import read_measurements, write_parquet
        from loadtest.settings import LoadTestSettings

    settings = LoadTestSettings.of(
        options,
        dense,
        _given({PRUNED: pruned}) | _parse_named("--candidate", candidate),
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        models=_given({DENSE: dense_model, PRUNED: pruned_model})
        | _parse_named("--candidate-model", candidate_model),
    )
    earlier = read_report(options.against) if options.against else None
    gate = SpeedGate(options.require_speedup, earlier)
    result = run_load_test(settings, gate, out)
    if parquet:
        write_parquet(out, read_measurements(out))
    return _finish(result, json_line)


@heartbeat(so_far("gradmap report"))
def report(
    directory: Annotated[
        Path, typer.Argument(help="The directory of a load test, or of a recipe's run.")
    ],
    require_speedup: Annotated[
        float | None,
        typer.Option(
            help="TPOT speed-up that the verdict asks for; default: what was asked before."
        ),
    ] = None,
    against: AgainstOption = None,
    parquet: ParquetOption = False,
    json_line: JsonOption = False,
) -> int:
    """Compute the report and verdict of a load test, or of a recipe's run, anew from its raw
    records."""
    with importing():
        from loadtest.outcome import read_report, report_again
        from loadtest.pipeline.run import is_run, run_report_again
        from loadtest.pipeline.stages import Places
        from loadtest.records import read_measurements, write_parquet

    earlier = read_report(against) if against else None
    of_run = is_run(directory)
    measured = Places(directory).load_test if of_run else directory
    if of_run:
        code = _finish_run(run_report_again(directory, require_speedup, earlier), json_line)
    else:
        code = _finish(report_again(directory, require_speedup, earlier), json_line)
    if parquet:
        write_parquet(measured, read_measurements(measured))
    return code


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Result directory; default out/RECIPE.")] = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="Run this stage and all later ones again.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every stage again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would run, and how long it would take.")
    ] = False,
    json_line: JsonOption = False,
) -> int:
    """Prune, evaluate, export, load-test and report, as a recipe says; finished stages are not
    repeated."""
    with importing():
        from loadtest.pipeline.run import plan_run, planned_rows, run_recipe

    out = out or Path("out", recipe.stem)
    if dry_run:
        with waiting("Measuring this machine"):
            planned = plan_run(recipe, out, from_stage, fresh)
        print_table(
            f"What would run, {ESTIMATED}", ("stage", "", *ESTIMATE_COLUMNS), planned_rows(planned)
        )
        if json_line:
            print_json_line({"stages": [asdict(stage) for stage in planned]})
        return 0
    return _finish_run(run_recipe(recipe, out, from_stage, fresh), json_line)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Estimate each stage for this model: a directory, or a hub id."
        ),
    ] = None,
    gguf_file: GgufOption = None,
    remove: Annotated[int | None, typer.Option(help="How many layers to remove.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Which share of the layers to remove, such as 0.25.")
    ] = None,
    json_line: JsonOption = False,
) -> None:
    """Say what this machine can do, and how long each stage would take with a model."""
    with importing():
        from gradmap.costs.doctor import examine_machine, machine_rows
        from gradmap.model.checkpoint import read_config
        from loadtest.pipeline.estimates import (
            Speeds,
            default_recipe,
            estimate_rows,
            estimate_stages,
            misfits,
        )

    if model is None and (gguf_file, remove, ratio) != (None, None, None):
        raise UserError("--gguf-file, --remove and --ratio are of a model; give --model.")
    config = None if model is None else read_config(model, gguf_file)
    with waiting("Measuring this machine"):
        machine = examine_machine()
    print_table("This machine", ("", ""), machine_rows(machine))
    result: dict[str, Any] = {"machine": asdict(machine)}
    if model is not None and config is not None:
        with waiting("Measuring how fast it runs the model"):
            estimates = estimate_stages(
                default_recipe(model, gguf_file, remove, ratio), Speeds(config, machine.disk)
            )
        print_table(f"{model}, {ESTIMATED}", ("stage", *ESTIMATE_COLUMNS), estimate_rows(estimates))
        print(DEFAULT_WORK)
        for misfit in misfits(estimates):
            print(misfit)
        result["stages"] = {name: asdict(estimate) for name, estimate in estimates.items()}
    if json_line:
        print_json_line(result)


def _given(options: dict[str, str | None]) -> dict[str, str]:
    """Without what was not given."""
    return {name: value for name, value in options.items() if value}


def _parse_named(option: str, texts: list[str] | None) -> dict[str, str]:
    """What was given as NAME=VALUE, by name. Raises UserError."""
    named: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not value or name in named or name in (DENSE, PRUNED):
            raise UserError(
                f"{option} {text} is not NAME=VALUE with a name of its own (not {DENSE} or "
                f"{PRUNED})."
            )
        named[name] = value
    return named


def _finish(report: dict[str, Any], json_line: bool) -> int:
    """Prints the report; returns the exit code of its verdict."""
    _print_report(report)
    if json_line:
        print_json_line(report)
    return EXIT_CODES[Verdict(report["verdict"])]


def _finish_run(result: Result, json_line: bool) -> int:
    """Returns the exit code of a recipe's verdict."""
    if json_line:
        print_json_line(result.model_dump(mode="json"))
    return EXIT_CODES[result.verdict]


def _print_report(report: dict[str, Any]) -> None:
    from loadtest.table import load_rows, noise_line, speed_up_lines

    print_table("Load test", ("", *report["arms"]), load_rows(report))
    for line in [*speed_up_lines(report), noise_line(report)]:
        if line:
            print(visible(line[0].upper() + line[1:]))
    for arm, compared in report["candidates"].items():
        print(visible(f"Verdict on {arm}: {compared['verdict']}: {compared['reason']}"))
