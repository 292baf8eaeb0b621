"""MKA (Liu et al. 2024, arXiv 2406.16330): how alike two layers are, by what they make of the same
samples.

What enters a layer, one point for each sample, is embedded in the plane by a diffusion kernel; two
layers are alike if one's coordinates tell the other's (mutual information, over the entropies).
"""

from __future__ import annotations

from typing import Any

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
from gradmap.model.architectures import Architecture
from gradmap.model.batching import forward_batch
from gradmap.model.layerwise import layer_passes, stacked_on_cpu

Matrix = NDArray[np.float64]

KERNEL_WIDTH = 8.0
DIMENSIONS = 2
INFORMATION_NEIGHBOURS = 5
ENTROPY_NEIGHBOURS = 50
LEAST_SAMPLES = 3  # two points have no entropy
NOISE = 1e-10


def layer_similarities(
    model: Any, architecture: Architecture, input_ids: Tensor, seed: int
) -> Matrix:
    """Of every pair of layers, (L, L). input_ids: (N, T). seed: of the noise that breaks ties
    between neighbours.

    Raises UserError if there are too few samples.
    """
    if len(input_ids) < LEAST_SAMPLES:
        raise UserError(
            f"mka compares layers by {LEAST_SAMPLES} samples at least; give more --samples."
        )
    points = [_embed(states) for states in last_hidden_states(model, architecture, input_ids)]
    entropies = np.array([entropy(each) for each in points])
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
def last_hidden_states(model: Any, architecture: Architecture, input_ids: Tensor) -> Matrix:
    """What enters each layer at the last position of each sample: (L, N, d). Raises UserError if it
    is not finite."""
    layers = list(architecture.layer_list(model))
    batches = []
    for batch in input_ids.split(forward_batch(input_ids, model.device)):
        passes = layer_passes(model, layers, batch.to(model.device))
        batches.append(stacked_on_cpu([entering[:, -1].double() for entering, _ in passes]))
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
    information = digamma(count) + digamma(neighbours) - sum(digamma(each).mean() for each in near)
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
