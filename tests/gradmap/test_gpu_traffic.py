"""What goes between host and GPU does not grow with what is computed: copies and waits of every step are counted.

A wait is the host's for the GPU: a blocking copy, or a value or size that is read. Where a GPU is fast, each costs more
than a layer does, since nothing is given to it meanwhile. The counts below are what the steps take today; a lower one
may replace them, a higher one needs a reason.
"""

import math
from dataclasses import dataclass, replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_map

from gradmap.batching import Batches
from gradmap.calibration import Calibration
from gradmap.compensation import Compensation, Correction, Pruned
from gradmap.compensators.distil import Lessons, train_low_rank, uniform_numbers, write_on, written_by_dense
from gradmap.compensators.projection import mean_drift
from gradmap.compensators.ridge import Fit, accumulate_gram, fit_correction
from gradmap.compensators.sequential import refit_before_runs
from gradmap.corrections import Update, linear_maps, pruned_and_corrected, weight_of
from gradmap.evaluation.backends import Request
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.importance import layer_scores, streamed_layer_scores
from gradmap.initial_gradients import layer_importances
from gradmap.manifold import last_hidden_states
from gradmap.selection import Selection, Step, Subject
from gradmap.selectors.influence import block_influences
from gradmap.selectors.repair import RepairScorer
from tests.conftest import LAYERS, VOCABULARY, make_pico
from tests.gradmap.fake_gpu import fake_gpu

REMOVED = (1,)
MAPS = 7  # linear maps in a layer of Llama: that many corrections has a plan that corrects all


@dataclass(frozen=True)
class Size:
    """Samples in all, and how many are in a batch."""

    layers: int = 4
    samples: int = 2
    tokens: int = 8
    batch: int = 2

    @property
    def batches(self) -> int:
        return self.samples // self.batch

    @property
    def input_ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, VOCABULARY, (self.samples, self.tokens), generator=generator)


# Deeper, wider batches, longer samples, and more of them
SIZES = [Size(), Size(layers=8), Size(samples=4, batch=4), Size(tokens=40), Size(samples=4)]


@dataclass(frozen=True)
class Allowed:
    """Copies and waits: once, for each batch, for each layer, for each layer and batch, and for each correction."""

    once: tuple[int, int] = (0, 0)
    batch: tuple[int, int] = (0, 0)
    layer: tuple[int, int] = (0, 0)
    layer_batch: tuple[int, int] = (0, 0)
    correction: tuple[int, int] = (0, 0)

    def of(self, size: Size) -> tuple[int, int]:
        kept = size.layers - len(REMOVED)
        factors = (1, size.batches, size.layers, size.layers * size.batches, MAPS * kept)
        counts = (self.once, self.batch, self.layer, self.layer_batch, self.correction)
        copies, waits = (sum(f * count[kind] for f, count in zip(factors, counts, strict=True)) for kind in (0, 1))
        return copies, waits


STEPS = {}


def step(**allowed):
    """A function of a pico, its model and a Size that returns what to run, and what that may take."""

    def add(prepare):
        STEPS[prepare.__name__] = prepare, Allowed(**allowed)
        return prepare

    return add


# transformers looks at the positions of every batch that has no mask, and waits for the answer, in each run of a model:
# for embeddings, for logits, and once for the arguments of its layers. torch waits to see if a Cholesky factor exists.


@step(batch=(2, 5))
def importance(pico, model, size):
    return lambda: layer_scores(model, pico.architecture, size.input_ids, Batches(size.batch))


@step(once=(3, 5), batch=(3, 5), layer_batch=(6, 6))  # hidden states live in the CPU's memory
def streamed_importance(pico, model, size):
    return lambda: streamed_layer_scores(model, pico.architecture, size.input_ids, Batches(size.batch), [])


@step(once=(2, 3))
def influence(pico, model, size):
    return lambda: block_influences(model, pico.architecture, size.input_ids)


