"""The whole job, from a checkpoint to a report: seconds and memory of each stage, and what came
out.

    python -m benchmarks.end_to_end [--recipe recipes/smollm2.yaml] [--directory out/demo]

Runs the recipe; stages that were done before with the same inputs are not repeated, and count as
they did then.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from gradmap.common.console import print_table
from gradmap.common.files import write_json
from gradmap.common.stages import stage_record
from gradmap.common.verdict import EXIT_CODES
from loadtest.pipeline.result import read_result


def main(
    recipe: Path = Path("recipes/smollm2.yaml"),
    directory: Path = Path("out/demo"),
    out: Path = Path("out/benchmark/end_to_end.json"),
) -> None:
    command = [sys.executable, "-m", "gradmap", "run", str(recipe), "--out", str(directory)]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code not in EXIT_CODES.values():
        raise typer.Exit(code)
    result = read_result(directory).model_dump(mode="json")
    stages = {name: stage_record(directory, name) for name in result["timings_s"]}
    write_json(out, {"environment": result["environment"], "stages": stages, "result": result})
    rows = [
        (name, f"{stage['seconds']:.0f}", f"{stage['peak_bytes'] / 1e9:.1f}")
        for name, stage in stages.items()
    ]
    all_s = sum(stage["seconds"] for stage in stages.values())
    rows.append(("all", f"{all_s:.0f}", ""))
    print_table("gradmap run", ("stage", "seconds", "peak (GB)"), rows)
    layers = f"{result['dense']['layers']} -> {result['pruned']['layers']}"
    ratios = [
        (f"perplexity, {text}", ratio)
        for text, ratio in result["comparison"]["perplexity_ratio"].items()
    ]
    speed_ups = [
        (f"{metric} speed-up", ratio) for metric, ratio in result["loadtest"]["speedup"].items()
    ]
    measured = [
        (name, f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        for name, ratio in (*ratios, *speed_ups)
    ]
    print_table("Pruned against dense (95% interval)", ("", ""), [("layers", layers), *measured])


if __name__ == "__main__":
    typer.run(main)
