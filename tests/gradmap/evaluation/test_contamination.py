"""A text that shares 13 tokens in a row with a calibration sample is not evaluated on, wherever
they stand."""

import json
import shutil

import pytest
import torch

from gradmap.common.files import ARTIFACT_FILE
from gradmap.evaluation.contamination import GRAM_TOKENS, overlapping_segments
from gradmap.pruning.plan import load_calibration_ids, load_plan
from tests.command_line import gradmap
from tests.gradmap.pruning.test_prune import prune_arguments

SEGMENT = 32


def overlapping_reference(segments, samples, tokens):
    """Every run of the text against every run of every sample, as text."""
    ids, length = segments.flatten().tolist(), segments.shape[1]
    known = [f" {' '.join(map(str, sample))} " for sample in samples.tolist()]
    shared = set()
    for start in range(len(ids) - tokens + 1):
        run = f" {' '.join(map(str, ids[start : start + tokens]))} "
        if any(run in text for text in known):
            shared |= {place // length for place in range(start, start + tokens)}
    return shared


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [2, 7])
def test_overlaps_are_those_of_every_run_with_every_run(tokens, length):
    generator = torch.Generator().manual_seed(10 * tokens + length)
    segments = torch.randint(4 * tokens, (30, length), generator=generator)
    samples = torch.randint(4 * tokens, (4, 9), generator=generator)
    samples[0, 2:7] = segments.flatten()[26:31]
    found = overlapping_segments(segments, samples, tokens)
    assert found == overlapping_reference(segments, samples, tokens)
    assert found


@pytest.fixture(scope="module")
def planned(pico_with_bos, word_file, tmp_path_factory):
    plan = tmp_path_factory.mktemp("contamination") / "plan"
    assert gradmap(*prune_arguments(pico_with_bos, word_file, plan)).returncode == 0
    return pico_with_bos, plan, load_calibration_ids(plan, load_plan(plan))[3].tolist()


@pytest.mark.parametrize("lost", [None, "healing", "source", "record"])
def test_an_artifacts_samples_are_drawn_again(pico_with_bos, word_file, tmp_path, lost):
    pico, texts, plan, out = (
        pico_with_bos,
        tmp_path / "words.txt",
        tmp_path / "plan",
        tmp_path / "out",
    )
    shutil.copy(word_file, texts)
    assert gradmap(*prune_arguments(pico, texts, plan)).returncode == 0
    exported = gradmap(
        "export", "--model", pico.directory, "--plan", plan, "--format", "hf", "--out", out
    )
    assert exported.returncode == 0, exported.stderr
    own = " ".join(
        f"w{token}" for token in load_calibration_ids(plan, load_plan(plan))[3, 1:].tolist()
    )
    (tmp_path / "own.txt").write_text(" ".join([own] * 4))
    if lost == "source":
        texts.write_text(texts.read_text().replace("w7", "w8"))
    elif lost == "healing":  # as in an artifact from before there was any
        record = json.loads((out / "hf" / ARTIFACT_FILE).read_text())
        del record["plan"]["healing"]
        (out / "hf" / ARTIFACT_FILE).write_text(json.dumps(record))
    elif lost == "record":
        (out / "hf" / ARTIFACT_FILE).unlink()
    text = ("--perplexity", f"file:{tmp_path}/own.txt", "--segment", SEGMENT, "--dtype", "float64")
    finished = gradmap(
        *("eval", "--model", pico.directory, "--pruned", out / "hf"),
        *text,
        *("--out", tmp_path / "eval.json"),
    )
    said = {
        None: "overlaps with the calibration samples",
        "healing": "overlaps with the calibration samples",
        "source": "with them is not checked",
        "record": "is evaluated on that is not checked",
    }[lost]
    assert said in " ".join(finished.stderr.split())
    assert finished.returncode == (2 if "overlaps" in said else 0), finished.stderr


@pytest.mark.parametrize(
    ("shared", "place", "segments"),
    [
        (GRAM_TOKENS, 5, 1),
        (GRAM_TOKENS, SEGMENT - 3, 2),  # across the border of two segments
        (GRAM_TOKENS + 1, SEGMENT + 1, 1),
        (GRAM_TOKENS - 1, 5, 0),
    ],
)
def test_a_text_that_overlaps_is_refused_with_the_count(planned, tmp_path, shared, place, segments):
    pico, plan, sample = planned
    words = [f"w{3 + (7 * index) % 190}" for index in range(6 * SEGMENT)]
    words[place : place + shared] = [f"w{token}" for token in sample[2 : 2 + shared]]
    (tmp_path / "other.txt").write_text(" ".join(words))
    text = (
        "--perplexity",
        f"file:{tmp_path}/other.txt",
        "--segment",
        SEGMENT,
        "--dtype",
        "float64",
    )
    finished = gradmap(
        "eval", "--model", pico.directory, "--plan", plan, *text, "--out", tmp_path / "eval.json"
    )
    assert finished.returncode == (2 if segments else 0), finished.stderr
    assert (tmp_path / "eval.json").exists() is not bool(segments)
    if segments:
        assert (
            f"other.txt overlaps with the calibration samples: {segments} of 6 segments share 13 "
            "tokens in a row with them; evaluate on other text, or use other for calibration."
        ) in finished.stderr
