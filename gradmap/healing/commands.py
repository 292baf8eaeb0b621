"""`gradmap heal`. Heavy imports wait until the command runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gradmap.common.arguments import (
    AllowPickleOption,
    GgufOption,
    JsonOption,
    ModelOption,
    ResumeOption,
)
from gradmap.common.console import heartbeat, importing, print_json_line, print_table, so_far
from gradmap.common.options import takes
from gradmap.healing.options import HealOptions


@heartbeat(so_far("gradmap heal"))
@takes(HealOptions)
def heal(
    options: HealOptions,
    model: ModelOption,
    plan: Annotated[Path, typer.Option(help="The plan directory to begin with.")],
    out: Annotated[Path, typer.Option(help="The plan directory to write.")],
    gguf_file: GgufOption = None,
    allow_pickle: AllowPickleOption = False,
    resume: ResumeOption = None,
    json_line: JsonOption = False,
) -> None:
    """Train what is left of a pruned model on texts, to predict what the dense model does, and
    write a better plan."""
    with importing():
        from gradmap.healing.heal import heal as heal_plan
        from gradmap.healing.scaling import forecasts
        from gradmap.healing.summary import summarise
        from gradmap.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, gguf_file, allow_pickle)
    healed = heal_plan(checkpoint, plan, options, out, resume)
    record = healed.healing[-1]
    more = forecasts(record.curve)
    print_table(f"Plan {out}", ("", "value"), summarise(record, more))
    if json_line:
        found = {"forecasts": [asdict(forecast) for forecast in more]}
        print_json_line({"plan": str(out), **record.model_dump(mode="json"), **found})
