"""The judgement on an artifact: what passes, what does not, and what a refusal says."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from export import verification
from export.comparison import Bounds
from export.formats.format import Runner
from export.reference import Reference, load_probe, save_probe
from export.tolerance import STRAY_SHARE, logit_tolerance, share_of_strays
from export.verification import Outcome, compare, find_problem, run_artifact_in_each
from gradmap.common import children
from gradmap.common.children import run_captured
from gradmap.common.errors import OutOfMemoryError, UserError
from tests.export.conftest import run_in_a_fresh_process

SAMPLES, TOKENS, VOCABULARY = 2, 6, 50
FIRST, SECOND = Runner("first"), Runner("second")


@pytest.fixture
def reference():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(SAMPLES, TOKENS, VOCABULARY, generator=generator)
    return Reference(
        input_ids=torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=generator),
        logits=logits,
        scale=logits.square().mean().sqrt().item(),
        greedy_ids=torch.tensor([4, 5, 6]),
        greedy_margins=torch.tensor([1.0, 1e-6, 1.0]),
    )


def outcome_of(reference, logits=None, cached=None, greedy=(4, 5, 6)):
    logits = reference.logits if logits is None else logits
    cached = logits[:, -1] if cached is None else cached
    return Outcome("test", torch.tensor(greedy), logits=logits, cached_logits=cached)


def problem_of(reference, outcome, **bounds):
    return find_problem(compare(reference, outcome, Bounds(**bounds)))


def test_the_same_logits_pass(reference):
    assert problem_of(reference, outcome_of(reference), tolerance=1e-9) is None


def test_a_difference_is_measured_and_its_place_named(reference):
    logits = reference.logits.clone()
    logits[1, 3, 7] += 5.0
    comparison = compare(reference, outcome_of(reference, logits), Bounds(tolerance=1e-3))
    expected = 5.0 / (SAMPLES * TOKENS * VOCABULARY) ** 0.5 / reference.scale
    assert comparison.relative_difference == pytest.approx(expected)
    assert "sample 1, position 3" in find_problem(comparison)


@pytest.mark.parametrize("where", ["logits", "cached"])
def test_nan_does_not_pass(reference, where):
    broken = {
        where: torch.full_like(
            reference.logits if where == "logits" else reference.logits[:, -1], torch.nan
        )
    }
    assert problem_of(reference, outcome_of(reference, **broken), tolerance=1.0) is not None
    assert problem_of(
        reference, outcome_of(reference, logits=reference.logits * torch.nan), min_agreement=0.5
    )


def test_a_wrong_cache_is_seen_though_the_plain_logits_are_right(reference):
    problem = problem_of(
        reference, outcome_of(reference, cached=reference.logits[:, 0]), tolerance=0.1
    )
    assert "through the KV cache" in problem


def test_other_text_is_excused_only_at_a_near_tie(reference):
    assert problem_of(reference, outcome_of(reference, greedy=(4, 9, 6)), tolerance=1e-4) is None
    assert "token 1 on" in problem_of(
        reference, outcome_of(reference, greedy=(9, 5, 6)), tolerance=1e-4
    )


def test_a_quantised_model_is_judged_by_agreement(reference):
    logits = reference.logits.clone()
    logits[0, :3] *= -1  # 3 of 12 positions
    assert problem_of(reference, outcome_of(reference, logits), min_agreement=0.7) is None
    problem = problem_of(reference, outcome_of(reference, logits), min_agreement=0.8)
    assert "75.0% (± 12.5%) of 12 positions" in problem


def test_a_tolerance_takes_nothing_from_what_a_quantised_model_must_keep(reference):
    """As a record that was changed on its way could say it."""
    logits = reference.logits.clone()
    logits[0, :3] *= -1
    problem = problem_of(reference, outcome_of(reference, logits), tolerance=1e9, min_agreement=0.8)
    assert "75.0%" in problem


def test_a_quantised_model_is_judged_by_its_divergence_where_one_is_allowed(reference):
    generator = torch.Generator().manual_seed(2)
    logits = reference.logits + 0.3 * torch.randn(reference.logits.shape, generator=generator)
    outcome = outcome_of(reference, logits)
    wanted = reference.logits.double().softmax(-1)
    given = logits.double().softmax(-1)
    expected = (wanted * (wanted / given).log()).sum(-1).mean().item()
    found = compare(reference, outcome, Bounds(min_agreement=0.0))
    assert found.divergence == pytest.approx(expected, rel=1e-4)  # in float32
    low, high = 0.9 * expected, 1.1 * expected
    assert problem_of(reference, outcome, min_agreement=0.0, max_divergence=high) is None
    problem = problem_of(reference, outcome, min_agreement=0.0, max_divergence=low)
    assert f"diverge by {expected:.3f} nats" in problem and "position" in problem
    assert "--max-divergence" in problem


def test_a_quantised_model_is_judged_by_its_perplexity_where_a_ratio_is_allowed(reference):
    generator = torch.Generator().manual_seed(3)
    logits = reference.logits + torch.randn(reference.logits.shape, generator=generator)

    def losses(logits):
        rows, ids = logits[:, :-1].double(), reference.input_ids[:, 1:]
        return torch.nn.functional.cross_entropy(rows.flatten(0, 1), ids.flatten())

    expected = (losses(logits) - losses(reference.logits)).exp().item()
    bounds = {"min_agreement": 0.0, "max_perplexity_ratio": 0.99 * expected}
    found = compare(reference, outcome_of(reference, logits), Bounds(**bounds))
    assert found.perplexity_ratio == pytest.approx(expected, rel=1e-5)  # logits are float32
    assert f"perplexity is {expected:.3f} times" in find_problem(found)
    allowed = bounds | {"max_perplexity_ratio": 1.01 * expected}
    assert problem_of(reference, outcome_of(reference, logits), **allowed) is None


def test_a_runtime_that_shows_no_logits_is_judged_by_the_probabilities_of_the_text(reference):
    """One position fewer, as where vLLM has no room to generate."""
    shown = reference.logits[:, :-2].log_softmax(-1)
    best = shown.topk(5)
    own = shown.gather(-1, reference.input_ids[:, 1:-1, None])[..., 0] - 0.25
    outcome = Outcome("vllm", torch.tensor([4]), None, None, best.indices, best.values, own)
    ratio = compare(reference, outcome, Bounds(min_agreement=0.0)).perplexity_ratio
    assert ratio == pytest.approx(torch.tensor(0.25).exp().item(), rel=1e-6)


def test_a_stored_probe_knows_no_perplexity_nor_divergence(reference, tmp_path):
    save_probe(tmp_path / "probe", reference)
    stored = load_probe(tmp_path / "probe")
    found = compare(stored, outcome_of(reference), Bounds(min_agreement=0.9))
    assert (found.perplexity_ratio, found.divergence) == (None, None)
    assert found.argmax_agreement == 1.0 and found.positions == SAMPLES * TOKENS


def test_log_probabilities_stand_in_for_logits(reference):
    best = reference.logits[:, :-1].log_softmax(-1).topk(5)
    outcome = Outcome("vllm", torch.tensor([4]), logprob_ids=best.indices, logprobs=best.values)
    assert compare(reference, outcome, Bounds(tolerance=1e-6)).argmax_agreement == 1.0
    assert problem_of(reference, outcome, tolerance=1e-6) is None
    shifted = Outcome(
        "vllm", torch.tensor([4]), logprob_ids=best.indices, logprobs=best.values + 0.5
    )
    assert problem_of(reference, shifted, tolerance=0.1) is not None


def test_a_stored_probe_judges_as_the_whole_reference_does(reference, tmp_path):
    save_probe(tmp_path / "probe", reference)
    stored = load_probe(tmp_path / "probe")
    assert stored.logits.shape == (SAMPLES, TOKENS, 32)
    assert torch.equal(stored.best_ids, reference.best_ids)
    assert problem_of(stored, outcome_of(reference), tolerance=1e-9) is None
    assert (
        problem_of(stored, outcome_of(reference, reference.logits + 0.5), tolerance=0.1) is not None
    )
    assert (
        problem_of(stored, outcome_of(reference, cached=reference.logits[:, 0]), tolerance=0.1)
        is not None
    )
    (tmp_path / "probe").write_bytes((tmp_path / "probe").read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        load_probe(tmp_path / "probe")


def test_the_tolerance_follows_what_is_rounded():
    exact = logit_tolerance(22, 576, torch.float32)
    stored = logit_tolerance(22, 576, torch.float32, torch.bfloat16)
    served = logit_tolerance(22, 576, torch.bfloat16)
    assert exact < 1e-4 < 1e-2 < stored < served < 0.15  # a lost W' moved SmolLM2's logits by 0.3
    assert served < logit_tolerance(80, 576, torch.bfloat16)


def stray(reference, positions):
    """Logits of which this many positions have nothing to do with the reference."""
    logits = reference.logits.clone()
    logits.flatten(0, 1)[:positions] += 100.0
    return logits


@pytest.fixture
def long_reference(reference):
    """Of 256 positions."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 64, VOCABULARY, generator=generator)
    input_ids = torch.randint(VOCABULARY, (4, 64), generator=generator)
    return replace(reference, input_ids=input_ids, logits=logits, scale=1.0)


