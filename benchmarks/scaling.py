"""What pruning costs and brings by arithmetic: FLOPs and bytes, from 1B to 405B, on given hardware.

    python -m benchmarks.scaling            prints the tables of docs/scaling.md

Nothing is measured here. docs/scaling.md says where these predictions were held against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

BF16_BYTES, FLOAT64_BYTES = 2, 8
SAMPLES, TOKENS = 128, 128
# Of the default (gradmap.selectors.repair, gradmap.compensators.distil): tokens that a selection fits and measures on,
# samples that a repair fits on and holds out, samples that the dense model writes, and how many at once.
SELECT_FIT_TOKENS, SELECT_MEASURE_TOKENS = 6144, 4096
FIT_SAMPLES, HELD_OUT_SAMPLES, WRITTEN_SAMPLES, WRITTEN_TOGETHER = 96, 32, 192, 64
LAMBDAS = 5
# Observed with SmolLM2, three seeds: after the first round, which tries every layer, so many are tried in each.
TRIED_IN_LATER_ROUNDS = 2.7


@dataclass(frozen=True)
class Shape:
    """A Llama: width d, inner width k, layers, heads of keys and values over heads, vocabulary; head tied or not."""

    name: str
    width: int
    inner: int
    layers: int
    kv_share: float
    vocabulary: int
    tied: bool = False

    @property
    def layer_parameters(self) -> float:
        return self.width**2 * (2 + 2 * self.kv_share) + 3 * self.width * self.inner

    @property
    def head_parameters(self) -> float:
        return self.width * self.vocabulary

    def parameters(self, layers: int) -> float:
        return layers * self.layer_parameters + self.head_parameters * (1 if self.tied else 2)

    def forward_flops(self, layers: float) -> float:
        """Of one token; attention's own products are left out, for samples are short."""
        return 2 * (layers * self.layer_parameters + self.head_parameters)


@dataclass(frozen=True)
class Hardware:
    """Peak dense bfloat16 FLOP/s, bytes/s, bytes of memory of one device, and how many of them."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    devices: int = 1

    @property
    def sustained_flops(self) -> float:
        return EFFICIENCY * self.flops * self.devices

    @property
    def all_bandwidth(self) -> float:
        return self.bandwidth * self.devices


SHAPES = (
    Shape("Llama-3.2-1B", 2048, 8192, 16, 8 / 32, 128256, tied=True),
    Shape("Llama-2-7B", 4096, 11008, 32, 1, 32000),
    Shape("Llama-2-13B", 5120, 13824, 40, 1, 32000),
    Shape("Llama-3.1-70B", 8192, 28672, 80, 8 / 64, 128256),
    Shape("Llama-3.1-405B", 16384, 53248, 126, 8 / 128, 128256),
)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 3 / 9, 49152, tied=True)
HARDWARE = (
    Hardware("A40", 149.7e12, 0.696e12, 48e9),
    Hardware("H100", 989e12, 3.35e12, 80e9),
    Hardware("8 x H100", 989e12, 3.35e12, 80e9, devices=8),
)
# Of the peak, that products of this size reach in practice; an assumption.
EFFICIENCY = 0.4


def gradient_norm_flops(shape: Shape, layers: float) -> float:
    """Of one token: two Gram matrices (T x T) for every linear map; maps that share an input share its own."""
    inputs = 3 * shape.width + shape.inner
    outputs = (3 + 2 * shape.kv_share) * shape.width + 2 * shape.inner
    return 2 * TOKENS * layers * (inputs + outputs)


def score_flops(shape: Shape, remove: int) -> float:
    """GradMAP's stage 1: in each round the forward pass, the gradients of all activations, which cost as much, and the
    products of the gradient norms."""
    left = sum(shape.layers - removed for removed in range(remove)) / remove
    return remove * SAMPLES * TOKENS * (2 * shape.forward_flops(left) + gradient_norm_flops(shape, left))


def sleb_flops(shape: Shape, remove: int) -> float:
    """Every candidate from where it is left out on: half of the layers on average."""
    total = 0.0
    for removed in range(remove):
        left = shape.layers - removed
        total += left * shape.forward_flops(left / 2)
    return total * SAMPLES * TOKENS


def selection_flops(shape: Shape, remove: int) -> float:
    """`--selector repair`: in each round all samples pass once; a layer that is tried passes the samples to measure on
    through what is left behind it, half of the layers on average. Fits are d x d, and small beside that."""
    head = 2 * shape.head_parameters
    total = 0.0
    for removed in range(remove):
        left = shape.layers - removed
        once = (SELECT_FIT_TOKENS + SELECT_MEASURE_TOKENS) * 2 * left * shape.layer_parameters
        tried = left - 1 if removed == 0 else TRIED_IN_LATER_ROUNDS
        total += once + SELECT_MEASURE_TOKENS * (head + tried * shape.forward_flops(left / 2))
    return total


def refit_flops(shape: Shape, remove: int, runs: int) -> float:
    """Before each run of removed layers: half of either model up to there, and a held-out loss for each lambda."""
    left = shape.layers - remove
    fit = FIT_SAMPLES * shape.layer_parameters * (shape.layers + left)
    held_out = HELD_OUT_SAMPLES * (1 + LAMBDAS) * shape.forward_flops(left)
    gram = 2 * FIT_SAMPLES * shape.inner * (shape.inner + shape.width)
    return runs * TOKENS * (fit + held_out + gram)


def training_flops(shape: Shape, remove: int) -> float:
    """`distil` after that: the dense model's outputs and logits, and the pruned model forward and, through its
    activations, backward."""
    samples = FIT_SAMPLES + WRITTEN_SAMPLES
    dense = shape.forward_flops(shape.layers)
    return samples * TOKENS * (dense + 2 * shape.forward_flops(shape.layers - remove))


def writing_seconds(shape: Shape, flops: float, bandwidth: float) -> float:
    """What the dense model writes, a token of some samples at a time: by weights that are read, or by FLOPs."""
    steps = TOKENS * WRITTEN_SAMPLES / WRITTEN_TOGETHER
    read_s = BF16_BYTES * shape.parameters(shape.layers) / bandwidth
    return steps * max(read_s, WRITTEN_TOGETHER * shape.forward_flops(shape.layers) / flops)


def repair_bytes(shape: Shape) -> float:
    """The Gram matrix of a down projection's inputs (k x k), once to sum into and once to solve with."""
    return 2 * shape.inner**2 * FLOAT64_BYTES


