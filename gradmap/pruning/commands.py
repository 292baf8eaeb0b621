"""`gradmap prune`. Heavy imports wait until the command runs."""

from __future__ import annotations

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
from gradmap.pruning.settings import PruneOptions


@heartbeat(so_far("gradmap prune"))
@takes(PruneOptions)
def prune(
    options: PruneOptions,
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The plan directory to write.")],
    gguf_file: GgufOption = None,
    allow_pickle: AllowPickleOption = False,
    resume: ResumeOption = None,
    from_plan: Annotated[
        Path | None,
        typer.Option(
            help="Begin with this plan: take its order of removals, if it removes as many or more, "
            "or go on from it, with its corrections and what it was calibrated on."
        ),
    ] = None,
    json_line: JsonOption = False,
) -> None:
    """Choose which layers to remove, compute the corrections, and write a plan."""
    with importing():
        from gradmap.model.checkpoint import open_checkpoint
        from gradmap.pruning.from_plan import prune_as_asked
        from gradmap.pruning.prune import summarise

    checkpoint = open_checkpoint(model, gguf_file, allow_pickle)
    plan = prune_as_asked(checkpoint, options, out, from_plan, resume)
    print_table(f"Plan {out}", ("", "value"), summarise(plan))
    if json_line:
        print_json_line(
            {
                "plan": str(out),
                "removal_order": [pair.written for pair in plan.removal_order],
                "timings_s": plan.timings_s,
            }
        )