@step(once=(2, 3))
def similarity(pico, model, size):
    return lambda: last_hidden_states(model, pico.architecture, size.input_ids)


@step(once=(2 + 1, 2 * 4 + 1), layer=(MAPS, MAPS))  # factors are drawn on the CPU, whatever the device
def first_training_steps(pico, model, size):
    """Two of them."""

    def run():
        with patch("gradmap.initial_gradients.STEPS", 2):
            return layer_importances(model, pico.architecture, size.input_ids, 0)

    return run


@step(once=(3, 7))
def repair_start(pico, model, size):
    return lambda: repair_scorer(pico, model, size)._divergences


@step(layer=(1, 3))  # a layer that is tried is fitted, runs through the output layer, and is compared
def repair_round(pico, model, size):
    scorer = repair_scorer(pico, model, size)
    return lambda: scorer.score(Selection(()), lambda n: None)


@step(layer=(1, 3))
def repair_round_after_a_removal(pico, model, size):
    """Without bounds, so that all layers are tried."""
    scorer = repair_scorer(pico, model, size)
    scores = scorer.score(Selection(()), lambda n: None)
    step = Step(dict.fromkeys(scores, -math.inf), (min(scores, key=scores.get),))
    return lambda: scorer.score(Selection((step,)), lambda n: None)


@step(batch=(4, 6))
def drift(pico, model, size):
    return lambda: list(mean_drift(pruned(pico, model, size)).values())


@step(once=(4, 10), batch=(0, 2))  # it walks the dense model and the pruned one, with held-out samples too
def gram_matrices(pico, model, size):
    return lambda: accumulate_gram(pruned(pico, model, size), Fit(0, 1, "refit", True), {})


@step(once=(7, 19), batch=(0, 2))
def refit(pico, model, size):
    """With two lambdas to choose from."""
    return lambda: fit_correction(pruned(pico, model, size), Fit(0, 1, "refit", True), {}, [0.1, 0.2]).change.matrix


@step(once=(19, 56), batch=(0, 2))
def refits_before_two_runs(pico, model, size):
    """With all lambdas to choose from, of which up to eleven are tried here; each takes one copy and three waits."""
    without_two = replace(pruned(pico, model, size), removed=(1, 3))
    return lambda: [one.change.matrix for one in refit_before_runs(without_two).corrections]


@step(once=(1, 1), batch=(0, 1))
def divergence_of_a_walk(pico, model, size):
    walk = pruned(pico, model, size).walk(range(size.layers), size.input_ids)
    walk.go_to(1, {})
    wanted = walk.hidden.flip(0)
    return lambda: walk.divergence(wanted, {})


@step(once=(3, 6), batch=(0, 2), correction=(1, 1))  # it walks the dense model as well
def divergence_of_a_plan(pico, model, size):
    changes = plan_changes(pico, model)
    return lambda: pruned(pico, model, size).divergence(changes)


@step(once=(3, 1))  # prompts and random numbers there, and tokens back
def writing(pico, model, size):
    numbers = uniform_numbers(size.samples, size.tokens - 4, seed=0)
    return lambda: vars(write_on(model, pico.architecture, size.input_ids[:, :4], numbers))


@step(once=(1, 2), batch=(0, 1))
def outputs_to_distil(pico, model, size):
    return lambda: pruned(pico, model, size).walk(range(size.layers), size.input_ids).finish({})


@step(batch=(5, 6))
def evaluation(pico, model, size):
    requests = [Request(tuple(row[:1]), tuple(row[1:])) for row in size.input_ids.tolist()]
    return lambda: log_likelihoods(model, requests, size.batch * (size.tokens - 1))


@step(batch=(7, 7))
def evaluation_of_choices(pico, model, size):
    rows = size.input_ids.tolist()
    requests = [Request(tuple(row[:-4]), tuple(row[-4:end])) for row in rows for end in (-2, -1, None)]
    return lambda: log_likelihoods(model, requests, size.batch * (size.tokens + 2))