# 0.4, 4.7 and 6.3 %
@pytest.mark.parametrize(("positions", "passes"), [(1, True), (12, True), (16, False)])
def test_a_coarse_runtime_may_stray_at_a_few_positions(long_reference, positions, passes):
    logits = stray(long_reference, positions)
    outcome = outcome_of(long_reference, logits, cached=long_reference.logits[:, -1])
    bounds = Bounds(0.1, stray_share=share_of_strays(torch.bfloat16))
    comparison = compare(long_reference, outcome, bounds)
    assert comparison.relative_difference == pytest.approx(100 * (positions / 256) ** 0.5)
    assert (find_problem(comparison) is None) == passes
    assert passes == (comparison.typical_difference == 0)
    # as in float32
    assert "where rounding explains" in problem_of(long_reference, outcome, tolerance=0.1)


def test_what_does_not_stray_is_held_to_the_tolerance(long_reference):
    logits = stray(long_reference, 1) + 0.2
    outcome = outcome_of(long_reference, logits, cached=long_reference.logits[:, -1])
    assert "without the worst 5% of positions" in problem_of(
        long_reference, outcome, tolerance=0.1, stray_share=0.05
    )


def test_only_what_is_coarser_than_float32_strays():
    assert share_of_strays(torch.float32) == share_of_strays(torch.float64) == 0
    assert (
        share_of_strays(torch.float16)
        == share_of_strays(torch.float32, torch.bfloat16)
        == STRAY_SHARE
    )


