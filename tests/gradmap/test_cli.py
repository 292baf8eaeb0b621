"""What a wrong command line gets: one sentence and exit code 2."""

import subprocess
import sys

import pytest

from tests.command_line import gradmap


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "--nope"), "No such option: --nope"),
        (("nosuch",), "No such command"),
        (("verify",), "Missing argument"),
        (
            ("prune", "--model", "m", "--out", "o", "--samples", "many"),
            "Input should be a valid integer",
        ),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments, message):
    finished = gradmap(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert (finished.stderr.count("\n"), finished.stdout) == (1, "")


def test_a_subcommand_is_imported_alone():
    """For its help, and for what it does."""
    code = (
        "import sys; from gradmap.cli import build_app; build_app(['prune']); "
        "print(*{'loadtest', 'serving', 'torch', 'numpy'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.split() == [], finished.stderr
