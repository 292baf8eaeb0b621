"""What pruning takes by arithmetic, in seconds on given hardware: of what stages multiply
(gradmap.costs.steps) and read. torch is not needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradmap.costs.steps import (
    DEFAULT_SIZE,
    FITS_AROUND,
    LAMBDAS,
    WRITTEN_TOGETHER,
    CalibrationSize,
    Hardware,
    direction_flops,
    distil_inputs,
    fits_flops,
    healing_flops,
    judged_fits_flops,
    score_flops,
    training_flops,
)
from gradmap.model.shape import Shape
from gradmap.model.sublayers import PIECES, Unit

# Of a checkpoint that is streamed from disk, in each round of gradient scores: forward and
# backward.
READS_PER_ROUND = 2
# To start Python and import torch and transformers: 8 to 10 s of one core of an EPYC.
STARTING_S = 10.0
# A layer in transformers for one token, however small it is: SmolLM2's 22 take 44 ms
# (benchmarks.generation).
LAYER_CALL_S = 0.002


def writing_seconds(
    shape: Shape, hardware: Hardware, size: CalibrationSize = DEFAULT_SIZE, correctable: bool = True
) -> float:
    """Seconds for what the dense model writes, a token of some samples at a time."""
    steps = size.tokens * size.written(distil_inputs(shape, correctable)) / WRITTEN_TOGETHER
    return steps * token_seconds(shape, hardware, WRITTEN_TOGETHER)


def token_seconds(
    shape: Shape, hardware: Hardware, streams: int = 1, layers: float | None = None
) -> float:
    """Seconds for the next token of some streams together: by weights that are read, or by
    FLOPs."""
    layers = shape.layers if layers is None else layers
    read_s = hardware.weight_bytes * shape.read_parameters(layers, streams) / hardware.all_bandwidth
    flops = hardware.single_token_share * hardware.sustained_flops
    return max(read_s, streams * shape.forward_flops(layers) / flops)


def generation_seconds(
    shape: Shape, hardware: Hardware, tokens: int, streams: int, layers: float
) -> float:
    """Seconds to generate in transformers, where no layer takes less than its Python."""
    return tokens * max(token_seconds(shape, hardware, streams, layers), LAYER_CALL_S * layers)


@dataclass(frozen=True)
class Pruning:
    """What `gradmap prune` is asked for."""

    remove: int
    selector: str = "repair"
    compensator: str = "distil"
    size: CalibrationSize = DEFAULT_SIZE
    one_shot: bool = False
    # Whether down projections have a closed form.
    correctable: bool = True
    unit: Unit = "layer"

    @property
    def rounds(self) -> int:
        return 1 if self.one_shot else self.remove

    @property
    def runs(self) -> int:
        """How many runs of removed layers there are, if every second removed layer begins one."""
        return max(1, self.remove // 2)


# FLOPs of so many rounds of scores.
Rounds = Callable[[Shape, int, CalibrationSize], float]
# Seconds of choosing, or of repairing.
Timing = Callable[[Shape, Hardware, Pruning], float]


def in_rounds(flops: Rounds, of_each: bool = False) -> Timing:
    """The timing of a selector that takes so many FLOPs in its rounds. of_each: whether it does for
    each candidate, of which there are twice as many where any neighbours may go."""

    def seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
        needed = flops(hardware.sees(shape), pruning.rounds, pruning.size)
        candidates = PIECES[pruning.unit] if of_each else 1
        return candidates * needed / hardware.sustained_flops

    return seconds


def no_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """The timing of what takes no time worth mentioning."""
    return 0.0


def refit_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds to refit the maps themselves, around every run; as if all were down projections."""
    return _fits_seconds(shape.inner, shape, hardware, pruning)


def flatten_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds to refit before every run with its own channels and with those of all, and behind
    it."""
    return _fits_seconds(shape.inner, shape, hardware, pruning, around=FITS_AROUND + 1)


def sequential_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds to fit a W' on either side of every run."""
    return _fits_seconds(shape.width, shape, hardware, pruning)


def projection_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for the drift of every layer, and one W'."""
    shape, remove, size = hardware.sees(shape), pruning.remove, pruning.size
    drift = size.fit_tokens * shape.layer_flops(2 * shape.layers - remove)
    fit = fits_flops(shape, remove, 1, shape.width, size, around=1)
    return (drift + fit) / hardware.sustained_flops


def replace_me_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for one W' before the one block."""
    return _judged_fits_seconds(1, shape, hardware, pruning)


def replace_me_cosine_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for one W' before the one block, which is trained."""
    training = direction_flops(shape, pruning.size) / hardware.sustained_flops
    return replace_me_seconds(shape, hardware, pruning) + training


def ghosted_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for a matrix before every run."""
    return _judged_fits_seconds(pruning.runs, shape, hardware, pruning)


def distil_seconds(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for what the dense model writes, fits on that too, and the training."""
    shape, size, correctable = hardware.sees(shape), pruning.size, pruning.correctable
    inputs = distil_inputs(shape, correctable)
    fits_s = _fits_seconds(inputs, shape, hardware, pruning, size.written(inputs))
    trained = training_flops(shape, pruning.remove, size, correctable)
    written_s = writing_seconds(shape, hardware, size, correctable)
    return fits_s + trained / hardware.sustained_flops + written_s


def _judged_fits_seconds(runs: int, shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Seconds for matrices whose lambda is given. runs: see `judged_fits_flops`."""
    flops = judged_fits_flops(hardware.sees(shape), pruning.remove, runs, pruning.size)
    return flops / hardware.sustained_flops


def _fits_seconds(
    features: float,
    shape: Shape,
    hardware: Hardware,
    pruning: Pruning,
    more: int = 0,
    around: int = FITS_AROUND,
) -> float:
    """Seconds for closed forms, where there are any. features, more, around: see `fits_flops`."""
    if not pruning.correctable:
        return 0.0
    shape, size = hardware.sees(shape), pruning.size
    flops = fits_flops(shape, pruning.remove, pruning.runs, features, size, more, around)
    return flops / hardware.sustained_flops


def streaming_seconds(
    shape: Shape, hardware: Hardware, pruning: Pruning, disk_bytes_per_s: float
) -> float:
    """Seconds to read the checkpoint again and again: twice in each round of gradient scores
    (others read it for every few samples, which is not counted); for repairs, once for either
    model, and half of it for each lambda of each run."""
    reads = float(READS_PER_ROUND * pruning.rounds)
    if pruning.compensator != "none":
        reads += 2 + FITS_AROUND * pruning.runs * LAMBDAS / 2
    return reads * hardware.weight_bytes * shape.parameters(shape.layers) / disk_bytes_per_s


def healing_seconds(
    shape: Shape, hardware: Hardware, remove: int, tokens: int, rank: int | None
) -> float:
    """Seconds of `gradmap heal` on so many tokens; without a rank, of all weights."""
    return healing_flops(hardware.sees(shape), remove, tokens, rank) / hardware.sustained_flops


def score_seconds(shape: Shape, hardware: Hardware, remove: int) -> float:
    """Seconds of gradient scores."""
    return score_flops(shape, remove) / hardware.sustained_flops
