"""Numbers that make no sense are refused in one sentence, whichever option they are given to."""

from __future__ import annotations

import pytest

from tests.command_line import gradmap
from tests.conftest import make_pico

PRUNE = {
    "--samples": ("0", "1", "-1", "1000000000000", "x"),
    "--tokens": ("0", "1", "-1", "65", "1000000000000"),
    "--remove": ("0", "-1", "5", "1000000000000"),
    "--held-out": ("-1", "12", "1000000000000"),
    "--protect-first": ("-1", "1000000000000"),
    "--protect-last": ("-1", "5"),
    "--top-z": ("0", "6", "1000000000000"),
    "--seed": ("-1", "4294967296", "1" * 40),
    "--budget-minutes": ("nan", "inf", "-1", "0"),
    "--ratio": ("nan", "inf", "0", "1", "-0.5"),
}
EVAL = {
    "--limit": ("0", "-1", "1.5"),
    "--segment": ("1", "0", "-1", "66", "1000000000000"),
    "--max-perplexity-ratio": ("nan", "inf", "-inf"),
}


def cases(options):
    return [(option, value) for option, values in options.items() for value in values]


def require_sentence(finished):
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(("option", "value"), cases(PRUNE))
def test_prune_refuses_numbers_that_make_no_sense(picos, word_file, tmp_path, option, value):
    given = {"--samples": 12, "--tokens": 16, "--remove": 1, option: value}
    if option == "--ratio":
        del given["--remove"]
    methods = (
        "--selector",
        "random",
        "--compensator",
        "projection",
        "--calibration",
        f"file:{word_file}",
    )
    numbers = [part for pair in given.items() for part in pair]
    model = picos["llama"].directory
    require_sentence(
        gradmap("prune", "--model", model, *methods, *numbers, "--out", tmp_path / "plan")
    )
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(("option", "value"), cases(EVAL))
def test_eval_refuses_numbers_that_make_no_sense(picos, tmp_path, option, value):
    (tmp_path / "other.txt").write_text(
        " ".join(f"w{3 + (7 * index) % 190}" for index in range(400))
    )
    text = ("--perplexity", f"own=file:{tmp_path}/other.txt", "--segment", 16, option, value)
    require_sentence(
        gradmap("eval", "--model", picos["llama"].directory, *text, "--out", tmp_path / "eval.json")
    )
    assert not (tmp_path / "eval.json").exists()


def test_a_tokenizer_of_another_model_is_refused(word_file, tmp_path):
    pico = make_pico("llama", tmp_path / "model", vocab_size=100)
    source = ("--calibration", f"file:{word_file}", "--samples", 12, "--tokens", 16, "--remove", 1)
    finished = gradmap("prune", "--model", pico.directory, *source, "--out", tmp_path / "plan")
    require_sentence(finished)
    assert "but the model knows only 100: it is another model's" in finished.stderr


@pytest.mark.parametrize(
    ("selector", "samples"),
    [("repair", 2), ("gradient", 2), ("gradpruner", 2), ("window", 2), ("mka", 3), ("mka", 2)],
)
def test_so_many_samples_are_enough(picos, word_file, tmp_path, selector, samples):
    source = (
        "--calibration",
        f"file:{word_file}",
        "--samples",
        samples,
        "--tokens",
        8,
        "--remove",
        2,
    )
    options = ("--selector", selector, "--compensator", "none", "--out", tmp_path / "plan")
    finished = gradmap("prune", "--model", picos["llama"].directory, *source, *options)
    if (selector, samples) == ("mka", 2):
        require_sentence(finished)
        assert "mka compares layers by 3 samples at least; give more --samples." in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr
