"""Options that say the same for several commands."""

from __future__ import annotations

from typing import Annotated

import typer

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
ResumeOption = Annotated[
    bool | None,
    typer.Option(
        "--resume/--fresh",
        help="Insist on going on with an interrupted run, or on starting over.",
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