@step(batch=(5, 6), correction=(1, 1))
def evaluation_of_a_plan(pico, model, size):
    requests = [Request(tuple(row[:1]), tuple(row[1:])) for row in size.input_ids.tolist()]
    changes = plan_changes(pico, model)

    def run():
        with pruned_and_corrected(model, pico.architecture, REMOVED, changes):
            return log_likelihoods(model, requests, size.batch * (size.tokens - 1))

    return run


def calibration(size):
    """As many samples to fit on as `size` says, and a few that are held out."""
    ids = size.input_ids
    made = Calibration("test", 0, torch.cat([ids, ids[: max(1, round(len(ids) / 3))]]))
    assert torch.equal(made.fit_ids, ids)
    return made


def pruned(pico, model, size):
    return Pruned(model, pico.architecture, calibration(size), REMOVED, Batches(size.batch))


def repair_scorer(pico, model, size):
    with patch("gradmap.selectors.repair.forward_batch", lambda input_ids, device: size.batch):
        return RepairScorer(Subject(model, pico.architecture, calibration(size)))


def plan_changes(pico, model):
    """Of every linear map, in the CPU's memory and float32, as they are loaded."""
    generator = torch.Generator().manual_seed(2)
    maps = linear_maps(pico.architecture, model, range(len(pico.architecture.layer_list(model))))
    return {place: [Update(0.01 * torch.randn(weight_of(module).shape, generator=generator))] for place, module in maps}


def log_likelihoods(model, requests, batch_tokens):
    backend = TransformersBackend(model, "float64")
    backend._batch_tokens = batch_tokens
    return [score.log_likelihood for score in backend.score(requests)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """By their number of layers."""
    root = tmp_path_factory.mktemp("llamas")
    return {layers: make_pico("llama", root / str(layers), num_hidden_layers=layers) for layers in (4, 8)}


def run_on_gpu(pico, prepare, size):
    """The result, and the traffic."""
    model = pico.load()
    with fake_gpu() as gpu:
        run = prepare(pico, gpu.move(model), size)
        with gpu.traffic() as traffic:
            result = run()
        result = tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, result)
    return result, traffic


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_no_more_copies_and_waits_than_these(llamas, name, size):
    prepare, allowed = STEPS[name]
    _, traffic = run_on_gpu(llamas[size.layers], prepare, size)
    copies, waits = allowed.of(size)
    assert traffic.copies <= copies, traffic
    assert traffic.waits <= waits, traffic
    assert traffic.waits_in_backward == 0, traffic


@pytest.mark.parametrize("name", STEPS)
def test_a_step_computes_what_it_computes_on_a_cpu(llamas, name):
    prepare, _ = STEPS[name]
    actual, _ = run_on_gpu(llamas[4], prepare, Size())
    expected = prepare(llamas[4], llamas[4].load(), Size())()
    # float64 but for the losses, and attention is summed up in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


def test_the_mask_that_choices_need_is_made_on_the_gpu(llamas):
    """Bytes that are copied grow with the tokens, not with their square."""
    sizes = [Size(tokens=tokens) for tokens in (8, 40)]
    few, many = (run_on_gpu(llamas[4], evaluation_of_choices, size)[1].copied_bytes for size in sizes)
    assert many <= 5 * few


