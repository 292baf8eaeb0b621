"""`gradmap compare`. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmap.common.arguments import GgufOption, JsonOption, ModelOption
from gradmap.common.console import importing, print_json_line, print_table
from gradmap.common.options import takes
from gradmap.compare.options import CompareOptions


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
        from gradmap.compare.run import LAST_COLUMNS, compare_methods, settings_of, table_rows

    result = compare_methods(settings_of(options, model, gguf_file), out)
    texts = tuple(f"perplexity, {text}" for text in result["dense"]["perplexity"])
    print_table("Comparison", ("method", "removed", *texts, *LAST_COLUMNS), table_rows(result))
    if json_line:
        print_json_line({"out": str(out), "rows": result["rows"]})
