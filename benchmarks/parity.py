"""How exactly each artifact computes what the pruned model computes: pico models, and any real one.

    python -m benchmarks.parity [--model M [--gguf-file F] --plan PLAN] [--out DIR]

The picos are those of the tests (random weights, random W' of norm 1.5, two of five layers
removed), wide enough for vLLM's kernels; a random model's logits are flat, so its most likely token
changes sides sooner than a trained one's.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from export.artifact import export_artifacts, open_source
from export.comparison import LogitComparison
from export.options import ExportOptions
from export.reference import random_probe
from export.writers import Source
from gradmap.common.console import print_table
from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.model.checkpoint import open_checkpoint
from tests.conftest import make_pico
from tests.export.sources import make_source
from tests.families import VOCABULARY

# 4 samples of 64 tokens and 64 generated ones fit; heads of 32 and widths of whole blocks are what
# vLLM's kernels take.
PICO_SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 160, "max_position_embeddings": 128},
    # vLLM takes no window on some layers only, as the tests' Qwen2 has
    "qwen2": {
        "hidden_size": 128,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "use_sliding_window": False,
    },
    "opt": {
        "hidden_size": 128,
        "ffn_dim": 160,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 128, "n_positions": 128},
}
KINDS = (("hf", None), ("onnx", None), ("onnx", "int8"), ("vllm", None), ("vllm", "int8"))


@dataclass(frozen=True)
class Row:
    """One artifact in one runtime; check is a LogitComparison, or the sentence that refused the
    artifact."""

    model: str
    kind: str
    check: LogitComparison | str


def main(
    model: str | None = None,
    gguf_file: str | None = None,
    plan: Path | None = None,
    out: Path = Path("out/benchmark/parity.json"),
) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for family, sizes in PICO_SIZES.items():
            pico = make_pico(family, Path(temporary, family), **sizes)
            source = replace(make_source(pico), probe_ids=random_probe(VOCABULARY))
            rows += check_all(f"{family} pico", source, Path(temporary, "out"))
        if model is not None:
            source = open_source(open_checkpoint(model, gguf_file), plan)
            rows += check_all(source.served_name, source, Path(temporary, "out"))
    columns = ("model", "artifact", "max |Δ logit|", "relative", "argmax same", "greedy same")
    print_table("Against the pruned model in memory", columns, [cells_of(row) for row in rows])
    write_json(out, {"rows": [vars(row) for row in rows], "environment": describe_environment()})


def check_all(name: str, source: Source, out: Path) -> list[Row]:
    rows = []
    for form, quantise in KINDS:
        settings = ExportOptions(formats=[form], quantise=quantise, min_agreement=0)
        try:
            record = export_artifacts(source, settings, out)[form]
        except UserError as error:
            rows.append(Row(name, f"{form} {quantise or ''}", str(error)))
            continue
        stored = record.quantise or record.dtype
        rows += [
            Row(name, f"{form} {stored} in {runtime}", check)
            for runtime, check in record.verification.items()
        ]
    return rows


def cells_of(row: Row) -> tuple[str, ...]:
    if isinstance(row.check, str):
        return row.model, row.kind, row.check, "", "", ""
    return (
        row.model,
        row.kind,
        f"{row.check.max_absolute_difference:.2g}",
        f"{row.check.relative_difference:.2g}",
        f"{row.check.argmax_agreement:.1%}",
        f"{row.check.greedy_identical}/{row.check.greedy_tokens}",
    )


if __name__ == "__main__":
    typer.run(main)
