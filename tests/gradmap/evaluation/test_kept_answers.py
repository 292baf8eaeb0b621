"""Answers that were written are not written again, whatever ended the run before."""

import pytest

from gradmap.evaluation.backends import Question, never
from gradmap.evaluation.scoring import CHUNK_QUESTIONS, Scorer
from tests.gradmap.evaluation.counting_backend import CountingBackend

MODEL = {"model": "a"}
SHORT = [Question((token,), 2) for token in range(CHUNK_QUESTIONS + 10)]
LONG = [Question((token,), 3, ("stop",)) for token in range(5)]


class WritingBackend(CountingBackend):
    """Repeats the last token of a prompt; breaks down at the first prompt it is told to."""

    def __init__(self, breaks_at=None, ends=()):
        super().__init__(breaks_at)
        self.asked, self.end_tokens = [], ends

    def generate(self, prompts, new_tokens, is_done=never):
        if self.breaks_at in [prompt[-1] for prompt in prompts]:
            raise KeyboardInterrupt
        self.asked += prompts
        lengths = [0 if prompt[-1] in self.end_tokens else new_tokens for prompt in prompts]
        return [[prompt[-1]] * length for prompt, length in zip(prompts, lengths, strict=True)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path))
    return tmp_path


def answers_of(questions):
    return [[question.prompt[-1]] * question.new_tokens for question in questions]


def ask(backend, questions, identity=MODEL, fresh=False):
    return Scorer(backend, identity, "dense", fresh).answer(questions, "task")


@pytest.mark.parametrize("cut_bytes", [0, 3])
def test_an_interrupted_task_goes_on_where_it_was(cache, cut_bytes):
    questions = SHORT + LONG
    with pytest.raises(KeyboardInterrupt):
        ask(WritingBackend(breaks_at=CHUNK_QUESTIONS + 1), questions)
    (file,) = cache.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[: -cut_bytes or None])  # kill -9 in the middle of a line
    second = WritingBackend()
    assert ask(second, questions) == answers_of(questions)
    assert len(second.asked) == len(questions) - CHUNK_QUESTIONS + bool(cut_bytes)
    third = WritingBackend()
    assert ask(third, questions) == answers_of(questions)
    assert third.asked == []


def test_answers_are_kept_for_one_model_its_ends_and_its_questions_only():
    ask(WritingBackend(), LONG)
    other_limits = [Question(question.prompt, 3, ("end",)) for question in LONG]
    for identity, questions, fresh in (
        ({"model": "b"}, LONG, False),
        (MODEL, other_limits, False),
        (MODEL, LONG[1:], False),
        (MODEL, LONG, True),
        (None, LONG, False),
    ):
        backend = WritingBackend()
        assert ask(backend, questions, identity, fresh) == answers_of(questions)
        assert len(backend.asked) == len(questions)
    assert ask(WritingBackend(ends=(4,)), LONG)[4] == []


def test_a_prompt_with_two_limits_has_two_answers():
    questions = [Question((7,), 2), Question((7,), 3), Question((7,), 2)]
    backend = WritingBackend()
    assert ask(backend, questions) == [[7, 7], [7, 7, 7], [7, 7]]
    assert len(backend.asked) == 2


@pytest.mark.parametrize("damaged", ["{", "7", '["key", "a"]', '["key", 1.0]', "null"])
def test_a_damaged_line_is_no_answer(cache, damaged):
    ask(WritingBackend(), LONG)
    (file,) = cache.rglob("*.jsonl")
    lines = file.read_text().splitlines()
    key = lines[0].split(",")[0]
    file.write_text("\n".join([damaged.replace('["key"', key), *lines[1:]]) + "\n")
    backend = WritingBackend()
    assert ask(backend, LONG) == answers_of(LONG)
    assert backend.asked == [LONG[0].prompt]
