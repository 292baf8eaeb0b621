"""MKA (Liu et al. 2024, arXiv 2406.16330): how alike two layers are, by what they make of the same
samples.

What enters a layer, one point for each sample, is embedded in the plane by a diffusion kernel; two
layers are alike if one's coordinates tell the other's (mutual information, over the entropies).
The layer goes that is most like the one before it, and is merged into it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from scipy.special import digamma
from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite
from gradmap.costs.timing import no_seconds
from gradmap.methods.base import Compensator, Job, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.merging import NO_EXPERTS, WHOLE_LAYERS, merge_runs
from gradmap.methods.selection import Selection, Subject
from gradmap.methods.simple import from_the_end
from gradmap.model.batching import forward_batch
from gradmap.model.corrections import Place
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import passes, stacked_on_cpu
from gradmap.model.sublayers import Pair

Matrix = NDArray[np.float64]

KERNEL_WIDTH = 8.0
DIMENSIONS = 2
INFORMATION_NEIGHBOURS = 5
ENTROPY_NEIGHBOURS = 50
LEAST_SAMPLES = 3  # two points have no entropy
NOISE = 1e-10


class SimilarityScorer:
    """The layer goes that is most like the one before it. The first has none before it, and
    stays."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        calibration = subject.calibration
        self._similarities = layer_similarities(
            subject.model, calibration.input_ids, calibration.seed
        )

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        advance(1)
        alive = self._subject.candidates(so_far.removal_order)
        return {
            pair: -float(self._similarities[before.first.layer, pair.first.layer])
            for before, pair in pairwise(alive)
        }


def merge_by_similarity(pruned: Pruned) -> Compensation:
    """W <- r W + (1 - r) W_removed with r = sigmoid(s / (s + s_removed)), s a layer's mean
    similarity to all."""
    similarities = layer_similarities(
        pruned.model, pruned.calibration.input_ids, pruned.calibration.seed
    )
    means = similarities.mean(axis=1)

    def merge(weight: Tensor, removed: Tensor, kept: Place, source: Place) -> Tensor:
        share = means[kept.layer] / (means[kept.layer] + means[source.layer])
        ratio = 1 / (1 + math.exp(-share))
        return ratio * weight + (1 - ratio) * removed

    return merge_runs(pruned, merge)


def require_samples(job: Job, options: None) -> None:
    """Raises UserError if there are too few samples."""
    if job.samples < LEAST_SAMPLES:
        raise UserError(
            f"mka compares layers by {LEAST_SAMPLES} samples at least; give more --samples."
        )


