"""How a model follows the dense model's answers is what plain passes over them say."""

import numpy as np
import pytest
import torch

from gradmap.evaluation import agreement
from gradmap.evaluation.agreement import (
    Followed,
    Likely,
    divergence,
    divergence_reference,
    follow,
    make_reference,
)
from gradmap.evaluation.answers import (
    Written,
    describe_answers,
    summarise_answers,
    write_answers,
)
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.comparison import compare_answers
from gradmap.evaluation.prompts import NEW_TOKENS, PROMPTS
from gradmap.evaluation.scoring import Scorer
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_tokenizer
from gradmap.model.sublayers import Pair

# Of sums of 200 float64 terms, each a product of a probability and a difference of logarithms
TOLERANCE = 1e-10


def random_distributions(seed, places=7, tokens=40):
    logits = 3 * torch.randn(places, tokens, generator=torch.Generator().manual_seed(seed))
    return logits.double().log_softmax(dim=1)


def test_the_divergence_is_that_of_the_definition():
    dense, pruned = random_distributions(1), random_distributions(2)
    expected = divergence_reference(dense, pruned)
    assert (expected > 0.1).all()
    torch.testing.assert_close(
        divergence(Likely.of(dense), pruned), expected, atol=TOLERANCE, rtol=0
    )
    assert divergence(Likely.of(dense), dense).abs().max() < TOLERANCE


def test_tokens_that_are_not_kept_count_as_one(monkeypatch):
    """The divergence of the joined distributions, which is smaller, and the nearer the more are
    kept."""
    dense, pruned = random_distributions(1), random_distributions(2)
    monkeypatch.setattr(agreement, "KEPT_TOKENS", 5)
    kept = dense.topk(5).indices

    def joined(log_probabilities):
        chosen = log_probabilities.gather(1, kept)
        rest = log_probabilities.scatter(1, kept, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([chosen, rest], dim=1)

    found = divergence(Likely.of(dense), pruned)
    expected = divergence_reference(joined(dense), joined(pruned))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found < divergence_reference(dense, pruned)).all()


def test_every_family_shows_the_log_probabilities_of_a_plain_pass(pico):
    model, request = pico.load(), ScoreRequest((5, 6, 7), (8, 9, 10, 11))
    found = TransformersBackend(model, "float64").log_probabilities(request)
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), use_cache=False).logits[0]
    torch.testing.assert_close(found, logits[2:6].log_softmax(dim=-1), atol=TOLERANCE, rtol=0)


@pytest.fixture
def dense_and_pruned(picos):
    """Backends of a pico model, and of it without its layer 2."""
    dense, pruned = picos["llama"].load(), picos["llama"].load()
    with LayeredModel.of(pruned).without([Pair.of_layer(2)]):
        yield tuple(TransformersBackend(model, "float64", [2]) for model in (dense, pruned))


def scorer_of(backend):
    return Scorer(backend, None, "arm")


def test_agreement_is_counted_token_by_token_behind_the_dense_answer(picos, dense_and_pruned):
    dense, pruned = dense_and_pruned
    written = write_answers(scorer_of(dense), load_tokenizer(picos["llama"].directory))
    reference, own = make_reference(written, scorer_of(dense))
    other = follow(reference, scorer_of(pruned))
    assert own.agreed.tolist() == own.tokens.tolist()
    assert np.abs(follow(reference, scorer_of(dense)).divergences).max() < TOLERANCE * NEW_TOKENS
    assert not own.divergences.any()
    for row, request in enumerate(reference.requests):
        expected = pruned.log_probabilities(request)
        assert other.tokens[row] == len(request.continuation)
        assert other.agreed[row] == sum(
            place.argmax().item() == token
            for place, token in zip(expected, request.continuation, strict=True)
        )
        kl = divergence_reference(dense.log_probabilities(request), expected).sum().item()
        assert other.divergences[row] == pytest.approx(kl, rel=1e-8)
    assert 0 < other.agreed.sum() < other.tokens.sum()


class MuteBackend(TransformersBackend):
    """Does not show logits, as a server does not."""

    def log_probabilities(self, request):
        return None


def test_without_logits_there_is_agreement_and_no_divergence(picos, dense_and_pruned):
    dense, pruned = dense_and_pruned
    written = write_answers(scorer_of(dense), load_tokenizer(picos["llama"].directory))
    mute = MuteBackend(picos["llama"].load(), "float64")
    by_dense, _ = make_reference(written, scorer_of(dense))
    by_mute, own = make_reference(written, scorer_of(mute))
    assert own.agreed.tolist() == own.tokens.tolist()
    for reference, backend in ((by_mute, pruned), (by_dense, mute)):
        followed = follow(reference, scorer_of(backend))
        assert followed.divergences is None
        assert compare_answers(followed, followed).divergence is None
    hidden, shown = (follow(reference, scorer_of(pruned)) for reference in (by_mute, by_dense))
    assert hidden.agreed.tolist() == shown.agreed.tolist()
    assert hidden.describe()[0]["divergence"] is None


def test_answers_without_tokens_cannot_be_followed(dense_and_pruned):
    dense, _ = dense_and_pruned
    some, _ = make_reference(Written([[5], [6]], [[], [7, 8]]), scorer_of(dense))
    assert follow(some, scorer_of(dense)).tokens.tolist() == [2]
    _, none = make_reference(Written([[5]], [[]]), scorer_of(dense))
    assert compare_answers(none, none) is None


def test_shares_are_of_all_tokens_and_their_intervals_of_whole_answers():
    tokens, agreed = np.array([10.0, 30.0]), np.array([10.0, 15.0])
    dense = Followed(tokens, tokens, np.zeros(2))
    found = compare_answers(dense, Followed(tokens, agreed, np.array([1.0, 7.0])))
    assert found.dense_agreement == 1
    # 25 of 40; an answer drawn twice gives 10 of 10, or 15 of 30, each once in four draws
    assert (found.agreement.value, found.agreement.low, found.agreement.high) == (0.625, 0.5, 1.0)
    assert found.divergence.value == pytest.approx(8 / 40)
    assert found.divergence.low == pytest.approx(0.1)
    assert found.divergence.high == pytest.approx(7 / 30)


def test_how_long_answers_are_and_which_the_model_ended(picos):
    tokenizer = load_tokenizer(picos["llama"].directory)
    lengths = [0, 1, 5, NEW_TOKENS]
    written = Written([[5]] * 4, [list(range(3, 3 + length)) for length in lengths])
    answers = describe_answers(written, tokenizer)
    assert [answer.tokens for answer in answers] == lengths
    assert [answer.ended for answer in answers] == [True, True, True, False]
    summary = summarise_answers(answers)
    assert summary["empty"] == 0.25 and summary["ended"] == 0.75
    assert summary["median_tokens"] == 3
    assert summary["p90_tokens"] == pytest.approx(5 + 0.7 * (NEW_TOKENS - 5))


def test_a_model_with_too_small_a_window_is_not_asked_and_that_is_said(picos, capsys):
    backend = TransformersBackend(picos["llama"].load(), "float64")
    backend.max_tokens = NEW_TOKENS + 3
    assert write_answers(scorer_of(backend), load_tokenizer(picos["llama"].directory)) is None
    assert f"takes {NEW_TOKENS + 3}: they are left out" in capsys.readouterr().err


def test_prompts_are_short_and_none_is_asked_twice():
    assert len(set(PROMPTS)) == len(PROMPTS) == 32
    assert max(len(prompt.split()) for prompt in PROMPTS) <= 16
