"""Fixtures of the tests of healing."""

import math

import pytest

from gradmap.healing import kept_training
from gradmap.healing.kept_training import KeptTraining
from tests.gradmap.healing.small_healings import KilledError, manual_plan, write_sentences


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("texts") / "healing.jsonl", 400)


@pytest.fixture(scope="module")
def plans(picos, word_file, tmp_path_factory):
    """By compensator, of the same model and removals."""
    return {
        compensator: manual_plan(
            picos["llama"],
            word_file,
            tmp_path_factory.mktemp("plans") / compensator,
            layers=["1", "3"],
            remove=2,
            compensator=compensator,
            samples=12,
        )
        for compensator in ("none", "distil")
    }


@pytest.fixture
def killed_after_two_rounds(monkeypatch):
    """Which keep what they did; the third is lost."""
    monkeypatch.setattr(kept_training, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(kept_training, "WRITING_SHARE", math.inf)
    rounds: list[object] = []
    keep = KeptTraining.keep

    def keep_or_die(self, trainer):
        if len(rounds) == 2:
            rounds.clear()
            monkeypatch.setattr(KeptTraining, "keep", keep)
            raise KilledError
        rounds.append(trainer)
        keep(self, trainer)

    monkeypatch.setattr(KeptTraining, "keep", keep_or_die)