def layer_similarities(model: LayeredModel, input_ids: Tensor, seed: int) -> Matrix:
    """How alike every pair of layers is, (L, L). input_ids: (N, T). seed: of the noise that breaks
    ties between neighbours."""
    points = [_embed(states) for states in last_hidden_states(model, input_ids)]
    entropies = np.array([entropy(of_layer) for of_layer in points])
    count = len(points)
    similarities = np.zeros((count, count))
    with progress("Comparing layers (pairs)", count * (count + 1) // 2) as advance:
        for i in range(count):
            for j in range(i, count):
                information = mutual_information(points[i], points[j], seed)
                similarities[i, j] = similarities[j, i] = (
                    information / abs(entropies[i] * entropies[j]) ** 0.5
                )
                advance(1)
    return similarities


@torch.no_grad()
def last_hidden_states(model: LayeredModel, input_ids: Tensor) -> Matrix:
    """What enters each layer at the last position of each sample: (L, N, d). Raises UserError if it
    is not finite."""
    batches = []
    for batch in input_ids.split(forward_batch(input_ids, model.device)):
        entering = [before[:, -1].double() for before, _ in passes(model, batch.to(model.device))]
        batches.append(stacked_on_cpu(entering))
    states = torch.cat(batches, dim=1)
    for layer, of_layer in enumerate(states):
        require_finite(f"What enters layer {layer}", of_layer)
    return np.asarray(states)


def diffusion_embedding(points: Matrix) -> Matrix:
    """(N, d) -> (N, DIMENSIONS): leading singular vectors of the normalised kernel, over the first
    one."""
    kernel = np.exp(-((cdist(points, points) / KERNEL_WIDTH) ** 0.5))
    density = kernel.sum(axis=0)
    kernel = kernel / np.sqrt(np.outer(density, density))
    degree = np.sqrt(kernel.sum(axis=0))
    vectors = np.linalg.svd(kernel / np.outer(degree, degree))[0]
    embedding: Matrix = vectors[:, 1 : DIMENSIONS + 1] / vectors[:, :1]
    return embedding


def mutual_information(points: Matrix, others: Matrix, seed: int) -> float:
    """Mean over every pair of coordinates, nats. points, others: (n, d). seed: of the noise.

    The numbers are those of scikit-learn's `mutual_info_regression`.
    """
    generator = np.random.RandomState(seed)
    columns = _without_ties(points, generator.standard_normal(points.shape)).T
    noise = generator.standard_normal((len(others), 1))  # the same for each column
    other_columns = _without_ties(others, noise).T
    return float(np.mean([_information(x, y) for x in columns for y in other_columns]))


def entropy(points: Matrix) -> float:
    """From the distance to the k-th neighbour: -mean log(k / (n distance^d)), nats. points: (n,
    d)."""
    count, dimensions = points.shape
    neighbours = min(ENTROPY_NEIGHBOURS, count - 1)
    distances = KDTree(points).query(points, k=[neighbours + 1])[0]
    return float(-np.mean(np.log(neighbours / (count * distances**dimensions))))


def _without_ties(points: Matrix, noise: Matrix) -> Matrix:
    """Coordinates over their standard deviations, and a little noise. points: (n, d)."""
    scaled = points / points.std(axis=0)
    broken: Matrix = scaled + NOISE * np.maximum(1, np.abs(scaled).mean(axis=0)) * noise
    return broken


def _information(x: Matrix, y: Matrix) -> float:
    """Kraskov et al. 2004 (arXiv cond-mat/0305641), equation 8, nats, at least 0. x, y: (n,)."""
    count = len(x)
    neighbours = min(INFORMATION_NEIGHBOURS, count - 1)
    both = np.column_stack([x, y])
    # The nearest to a point is the point itself.
    reach = KDTree(both).query(both, k=[neighbours + 1], p=np.inf)[0][:, 0]
    near = [_nearer_than(reach, values) for values in (x, y)]
    information = (
        digamma(count) + digamma(neighbours) - sum(digamma(counts).mean() for counts in near)
    )
    return max(0.0, float(information))


def _nearer_than(reach: Matrix, values: Matrix) -> Matrix:
    """How many of the values are nearer to each than its reach; each itself is one. All (n,)."""
    points = values[:, None]
    counts: Matrix = KDTree(points).query_ball_point(
        points, np.nextafter(reach, 0), return_length=True
    )
    return counts


def _embed(states: Matrix) -> Matrix:
    """Ranks of the coordinates, as shares of the number of samples."""
    ranks: Matrix = diffusion_embedding(states).argsort(axis=0).argsort(axis=0) / len(states)
    return ranks


COMPARES_LAYERS = "is about layers that are alike, so that whole ones must go"
PAPER = "MKA (arXiv 2406.16330)"
SELECTOR = Selector(
    name="mka",
    about="the layer that is most like the one before it",
    paper=PAPER,
    make=SimilarityScorer,
    whole_layers=COMPARES_LAYERS,
    check=require_samples,
    score_label="-similarity to the layer before",
    round_takes="nothing; similarities of all pairs of layers are computed once",
)
# The last two layers are merged again and again, and the merged weights are lost.
AS_RELEASED = Selector(
    name="mka-as-released",
    about="the last layer, again and again, as the released code does",
    paper=PAPER,
    make=from_the_end,
    whole_layers=COMPARES_LAYERS,
    score_label="distance from the end",
    seconds=no_seconds,
)
COMPENSATOR = Compensator(
    name="mka",
    about="merges a removed layer into the one before it, by their similarity",
    paper=PAPER,
    run=merge_by_similarity,
    whole_layers=WHOLE_LAYERS,
    check=require_samples,
    in_memory=True,
    no_experts=NO_EXPERTS,
)
