"""Scores are those of one plain pass per request, whatever the batching."""

import math
import random

import numpy as np
import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.data.calibration import build_segments
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.perplexity import Segments, perplexity_of_losses, segment_losses
from gradmap.evaluation.scoring import CHUNK_REQUESTS, Scorer
from gradmap.evaluation.transformers_backend import TransformersBackend, score_reference
from gradmap.model.layerwise import sample_losses
from gradmap.model.loading import load_tokenizer
from tests.conftest import BOS
from tests.families import VOCABULARY
from tests.gradmap.evaluation.counting_backend import CountingBackend

# Of a float64 log likelihood: products of at most 40 terms in 5 layers, over the batch in another
# order
FLOAT64_TOLERANCE = 1e-10


def random_requests(generator, contexts=6):
    """Contexts with one to four continuations of one to nine tokens; some longer than the picos'
    windows of 8."""

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    requests = []
    for _ in range(contexts):
        context = tokens(1, 14)
        requests += [
            ScoreRequest(context, tokens(1, 10))
            for _ in range(int(torch.randint(1, 5, (), generator=generator)))
        ]
    # Answers of a single token, and a context short enough to stay within a window of 8 with its
    # branches
    short = tokens(2, 3)
    requests += [
        ScoreRequest(tokens(9, 10), (5,)),
        ScoreRequest(short, (5, 6)),
        ScoreRequest(short, (7, 8, 9)),
        ScoreRequest(short, (5,)),
    ]
    return requests


def test_scores_of_every_family_are_those_of_plain_passes(pico):
    requests = random_requests(torch.Generator().manual_seed(5))
    model = pico.load()
    scores = TransformersBackend(model, "float64").score(requests)
    for request, score in zip(requests, scores, strict=True):
        expected = score_reference(model, request)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, rel=FLOAT64_TOLERANCE)
        assert score.greedy_tokens == expected.greedy_tokens


def test_requests_that_share_a_context_are_scored_together():
    backend = CountingBackend()
    lengths = random.Random(0)
    requests = [
        ScoreRequest((context,), (1,) * lengths.randint(1, 20))
        for _ in range(4)
        for context in range(CHUNK_REQUESTS)
    ]
    Scorer(backend, None, "dense").score(requests, "test")
    contexts = [{request.context for request in chunk} for chunk in backend.chunks]
    assert len(contexts) > 2
    assert sum(map(len, contexts)) == CHUNK_REQUESTS
    assert sum(map(len, backend.chunks)) == len(set(requests))
    longest = [max(map(len, chunk)) for chunk in backend.chunks]
    assert longest == sorted(longest, reverse=True)


def test_a_greedy_continuation_is_recognised_and_generated(picos):
    pico = picos["llama"]
    model = pico.load()
    backend = TransformersBackend(model, "float64", end_tokens=[2])
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    answers = backend.generate(prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        (score,) = backend.score([ScoreRequest(tuple(prompt), tuple(answer))])
        assert score.greedy_tokens == len(answer)
        other = (*answer[:-1], (answer[-1] + 1) % VOCABULARY)
        (score,) = backend.score([ScoreRequest(tuple(prompt), other)])
        assert score.greedy_tokens == len(answer) - 1


def test_a_batch_of_answers_ends_when_all_are_done(picos):
    model, passes = picos["llama"].load(), []
    backend, prompts = TransformersBackend(model, "float64"), [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    whole = backend.generate(prompts, 20)
    stops = [answer[place] for answer, place in zip(whole, (3, 1, 6), strict=True)]
    needed = [min(answer.index(stop) for stop in stops if stop in answer) + 1 for answer in whole]
    model.register_forward_hook(lambda *_: passes.append(1))
    answers = backend.generate(prompts, 20, lambda answer: any(stop in answer for stop in stops))
    assert len(passes) == max(needed) < 20
    for answer, expected, count in zip(answers, whole, needed, strict=True):
        assert answer[:count] == expected[:count]


def test_batches_are_halved_when_memory_runs_out(picos, monkeypatch):
    model = picos["llama"].load()
    requests = random_requests(torch.Generator().manual_seed(6))
    expected = TransformersBackend(model, "float64").score(requests)
    backend = TransformersBackend(model, "float64")
    forward, limit = model.forward, 40

    def forward_in_little_memory(input_ids, **kwargs):
        if input_ids.numel() > limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forward_in_little_memory)
    for score, whole in zip(backend.score(requests), expected, strict=True):
        assert score.log_likelihood == pytest.approx(whole.log_likelihood, rel=FLOAT64_TOLERANCE)
    limit = 0
    with pytest.raises(UserError, match="does not fit into memory"):
        backend.score(requests)


def test_answers_are_written_fewer_at_a_time_when_memory_runs_out(picos, monkeypatch):
    model = picos["llama"].load()
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15], [8, 9], [10]]
    expected = TransformersBackend(model, "float64").generate(prompts, 6)
    backend, asked, generate = TransformersBackend(model, "float64"), [], model.generate

    def generate_in_little_memory(input_ids, **kwargs):
        asked.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids=input_ids, **kwargs)

    limit = 2
    monkeypatch.setattr(model, "generate", generate_in_little_memory)
    assert backend.generate(prompts, 6) == expected
    assert asked == [5, 2, 2, 1]
    limit = 0
    with pytest.raises(UserError, match="does not fit into memory"):
        backend.generate(prompts, 6)


