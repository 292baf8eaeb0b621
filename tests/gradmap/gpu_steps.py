"""The steps whose copies and waits tests/gradmap/model/test_gpu_traffic.py counts, and what each
may take.

The counts are what the steps take today; a lower one may replace them, a higher one needs a reason.
"""

import math
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_map

from gradmap.data.calibration import Calibration
from gradmap.evaluation.backends import ScoreRequest
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.methods.compensation import Pruned
from gradmap.methods.features import Fit, accumulate_gram
from gradmap.methods.gradmap.projection import mean_drift
from gradmap.methods.gradmap.scores import gradient_scores, streamed_gradient_scores
from gradmap.methods.gradpruner import importances_of_sublayers
from gradmap.methods.mka import last_hidden_states
from gradmap.methods.repair import RepairScorer
from gradmap.methods.ridge import fit_correction
from gradmap.methods.selection import Selection, Step, Subject
from gradmap.methods.sequential import refit_around_runs
from gradmap.methods.shortgpt import block_influences
from gradmap.methods.writing import uniform_numbers, write_on
from gradmap.model.batching import Batches
from gradmap.model.corrections import Update, weight_of
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import sublayers_of
from tests.conftest import inside
from tests.families import VOCABULARY
from tests.gradmap.fake_gpu import fake_gpu
from tests.gradmap.removals import attention, ffn, pairs

REMOVED = pairs(1)
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
    """Copies and waits: once, for each batch, for each layer, for each layer and batch, and for
    each correction."""

    once: tuple[int, int] = (0, 0)
    batch: tuple[int, int] = (0, 0)
    layer: tuple[int, int] = (0, 0)
    layer_batch: tuple[int, int] = (0, 0)
    correction: tuple[int, int] = (0, 0)

    def of(self, size: Size) -> tuple[int, int]:
        kept = size.layers - len(REMOVED)
        factors = (1, size.batches, size.layers, size.layers * size.batches, MAPS * kept)
        counts = (self.once, self.batch, self.layer, self.layer_batch, self.correction)
        copies, waits = (
            sum(f * count[kind] for f, count in zip(factors, counts, strict=True))
            for kind in (0, 1)
        )
        return copies, waits


def run_on_gpu(pico, prepare, size):
    """The result, and the traffic.

    How the family is built is found before: on a small model, once for a config.
    """
    model = pico.layered().network
    with fake_gpu() as gpu:
        run = prepare(pico, gpu.move(model), size)
        with gpu.traffic() as traffic:
            result = run()
        result = tree_map(
            lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, result
        )
    return result, traffic


def growth(counts, fewer, more):
    """By how many copies and waits one count, of those by some key, is above another."""
    return tuple(after - before for before, after in zip(counts[fewer], counts[more], strict=True))


STEPS: dict = {}


def step(**allowed):
    """A function of a pico, its model and a Size that returns what to run, and what that may
    take."""

    def add(prepare):
        STEPS[prepare.__name__] = prepare, Allowed(**allowed)
        return prepare

    return add


# transformers looks at the positions of every batch that has no mask, and waits for the answer, in
# each run of a model: for embeddings, for logits, and once for the arguments of its layers. torch
# waits to see if a Cholesky factor exists.


@step(batch=(2, 5))
def importance(pico, model, size):
    return lambda: gradient_scores(LayeredModel.of(model), size.input_ids, Batches(size.batch))


@step(once=(3, 5), batch=(3, 5), layer_batch=(6, 6))  # hidden states live in the CPU's memory
def streamed_importance(pico, model, size):
    return lambda: streamed_gradient_scores(
        LayeredModel.of(model), size.input_ids, Batches(size.batch), []
    )


@step(once=(2, 3))
def influence(pico, model, size):
    return lambda: block_influences(LayeredModel.of(model), size.input_ids)


@step(once=(2, 3))
def similarity(pico, model, size):
    return lambda: last_hidden_states(LayeredModel.of(model), size.input_ids)


# factors are drawn on the CPU, whatever the device
@step(once=(2 + 1, 2 * 4 + 1), layer=(MAPS, MAPS))
def first_training_steps(pico, model, size):
    """Two of them."""

    def run():
        with patch("gradmap.methods.gradpruner.STEPS", 2):
            return importances_of_sublayers(LayeredModel.of(model), size.input_ids, 0)

    return run


# what layers are called with is recorded again for the number of samples that run at once
@step(once=(3, 8))
def repair_start(pico, model, size):
    return lambda: repair_scorer(pico, model, size)._divergences


