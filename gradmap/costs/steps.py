"""What pruning costs by arithmetic: FLOPs of each stage, and what they make of seconds on given
hardware.

docs/scaling.md has the numbers from 1B to 405B (python -m benchmarks.scaling) and holds them
against measurements; `gradmap doctor` takes the hardware that it measured. Nothing is measured
here, and torch is not needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gradmap.model.shape import Shape

BF16_BYTES = 2
# What follows is a choice of other modules, which import torch; a test compares.
# gradmap.data.calibration: the share of the samples that is held out.
HELD_OUT_FRACTION = 0.25
# gradmap.methods.repair: tokens that a selection fits and measures on.
SELECT_FIT_TOKENS, SELECT_MEASURE_TOKENS = 6144, 4096
# gradmap.methods.distil: samples that the dense model writes for each that is fitted on, and
# how many at once (gradmap.methods.writing); the rank of what is trained, and samples of a step;
# tokens that a closed form is fitted on, for each input of a map.
WRITTEN_PER_SAMPLE, WRITTEN_TOGETHER, RANK, STEP_SAMPLES, TOKENS_PER_INPUT = 2, 64, 16, 4, 8
# Observed with SmolLM2, three seeds: after the first round, which tries every layer, so many are
# tried in each.
TRIED_IN_LATER_ROUNDS = 2.7
# Likewise, so many lambdas are tried in each fit.
LAMBDAS = 3
# gradmap.methods.sequential: fits on either side of a cut.
FITS_AROUND = 2
# gradmap.methods.replace_me: epochs over the tokens.
DIRECTION_EPOCHS = 10
# Of the samples to measure on, that a layer which is tried sees before the race is decided: what
# meets the FLOPs that were counted (SmolLM2 without 8 layers). It is a third in the first round;
# later, more are tried on few samples each.
MEASURED_SHARE = 0.72
# Of the peak, that products of this size reach in practice; an assumption.
EFFICIENCY = 0.4


@dataclass(frozen=True)
class CalibrationSize:
    """How many calibration samples there are, of how many tokens, and what the stages make of
    them."""

    samples: int = 128
    tokens: int = 128

    @property
    def all_tokens(self) -> int:
        return self.samples * self.tokens

    @property
    def held_out(self) -> int:
        return max(1, round(self.samples * HELD_OUT_FRACTION))

    @property
    def fit(self) -> int:
        return self.samples - self.held_out

    @property
    def fit_tokens(self) -> int:
        return self.fit * self.tokens

    @property
    def held_out_tokens(self) -> int:
        return self.held_out * self.tokens

    def lacking(self, inputs: float) -> int:
        """Samples that `distil` fits on beside these, where a map has so many inputs."""
        return max(0, math.ceil(TOKENS_PER_INPUT * inputs / self.tokens) - self.fit)

    def written(self, inputs: float) -> int:
        return max(WRITTEN_PER_SAMPLE * self.fit, self.lacking(inputs))

    @property
    def select_fit_tokens(self) -> int:
        return min(self.fit, max(1, SELECT_FIT_TOKENS // self.tokens)) * self.tokens

    @property
    def select_measure_tokens(self) -> int:
        return min(self.held_out, max(1, SELECT_MEASURE_TOKENS // self.tokens)) * self.tokens


DEFAULT_SIZE = CalibrationSize()


@dataclass(frozen=True)
class Hardware:
    """FLOP/s, bytes/s and bytes of memory of one device, and how many there are.

    efficiency: the share of the FLOP/s that a model reaches; single_token_share: of these, that is
    left where WRITTEN_TOGETHER samples pass a token at a time. head_cost: see Shape. weight_bytes:
    of a weight as products read it; state_bytes: of a number in the hidden state, and of an
    embedding.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    devices: int = 1
    efficiency: float = EFFICIENCY
    single_token_share: float = 1.0
    head_cost: float = 1.0
    weight_bytes: int = BF16_BYTES
    state_bytes: int = BF16_BYTES

    @property
    def sustained_flops(self) -> float:
        return self.efficiency * self.flops * self.devices

    @property
    def all_bandwidth(self) -> float:
        return self.bandwidth * self.devices

    def sees(self, shape: Shape) -> Shape:
        """The shape with what its head costs here."""
        return replace(shape, head_cost=self.head_cost)