def test_importance_of_every_family(pico):
    """Experts are run one by one, so the host has to know how many tokens each was given, once in a layer."""
    size = Size(layers=LAYERS)
    actual, traffic = run_on_gpu(pico, importance, size)
    allowed = Allowed(batch=(2, 7), layer_batch=(1, 1) if pico.architecture.expert_down_projections else (0, 0))
    copies, waits = allowed.of(size)
    assert traffic.copies <= copies, traffic
    assert traffic.waits <= waits, traffic
    assert traffic.waits_in_backward == 0, traffic
    torch.testing.assert_close(actual, importance(pico, pico.load(), size)(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prepare", [repair_round, repair_round_after_a_removal])
def test_states_that_have_no_room_on_the_gpu_are_sent_to_the_cpu_without_a_wait(llamas, prepare, monkeypatch):
    size = Size(layers=8)
    scores, with_room = run_on_gpu(llamas[8], prepare, size)
    monkeypatch.setattr("gradmap.batching.GPU_STATES_SHARE", 0)
    scores_without, without_room = run_on_gpu(llamas[8], prepare, size)
    assert without_room.copies > 2 * with_room.copies
    assert without_room.waits <= with_room.waits + 2, without_room  # states without a removed layer are the CPU's work
    assert scores_without == pytest.approx(scores, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("free_bytes", "batches"), [(1 << 30, [10]), (9 * 40 * 2**10, [4, 4, 2])])
def test_a_gpu_writes_as_many_texts_at_once_as_have_room(llamas, monkeypatch, free_bytes, batches):
    """And what a CPU writes in batches of its own. A token's keys and values of 2 x 8 float64 in 4 layers are 1 KiB."""
    size, prompts = Size(samples=5, tokens=40), []
    distil = import_module("gradmap.compensators.distil")  # the package has a function of the same name
    monkeypatch.setattr(distil, "WRITTEN_TOGETHER", 3)
    expected = written_by_dense(pruned(llamas[4], llamas[4].load(), size))

    def recorded(model, architecture, some, numbers):
        prompts.append(len(some))
        return write_on(model, architecture, some, numbers)

    def prepare(pico, model, size):
        def run():
            with patch("torch.cuda.mem_get_info", lambda device: (free_bytes, free_bytes)):
                return vars(written_by_dense(pruned(pico, model, size)))

        return run

    monkeypatch.setattr(distil, "write_on", recorded)
    actual, _ = run_on_gpu(llamas[4], prepare, size)
    assert prompts == batches
    assert torch.equal(actual["input_ids"], expected.input_ids)
    torch.testing.assert_close(actual["outputs"], expected.outputs, rtol=1e-9, atol=1e-9)


def training(pico, model, size, changes):
    so_far = Compensation(
        tuple(Correction(place, change, 2.0, 1.0, accepted=True) for place, (change,) in changes.items())
    )
    to_repair = pruned(pico, model, size)
    known = Lessons(size.input_ids, to_repair.walk(to_repair.layers, size.input_ids).finish({}))
    return lambda: train_low_rank(to_repair, so_far, known.followed_by(written_by_dense(to_repair)))


def bare_training(pico, model, size):
    return training(pico, model, size, {})


def training_of_a_plan(pico, model, size):
    return training(pico, model, size, plan_changes(pico, model))


# Factors are drawn on the CPU; the corrections of a plan are moved to train on top of them, and to judge.
@pytest.mark.parametrize(("prepare", "moves_of_a_map"), [(bare_training, 1), (training_of_a_plan, 3)])
def test_a_step_of_training_takes_the_same_however_deep_the_model(llamas, prepare, moves_of_a_map):
    """Four samples more are twelve with what is written: three steps."""
    counts = {}
    for layers in (4, 8):
        for samples in (4, 8):
            _, traffic = run_on_gpu(llamas[layers], prepare, Size(layers, samples, batch=4))
            assert traffic.waits_in_backward == 0, traffic
            counts[layers, samples] = traffic.copies, traffic.waits

    def growth(fewer, more):
        return tuple(after - before for before, after in zip(counts[fewer], counts[more], strict=True))

    copies, waits = growth((8, 4), (8, 8))
    assert (copies, waits) == growth((4, 4), (4, 8))
    assert copies == 0
    assert waits <= 3 * 3
    assert max(growth((4, 4), (8, 4))) <= 4 * MAPS * moves_of_a_map