# a layer that is tried is fitted, runs through the output layer, and is compared
@step(layer=(1, 3))
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


# it walks the dense model and the pruned one, with held-out samples too
@step(once=(4, 10), batch=(0, 2))
def gram_matrices(pico, model, size):
    return lambda: accumulate_gram(
        pruned(pico, model, size), Fit(ffn(0), ffn(1), "refit", True), {}
    )


@step(once=(7, 19), batch=(0, 2))
def refit(pico, model, size):
    """With two lambdas to choose from."""
    fit = Fit(ffn(0), ffn(1), "refit", True)

    def correct():
        (found,) = fit_correction(pruned(pico, model, size), fit, {}, [0.1, 0.2])
        return inside(found).matrix

    return correct


@step(once=(28, 84), batch=(0, 2))
def refits_around_two_runs(pico, model, size):
    """Three fits, with all lambdas to choose from, of which up to eleven are tried here; each takes
    one copy and three waits."""
    without_two = replace(pruned(pico, model, size), removed=pairs(1, 3))
    return lambda: [inside(one).matrix for one in refit_around_runs(without_two).corrections]


@step(once=(1, 1), batch=(0, 1))
def divergence_of_a_walk(pico, model, size):
    walk = pruned(pico, model, size).walk(sublayers_of(range(size.layers)), size.input_ids)
    walk.go_to(attention(1), {})
    wanted = walk.hidden.flip(0)
    return lambda: walk.divergence(wanted, {})


@step(once=(3, 6), batch=(0, 2), correction=(1, 1))  # it walks the dense model as well
def divergence_of_a_plan(pico, model, size):
    changes = plan_changes(pico, model)
    return lambda: pruned(pico, model, size).divergence(changes)


@step(once=(3, 1))  # prompts and random numbers there, and tokens back
def writing(pico, model, size):
    numbers = uniform_numbers(size.samples, size.tokens - 4, seed=0)
    return lambda: write_on(LayeredModel.of(model), size.input_ids[:, :4], numbers)


@step(once=(1, 2), batch=(0, 1))
def outputs_to_distil(pico, model, size):
    return lambda: (
        pruned(pico, model, size).walk(sublayers_of(range(size.layers)), size.input_ids).finish({})
    )


@step(batch=(5, 6))
def evaluation(pico, model, size):
    requests = [ScoreRequest(tuple(row[:1]), tuple(row[1:])) for row in size.input_ids.tolist()]
    return lambda: log_likelihoods(model, requests, size.batch * (size.tokens - 1))


@step(batch=(7, 7))
def evaluation_of_choices(pico, model, size):
    rows = size.input_ids.tolist()
    requests = [
        ScoreRequest(tuple(row[:-4]), tuple(row[-4:end])) for row in rows for end in (-2, -1, None)
    ]
    return lambda: log_likelihoods(model, requests, size.batch * (size.tokens + 2))


@step(batch=(5, 6), correction=(1, 1))
def evaluation_of_a_plan(pico, model, size):
    requests = [ScoreRequest(tuple(row[:1]), tuple(row[1:])) for row in size.input_ids.tolist()]
    changes = plan_changes(pico, model)

    def run():
        with LayeredModel.of(model).changed(changes, without=REMOVED):
            return log_likelihoods(model, requests, size.batch * (size.tokens - 1))

    return run


def calibration(size):
    """As many samples to fit on as `size` says, and a few that are held out."""
    ids = size.input_ids
    made = Calibration("test", 0, torch.cat([ids, ids[: max(1, round(len(ids) / 3))]]))
    assert torch.equal(made.fit_ids, ids)
    return made


def pruned(pico, model, size):
    return Pruned(LayeredModel.of(model), calibration(size), REMOVED, Batches(size.batch))


def repair_scorer(pico, model, size):
    with patch("gradmap.methods.repair.forward_batch", lambda input_ids, device: size.batch):
        return RepairScorer(Subject(LayeredModel.of(model), calibration(size)))


def plan_changes(pico, model):
    """Of every linear map, in the CPU's memory and float32, as they are loaded."""
    generator = torch.Generator().manual_seed(2)
    maps = LayeredModel.of(model).linear_maps(
        sublayers_of(range(len(pico.architecture.layer_list(model))))
    )
    return {
        place: [Update(0.01 * torch.randn(weight_of(module).shape, generator=generator))]
        for place, module in maps
    }


def log_likelihoods(model, requests, batch_tokens):
    backend = TransformersBackend(model, "float64")
    backend._batch_tokens = batch_tokens
    return [score.log_likelihood for score in backend.score(requests)]
