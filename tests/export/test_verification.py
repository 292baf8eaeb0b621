"""The judgement on an artifact: what passes, what does not, and what a refusal says."""

import threading

import pytest
import torch

from export import verification
from export.reference import Reference, load_probe, save_probe
from export.verification import Bounds, Outcome, compare, find_problem, logit_tolerance, run_artifact_in_each
from gradmap.errors import UserError

SAMPLES, TOKENS, VOCABULARY = 2, 6, 50


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
    broken = {where: torch.full_like(reference.logits if where == "logits" else reference.logits[:, -1], torch.nan)}
    assert problem_of(reference, outcome_of(reference, **broken), tolerance=1.0) is not None
    assert problem_of(reference, outcome_of(reference, logits=reference.logits * torch.nan), min_agreement=0.5)


def test_a_wrong_cache_is_seen_though_the_plain_logits_are_right(reference):
    problem = problem_of(reference, outcome_of(reference, cached=reference.logits[:, 0]), tolerance=0.1)
    assert "through the KV cache" in problem


def test_other_text_is_excused_only_at_a_near_tie(reference):
    assert problem_of(reference, outcome_of(reference, greedy=(4, 9, 6)), tolerance=1e-4) is None
    assert "token 1 on" in problem_of(reference, outcome_of(reference, greedy=(9, 5, 6)), tolerance=1e-4)


def test_a_quantised_model_is_judged_by_agreement(reference):
    logits = reference.logits.clone()
    logits[0, :3] *= -1  # 3 of 12 positions
    assert problem_of(reference, outcome_of(reference, logits), min_agreement=0.7) is None
    assert "75.0%" in problem_of(reference, outcome_of(reference, logits), min_agreement=0.8)


def test_log_probabilities_stand_in_for_logits(reference):
    best = reference.logits[:, :-1].log_softmax(-1).topk(5)
    outcome = Outcome("vllm", torch.tensor([4]), logprob_ids=best.indices, logprobs=best.values)
    assert compare(reference, outcome, Bounds(tolerance=1e-6)).argmax_agreement == 1.0
    assert problem_of(reference, outcome, tolerance=1e-6) is None
    shifted = Outcome("vllm", torch.tensor([4]), logprob_ids=best.indices, logprobs=best.values + 0.5)
    assert problem_of(reference, shifted, tolerance=0.1) is not None


def test_a_stored_probe_judges_as_the_whole_reference_does(reference, tmp_path):
    save_probe(tmp_path / "probe", reference)
    stored = load_probe(tmp_path / "probe")
    assert stored.logits.shape == (SAMPLES, TOKENS, 32)
    assert torch.equal(stored.best_ids, reference.best_ids)
    assert problem_of(stored, outcome_of(reference), tolerance=1e-9) is None
    assert problem_of(stored, outcome_of(reference, reference.logits + 0.5), tolerance=0.1) is not None
    assert problem_of(stored, outcome_of(reference, cached=reference.logits[:, 0]), tolerance=0.1) is not None
    (tmp_path / "probe").write_bytes((tmp_path / "probe").read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        load_probe(tmp_path / "probe")


def test_the_tolerance_follows_what_is_rounded():
    exact = logit_tolerance(22, 576, torch.float32, 0, torch.bfloat16)
    one_map = logit_tolerance(22, 576, torch.float32, 1, torch.bfloat16)
    served = logit_tolerance(22, 576, torch.bfloat16, 1, torch.bfloat16)
    assert exact < 1e-4 < one_map < 1e-2 < served < 0.15  # a lost W' moved SmolLM2's logits by 0.3
    assert served < logit_tolerance(80, 576, torch.bfloat16, 1, torch.bfloat16)


@pytest.mark.parametrize(("available", "at_once"), [(10**12, 2), (10**9, 1)])
def test_runners_go_at_once_where_memory_has_room_for_all(reference, tmp_path, monkeypatch, available, at_once):
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
    assert run_artifact_in_each(("first", "second"), tmp_path, reference, 10**9) == ["first", "second"]
    assert most == [at_once, at_once]