def test_a_position_that_overflows_is_no_stray(long_reference):
    for value in (torch.inf, torch.nan):
        logits = long_reference.logits.clone()
        logits[2, 5, 7] = value
        outcome = outcome_of(long_reference, logits)
        assert (
            problem_of(long_reference, outcome, tolerance=0.1, stray_share=STRAY_SHARE) is not None
        )


@pytest.mark.parametrize(("samples", "passes"), [(1, True), (2, False)])
def test_one_sample_may_stray_behind_the_cache(long_reference, samples, passes):
    cached = long_reference.logits[:, -1].clone()
    cached[:samples] += 100.0
    problem = problem_of(
        long_reference,
        outcome_of(long_reference, cached=cached),
        tolerance=0.1,
        stray_share=STRAY_SHARE,
    )
    assert (problem is None) == passes


def test_a_single_sample_may_not_stray_behind_the_cache(long_reference):
    one = {"input_ids": long_reference.input_ids[:1], "logits": long_reference.logits[:1]}
    alone = replace(long_reference, **one)
    broken = outcome_of(alone, cached=alone.logits[:, 0])
    assert "through the KV cache" in problem_of(
        alone, broken, tolerance=0.1, stray_share=STRAY_SHARE
    )


def test_of_two_bounds_the_stricter_holds_in_each_respect():
    one, other = Bounds(0.1, 0.9, 0.05), Bounds(0.2, 0.95, 0.0)
    assert one.within(other) == other.within(one) == Bounds(0.1, 0.95, 0.0)
    assert one.within(Bounds()) == Bounds().within(one) == Bounds(0.1, 0.9, 0.0)


@pytest.mark.parametrize(("available", "at_once"), [(10**12, 2), (10**9, 1)])
def test_runners_go_at_once_where_memory_has_room_for_all(
    reference, tmp_path, monkeypatch, available, at_once
):
    running, most = set(), []
    meeting = threading.Barrier(at_once, timeout=60)

    def run(runner, directory, reference):
        running.add(runner)
        meeting.wait()
        most.append(len(running))
        meeting.wait()
        running.remove(runner)
        return runner

    monkeypatch.setattr(verification, "run_artifact", run)
    monkeypatch.setattr(verification, "available_bytes", lambda: available)
    outcomes: list[Any] = run_artifact_in_each((FIRST, SECOND), tmp_path, reference, 10**9)
    assert outcomes == [FIRST, SECOND]
    assert most == [at_once, at_once]


def test_where_one_runner_fails_the_others_end(reference, tmp_path, monkeypatch):
    """A signal's exception comes the same way."""
    ended = []

    def run(runner, directory, reference):
        if runner == SECOND:
            ended.append(run_captured(["sleep", "60"], os.environ).returncode)
            return
        while not children._RUNNING:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "run_artifact", run)
    monkeypatch.setattr(verification, "available_bytes", lambda: 10**12)
    with pytest.raises(KeyboardInterrupt):
        run_artifact_in_each((FIRST, SECOND), tmp_path, reference, 10**9)
    assert ended == [-signal.SIGTERM]


def test_a_runner_that_is_killed_has_run_out_of_memory(fresh_processes):
    script = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(
        OutOfMemoryError,
        match="It does not run: it was killed, as the system does where memory runs",
    ):
        run_in_a_fresh_process([sys.executable, "-c", script], "It does not run")