def score_flops(shape: Shape, rounds: int, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of GradMAP's stage 1: in each round the forward pass, the gradients of all activations,
    which cost as much, and the products of the gradient norms."""
    left = _mean_left(shape, rounds)
    return (
        rounds
        * size.all_tokens
        * (2 * shape.forward_flops(left) + gradient_norm_flops(shape, left, size.tokens))
    )


def gradient_norm_flops(shape: Shape, layers: float, tokens: int) -> float:
    """FLOPs of the gradient norms, for one token: two Gram matrices (T x T) for every linear map;
    maps that share an input share its own."""
    inputs = 2 * shape.width + shape.attention_width + shape.inner
    return 2 * tokens * layers * (inputs + shape.map_outputs)


def sleb_flops(shape: Shape, rounds: int, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of SLEB: every candidate runs from where it is left out on, through half of the layers
    on average."""
    tried = [shape.layers - removed for removed in range(rounds)]
    return size.all_tokens * sum(left * shape.forward_flops(left / 2) for left in tried)


def influence_flops(shape: Shape, rounds: int, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of block influence: one pass through the layers in each round."""
    return rounds * size.all_tokens * shape.layer_flops(_mean_left(shape, rounds))


def taylor_flops(shape: Shape, rounds: int, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of Taylor scores: forward, and backward for activations and for weights."""
    return 3 * rounds * size.all_tokens * shape.forward_flops(_mean_left(shape, rounds))


def selection_flops(shape: Shape, rounds: int, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of `--selector repair`: all samples pass the dense model once; after a removal, those
    to fit on pass what is behind it; and of those to measure on, a share passes what is behind each
    layer that is tried. The first is not, so that this is half of the others on average, and two
    output layers. A trial begins with a fit (d x d), of which the sums are counted."""
    fitted, measured = size.select_fit_tokens, size.select_measure_tokens
    fit = (4 * fitted + 2 * MEASURED_SHARE * measured) * shape.width**2
    total = fitted * shape.layer_flops(shape.layers)
    total += measured * (shape.forward_flops(shape.layers) + shape.head_flops)
    for removed in range(rounds):
        left = shape.layers - removed
        tried = left - 1 if removed == 0 else TRIED_IN_LATER_ROUNDS
        measuring = shape.forward_flops((left - 2) / 2) + shape.head_flops
        total += tried * (fit + MEASURED_SHARE * measured * measuring)
        if removed > 0:
            total += fitted * shape.layer_flops((left - 1) / 2)
    return total


def _mean_left(shape: Shape, rounds: int) -> float:
    """How many layers a round finds, on average."""
    return shape.layers - (rounds - 1) / 2


def fits_flops(
    shape: Shape,
    remove: int,
    runs: int,
    features: float,
    size: CalibrationSize = DEFAULT_SIZE,
    more: int = 0,
    around: int = FITS_AROUND,
) -> float:
    """FLOPs of the fits around each run of removed layers. Of all runs together, the dense model is
    walked through to its end, by all samples, and the pruned one to the last of them; a layer that
    is fitted runs once more; and each lambda is tried on what is behind it, half of what is left.

    features: what is fitted from, d (W') or k (the down projection itself). more: samples that the
    dense model wrote. around: fits of each run. Solutions are left out.
    """
    fits = around * runs
    fit_tokens = size.fit_tokens + more * size.tokens
    left = shape.layers - remove
    # As far as the last of so many places reaches on average.
    last = left * runs / (runs + 1)
    walks = fit_tokens * shape.layer_flops(shape.layers + last + fits)
    walks += size.held_out_tokens * shape.layer_flops(shape.layers + last)
    trials = (
        (1 + fits * LAMBDAS)
        * size.held_out_tokens
        * (shape.forward_flops(left / 2) + shape.head_flops)
    )
    return walks + trials + fits * fit_tokens * 2 * features * (features + shape.width)


def judged_fits_flops(
    shape: Shape, remove: int, runs: int, size: CalibrationSize = DEFAULT_SIZE
) -> float:
    """FLOPs of one matrix (d x d) before each run of removed layers, whose lambda is given. Either
    model is walked through to the last run, and each matrix is judged by passes of the held-out
    samples through the whole of what is left, with and without it. Solutions are left out."""
    left = shape.layers - remove
    # As far as the last of so many places reaches on average.
    reach = runs / (runs + 1)
    walks = size.fit_tokens * shape.layer_flops((shape.layers + left) * reach + runs)
    sums = size.fit_tokens * runs * 4 * shape.width**2
    passes = shape.layer_flops(shape.layers) + 2 * runs * (
        shape.forward_flops(left) + shape.head_flops
    )
    return walks + sums + size.held_out_tokens * passes


def direction_flops(shape: Shape, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """FLOPs of training a matrix (d x d) by the cosine: a product forward, and one for its
    gradient."""
    return DIRECTION_EPOCHS * size.fit_tokens * 4 * shape.width**2


def refit_flops(
    shape: Shape, remove: int, runs: int, size: CalibrationSize = DEFAULT_SIZE
) -> float:
    """FLOPs of refitting the down projection itself: see `fits_flops`."""
    return fits_flops(shape, remove, runs, shape.inner, size)


def distil_inputs(shape: Shape, correctable: bool = True) -> float:
    """The width of the inputs of the maps that `distil` fits: of experts, which are too many to
    refit, what they give is fitted on."""
    if not correctable:
        return 0.0
    return shape.width if shape.experts else shape.inner


def training_flops(
    shape: Shape, remove: int, size: CalibrationSize = DEFAULT_SIZE, correctable: bool = True
) -> float:
    """FLOPs of `distil` after its fits: the dense model's logits, whose hidden states are known;
    the pruned model forward and, through its activations, backward; the low-rank corrections of
    every map likewise, and their own gradients; in the end the held-out divergence."""
    pruned = shape.forward_flops(shape.layers - remove)
    lessons = (size.fit + size.written(distil_inputs(shape, correctable))) * size.tokens
    corrections = low_rank_flops(shape, remove, RANK)
    training = lessons * (shape.head_flops + 2 * pruned + corrections)
    return training + size.held_out_tokens * (pruned + shape.head_flops)


def low_rank_flops(shape: Shape, remove: int, rank: int) -> float:
    """FLOPs of one token in the training of low-rank corrections of every map that is left:
    forward, backward, and their own gradients."""
    return 3 * 2 * low_rank_parameters(shape, remove, rank)


def low_rank_parameters(shape: Shape, remove: int, rank: int) -> float:
    """Of the factors of every map that is left."""
    return rank * (shape.layers - remove) * (shape.map_inputs + shape.map_outputs)


def healing_flops(shape: Shape, remove: int, tokens: int, rank: int | None) -> float:
    """FLOPs of `gradmap heal` on so many tokens: the dense model forward, the pruned one forward
    and, through its activations, backward, and the corrections or, without a rank, the gradients of
    all weights. Looks at held-out samples are left out."""
    left = shape.layers - remove
    trained = shape.layer_flops(left) if rank is None else low_rank_flops(shape, remove, rank)
    pruned = shape.forward_flops(left)
    return tokens * (shape.forward_flops(shape.layers) + 2 * pruned + trained)


def decode_speed_up(shape: Shape, remove: int) -> float:
    """How many times as fast one stream decodes: by the bytes of weights that a token reads. A tied
    head is read once, an untied embedding hardly."""
    return shape.read_parameters(shape.layers) / shape.read_parameters(shape.layers - remove)


def prefill_speed_up(shape: Shape, remove: int) -> float:
    """How many times as fast a prompt is read: by FLOPs."""
    return shape.forward_flops(shape.layers) / shape.forward_flops(shape.layers - remove)