def test_perplexity_is_that_of_the_loss_of_calibration(picos, word_file):
    model, directory = picos["llama"].load(), picos["llama"].directory
    ids = build_segments(load_tokenizer(directory), f"file:{word_file}", 16, 20)
    scorer = Scorer(TransformersBackend(model, "float64"), None, "dense")
    losses = segment_losses(scorer, Segments("words", "", ids))
    expected = sample_losses(model(input_ids=ids).logits, ids) / 15
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=FLOAT64_TOLERANCE)
    estimate = perplexity_of_losses(losses)
    assert estimate.value == pytest.approx(expected.mean().exp().item(), rel=FLOAT64_TOLERANCE)
    assert estimate.stderr == pytest.approx(
        estimate.value * expected.std().item() / 20**0.5, rel=1e-9
    )
    assert perplexity_of_losses(losses[:1]).stderr is None
    with pytest.raises(UserError, match="A loss of 1000 nats per token has no perplexity"):
        perplexity_of_losses(np.array([3.0, 1000.0]))


def test_behind_bos_every_token_of_a_segment_is_predicted(pico_with_bos, word_file):
    model = pico_with_bos.load()
    segments = Segments.read(
        load_tokenizer(pico_with_bos.directory), "words", f"file:{word_file}", 16, 20
    )
    assert segments.input_ids.shape == (20, 16)
    record = segments.describe()
    assert (record["bos"], record["tokens"], record["predicted_tokens"]) == (BOS, 16, 16)
    losses = segment_losses(Scorer(TransformersBackend(model, "float64"), None, "dense"), segments)
    for loss, tokens in zip(losses, segments.input_ids.tolist(), strict=True):
        chances = model(input_ids=torch.tensor([[BOS, *tokens]])).logits[0].log_softmax(-1)
        expected = -sum(chances[place, token].item() for place, token in enumerate(tokens)) / 16
        assert loss == pytest.approx(expected, rel=FLOAT64_TOLERANCE)


def test_what_is_no_number_is_not_generated(picos):
    model = picos["llama"].load()
    model.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(UserError, match="What the model predicts is not finite"):
        TransformersBackend(model, "float64").generate([[5, 6]], 4)


def test_a_text_that_is_too_long_is_refused_wherever_it_stands():
    backend = CountingBackend()
    short, longest = ScoreRequest((1,), (1, 1)), ScoreRequest((2,), (1,) * (backend.max_tokens + 1))
    for requests in ([short, longest], [longest, short]):
        with pytest.raises(
            UserError, match="A text of 52 tokens is longer than the 50 the model takes"
        ):
            Scorer(backend, None, "dense").score(requests, "test")
    assert not backend.scored