def streamed_bytes(shape: Shape) -> float:
    """One layer, and the hidden states between all layers."""
    return BF16_BYTES * (shape.layer_parameters + (shape.layers + 1) * SAMPLES * TOKENS * shape.width)


def decode_speed_up(shape: Shape, remove: int) -> float:
    """Of one stream: the bytes of weights that a token reads. A tied head is read once, an untied embedding hardly."""
    read = [layers * shape.layer_parameters + shape.head_parameters for layers in (shape.layers, shape.layers - remove)]
    return read[0] / read[1]


def prefill_speed_up(shape: Shape, remove: int) -> float:
    return shape.forward_flops(shape.layers) / shape.forward_flops(shape.layers - remove)


def describe_shape(shape: Shape) -> str:
    remove = round(shape.layers / 4)
    cells = [
        f"{shape.parameters(shape.layers) / 1e9:.1f} B",
        f"{remove} of {shape.layers}",
        f"{sleb_flops(shape, remove) / score_flops(shape, remove):.1f}x",
        f"{streamed_bytes(shape) / 1e9:.1f} GB",
        f"{repair_bytes(shape) / 1e9:.1f} GB",
        f"{prefill_speed_up(shape, remove):.2f}x",
        f"{decode_speed_up(shape, remove):.2f}x",
    ]
    return f"| {shape.name} | {' | '.join(cells)} |"


def score_seconds(shape: Shape, hardware: Hardware, remove: int) -> float:
    return score_flops(shape, remove) / hardware.sustained_flops


def default_seconds(shape: Shape, hardware: Hardware, remove: int) -> float:
    """Of the default's selection and repair, if every second removed layer begins a run."""
    repair_flops = refit_flops(shape, remove, runs=remove // 2) + training_flops(shape, remove)
    writing_s = writing_seconds(shape, hardware.sustained_flops, hardware.all_bandwidth)
    return (selection_flops(shape, remove) + repair_flops) / hardware.sustained_flops + writing_s


def token_seconds(shape: Shape, hardware: Hardware) -> float:
    """Of one stream's next token: the weights are read, but for an embedding that is not the head as well."""
    unread = 0 if shape.tied else shape.head_parameters
    return BF16_BYTES * (shape.parameters(shape.layers) - unread) / hardware.all_bandwidth


def describe_time(shape: Shape, hardware: Hardware) -> str:
    """Stage 1, the default's selection and repair, and a token of one stream, dense; or that the model does not fit."""
    if BF16_BYTES * shape.parameters(shape.layers) > 0.92 * hardware.memory * hardware.devices:
        return "does not fit"
    remove = round(shape.layers / 4)
    score_s, default_s = score_seconds(shape, hardware, remove), default_seconds(shape, hardware, remove)
    return f"{score_s:,.0f} s, {default_s:,.0f} s, {1000 * token_seconds(shape, hardware):.1f} ms"


def describe_checked() -> str:
    """What docs/scaling.md holds against measurements, as multiples of stage 1 for 12 of SmolLM2's 30 layers."""
    scores = score_flops(SMOLLM2, 12)
    steps = {
        "selection of 12": selection_flops(SMOLLM2, 12),
        "SLEB's of 12": sleb_flops(SMOLLM2, 12),
        "refit of 8 in 3 runs": refit_flops(SMOLLM2, 8, runs=3),
        "training of 8": training_flops(SMOLLM2, 8),
        "writing": writing_seconds(SMOLLM2, flops=1.0, bandwidth=float("inf")),
    }
    return "SmolLM2 / stage 1: " + ", ".join(f"{step} {flops / scores:.2f}" for step, flops in steps.items())


def main() -> None:
    columns = "parameters | removed | SLEB / scores | streaming | repair | prefill | decode"
    print(f"| model | {columns} |\n|---{'|---:' * 7}|")
    for shape in SHAPES:
        print(describe_shape(shape))
    print(f"\n| model | {' | '.join(hardware.name for hardware in HARDWARE)} |\n|---{'|---:' * len(HARDWARE)}|")
    for shape in SHAPES:
        print(f"| {shape.name} | {' | '.join(describe_time(shape, hardware) for hardware in HARDWARE)} |")
    print(f"\n{describe_checked()}")


if __name__ == "__main__":
    typer.run(main)
