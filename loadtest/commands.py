"""`gradmap loadtest` and `gradmap run`. A verdict is an exit code: 0 PASS, 1 FAIL, 3 INCONCLUSIVE, 4 INVALID."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.commands import JsonOption
from gradmap.console import print_json_line, print_table

QUICK_PAIRS = 3


def loadtest(
    dense: Annotated[str, typer.Option(help="The unpruned model: a vLLM-ready directory, or the URL of a server.")],
    pruned: Annotated[str, typer.Option(help="The pruned model: a vLLM-ready directory, or the URL of a server.")],
    out: Annotated[Path, typer.Option(help="Directory for records.jsonl and report.json.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="3 pairs, one server start per model; cannot end in PASS.")
    ] = False,
    require_speedup: Annotated[float, typer.Option(help="TPOT speed-up that the verdict asks for.")] = 1.0,
    pairs: Annotated[int | None, typer.Option(help="Pairs of dense and pruned blocks (6, with --quick 3).")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(help="Requests in flight; may be given several times (1 and 8).")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per block and concurrency, at least.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random token ids per prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 64,
    seed: Annotated[int, typer.Option(help="Draws the prompts and the order of the blocks.")] = 0,
    vocabulary: Annotated[int | None, typer.Option(help="Token ids the models know; needed for two URLs.")] = None,
    vllm_flag: Annotated[
        list[str] | None, typer.Option(help="A flag for vLLM, as --vllm-flag=--enforce-eager.")
    ] = None,
    json_line: JsonOption = False,
) -> int:
    """Drive dense and pruned with the same requests and say whether the pruned model is faster."""
    from gradmap.verdict import EXIT_CODES, Verdict
    from loadtest.outcome import run_load_test
    from loadtest.session import LoadTestSettings

    settings = LoadTestSettings(
        dense=dense,
        pruned=pruned,
        pairs=pairs if pairs is not None else QUICK_PAIRS if quick else 6,
        interleaved=not quick,
        concurrency=tuple(sorted(set(concurrency or (1, 8)))),
        requests_per_block=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
        vocabulary=vocabulary,
        vllm_flags=tuple(vllm_flag or ()),
    )
    report = run_load_test(settings, require_speedup, out)
    _print_report(report)
    if json_line:
        print_json_line(report)
    return EXIT_CODES[Verdict(report["verdict"])]


def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Result directory; default out/RECIPE.")] = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="Run this stage and all later ones again.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every stage again.")] = False,
    json_line: JsonOption = False,
) -> int:
    """Prune, evaluate, export, load-test and report, as a recipe says; finished stages are not repeated."""
    from gradmap.verdict import EXIT_CODES, Verdict
    from loadtest.pipeline import run_recipe

    result = run_recipe(recipe, out or Path("out", recipe.stem), from_stage, fresh)
    if json_line:
        print_json_line(result)
    return EXIT_CODES[Verdict(result["verdict"])]


def _print_report(report: dict[str, Any]) -> None:
    rows = []
    for level, dense in report["arms"]["dense"].items():
        pruned = report["arms"]["pruned"][level]
        for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s"):
            if dense[name] and pruned[name]:
                times = [summary[name]["median"] * 1000 for summary in (dense, pruned)]
                rows.append((f"{level}: {name[:-2].upper()} median (ms)", *(f"{time:.2f}" for time in times)))
        if dense["output_throughput"] and pruned["output_throughput"]:
            rates = [summary["output_throughput"] for summary in (dense, pruned)]
            rows.append((f"{level}: output tokens/s", *(f"{rate:.1f}" for rate in rates)))
    print_table("Load test", ("", "dense", "pruned"), rows)
    for metric, value in report["speedup"].items():
        spread = "" if value["low"] is None else f" (95% interval {value['low']:.2f}-{value['high']:.2f})"
        print(f"Speed-up, {metric}: {value['value']:.2f}x{spread}")
    print(f"Verdict: {report['verdict']}: {report['reason']}")
