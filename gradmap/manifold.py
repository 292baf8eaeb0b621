"""MKA (Liu et al. 2024, arXiv 2406.16330): how alike two layers are, by what they make of the same samples.

What enters a layer, one point for each sample, is embedded in the plane by a diffusion kernel; two layers are alike if
one's coordinates tell the other's (mutual information, over the entropies).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.feature_selection import mutual_info_regression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from gradmap.architectures import Architecture
from gradmap.batching import forward_batch
from gradmap.console import progress
from gradmap.errors import UserError
from gradmap.finite import require_finite
from gradmap.layerwise import layer_passes, stacked_on_cpu

Matrix = NDArray[np.float64]

KERNEL_WIDTH = 8.0
DIMENSIONS = 2
INFORMATION_NEIGHBOURS = 5
ENTROPY_NEIGHBOURS = 50
LEAST_SAMPLES = 3  # two points have no entropy


def layer_similarities(model: Any, architecture: Architecture, input_ids: Tensor, seed: int) -> Matrix:
    """Of every pair of layers, (L, L). input_ids: (N, T). seed: of the noise that breaks ties between neighbours.

    Raises UserError if there are too few samples.
    """
    if len(input_ids) < LEAST_SAMPLES:
        raise UserError(f"mka compares layers by {LEAST_SAMPLES} samples at least; give more --samples.")
    points = [_embed(states) for states in last_hidden_states(model, architecture, input_ids)]
    entropies = np.array([entropy(each) for each in points])
    count = len(points)
    similarities = np.zeros((count, count))
    with progress("Comparing layers (pairs)", count * (count + 1) // 2) as advance:
        for i in range(count):
            for j in range(i, count):
                information = mutual_information(points[i], points[j], seed)
                similarities[i, j] = similarities[j, i] = information / abs(entropies[i] * entropies[j]) ** 0.5
                advance(1)
    return similarities


@torch.no_grad()
def last_hidden_states(model: Any, architecture: Architecture, input_ids: Tensor) -> Matrix:
    """What enters each layer at the last position of each sample: (L, N, d). Raises UserError if it is not finite."""
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
    """(N, d) -> (N, DIMENSIONS): leading singular vectors of the normalised kernel, over the first one."""
    kernel = np.exp(-((cdist(points, points) / KERNEL_WIDTH) ** 0.5))
    density = kernel.sum(axis=0)
    kernel = kernel / np.sqrt(np.outer(density, density))
    degree = np.sqrt(kernel.sum(axis=0))
    vectors = np.linalg.svd(kernel / np.outer(degree, degree))[0]
    embedding: Matrix = vectors[:, 1 : DIMENSIONS + 1] / vectors[:, :1]
    return embedding


def mutual_information(points: Matrix, others: Matrix, seed: int) -> float:
    """Mean over every pair of coordinates, nats."""
    neighbours = min(INFORMATION_NEIGHBOURS, len(points) - 1)
    options = {"n_neighbors": neighbours, "discrete_features": False, "random_state": seed}
    return float(np.mean([mutual_info_regression(points, column, **options) for column in others.T]))


def entropy(points: Matrix) -> float:
    """From the distance to the k-th neighbour: -mean log(k / (n distance^d)), nats. points: (n, d)."""
    count, dimensions = points.shape
    neighbours = min(ENTROPY_NEIGHBOURS, count - 1)
    distances = NearestNeighbors(n_neighbors=neighbours + 1).fit(points).kneighbors(points)[0][:, -1]
    return float(-np.mean(np.log(neighbours / (count * distances**dimensions))))


def _embed(states: Matrix) -> Matrix:
    """Ranks of the coordinates, as shares of the number of samples."""
    ranks: Matrix = diffusion_embedding(states).argsort(axis=0).argsort(axis=0) / len(states)
    return ranks
