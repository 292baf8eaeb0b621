r"""`gradmap prune --stream` on a model that is larger than the memory it is given: LLaMA-2-7B's
shape, 13.7 GB in bf16.

    python -m benchmarks.streaming --tokenizer DIR --calibration SPEC [--limit-gb 6] \
        [--samples 8] [--remove 2]

Needs root, cgroup v1 or v2 mounted for writing, and 14 GB of disk in --directory. The limit is the
kernel's: the run is killed when it holds more (page cache counts, and can be taken back). Weights
are random, the tokenizer is that of DIR, whose vocabulary the model gets. Prints what prune prints,
and the largest resident size.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.fold import write_random_model
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json

GROUP = "gradmap-streaming"


def main(
    tokenizer: Annotated[Path, typer.Option(help="A model directory with a tokenizer.")],
    calibration: Annotated[str, typer.Option(help="Text source, see gradmap/data/text_specs.py.")],
    directory: Path = Path("out/benchmark"),
    limit_gb: float = 6,
    samples: int = 8,
    remove: int = 2,
    layers: int = 32,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the checkpoint for another run.")
    ] = False,
) -> None:
    source, plan = directory / f"streamed-7b-shape-{layers}", directory / "streamed-plan"
    write_random_model(source, layers, tokenizer)
    group = _limited_group(round(limit_gb * 1e9))
    command = [
        sys.executable,
        "-m",
        "gradmap",
        "prune",
        "--model",
        str(source),
        "--stream",
        "--dtype",
        "bfloat16",
    ]
    command += ["--selector", "gradient", "--compensator", "sequential"]  # what streams
    command += [
        f"--calibration={calibration}",
        f"--samples={samples}",
        f"--remove={remove}",
        f"--out={plan}",
        "--fresh",
    ]
    started = time.perf_counter()
    subprocess.run(
        ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command], check=True
    )
    result = {
        "weights_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "limit_bytes": round(limit_gb * 1e9),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - started, 1),
        "samples": samples,
        "timings_s": read_json(plan / "plan.json")["timings_s"],
        "environment": describe_environment(),
    }
    print(result)
    write_json(directory / "streaming.json", result)
    if not keep:
        shutil.rmtree(source)


def _limited_group(limit_bytes: int) -> Path:
    """A control group whose processes may hold so much memory, swap included."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / GROUP
    group.mkdir(exist_ok=True)
    (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit_bytes))
    return group


if __name__ == "__main__":
    typer.run(main)
