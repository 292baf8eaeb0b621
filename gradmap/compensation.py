"""Stage 2: one projection matrix W' repairs the retained layer that drifted most (GradMAP, Eq. 8-13).

Eq. 10 in closed form. Let A = W_down X_down (without bias) be what the FFN adds to the residual stream, X_O the
dense model's output of the same layer, H' the pruned model's. The residual stream entering the FFN block is
X_F = H' - A - b, so the target of W' A is T = X_O - X_F - b = A + D with D = X_O - H', and

    W' = (T A^T + lam I)(A A^T + lam I)^-1 = I + D A^T (A A^T + lam I)^-1

from two d x d Gram matrices. Compensators are looked up by name in `COMPENSATORS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradmap.architectures import Architecture, without_layers
from gradmap.calibration import Calibration
from gradmap.console import progress
from gradmap.distributed import share_of, summed
from gradmap.layerwise import sample_losses

# Candidates for lambda, relative to the mean of the Gram matrix's diagonal.
RELATIVE_LAMBDAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class Correction:
    """W' (d, d) float64 for the down projection of one layer (original index), and what it did on held-out samples.

    relative_lambda: lambda of Eq. 12 over the mean diagonal of the Gram matrix.
    losses: mean next-token cross-entropy on the held-out samples, nats per token.
    accepted: whether the held-out loss improved; a correction that is not accepted must not be applied.
    """

    layer: int
    matrix: Tensor
    lam: float
    relative_lambda: float
    held_out_loss_before: float
    held_out_loss_after: float

    @property
    def accepted(self) -> bool:
        return self.held_out_loss_after < self.held_out_loss_before


@dataclass(frozen=True)
class Compensation:
    """The outcome of stage 2: the drift of every retained layer (Eq. 8, by original index) and the corrections."""

    drift: dict[int, float]
    corrections: tuple[Correction, ...]


class Compensator(Protocol):
    """Repairs `model` without the `removed` layers; the model itself is left as it was."""

    def __call__(
        self,
        model: Any,
        architecture: Architecture,
        calibration: Calibration,
        removed: Sequence[int],
        *,
        batch_size: int,
    ) -> Compensation: ...


def leave_uncorrected(
    model: Any, architecture: Architecture, calibration: Calibration, removed: Sequence[int], *, batch_size: int
) -> Compensation:
    """Stage 1 only."""
    return Compensation({}, ())


def project_most_drifted(
    model: Any, architecture: Architecture, calibration: Calibration, removed: Sequence[int], *, batch_size: int
) -> Compensation:
    """GradMAP stage 2 with the exact solution of Eq. 10; lambda by the loss on held-out samples."""
    drift = mean_drift(model, architecture, calibration.fit_ids, removed, batch_size)
    layer = max(drift, key=drift.__getitem__)
    gram, cross = accumulate_gram(model, architecture, calibration.fit_ids, removed, layer, batch_size)
    correction = choose_lambda(model, architecture, calibration.held_out_ids, removed, layer, gram, cross, batch_size)
    return Compensation(drift, (correction,))


COMPENSATORS: dict[str, Compensator] = {"none": leave_uncorrected, "projection": project_most_drifted}


def mean_drift(
    model: Any, architecture: Architecture, input_ids: Tensor, removed: Sequence[int], batch_size: int
) -> dict[int, float]:
    """Eq. 8: || E[H_i] - E[H'_i] ||_2 of every retained layer, expectation over samples and positions."""
    kept = _kept_layers(model, architecture, removed)
    modules = [architecture.layer_list(model)[index] for index in kept]
    dense = _mean_outputs(model, modules, input_ids, batch_size)
    with without_layers(model, architecture, removed):
        pruned = _mean_outputs(model, modules, input_ids, batch_size)
    return dict(zip(kept, (dense - pruned).norm(dim=1).tolist(), strict=True))


def accumulate_gram(
    model: Any, architecture: Architecture, input_ids: Tensor, removed: Sequence[int], layer: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Returns A A^T and D A^T of one layer, both (d, d) float64, summed over all tokens of input_ids (N, T)."""
    module = architecture.layer_list(model)[layer]
    projection = architecture.down_projection_of(module)
    gram = cross = torch.zeros((), dtype=torch.float64)
    share, _ = share_of(input_ids)
    with progress("Fitting W' (samples)", len(share)) as advance:
        for batch in share.split(batch_size):
            (dense,) = run_and_capture(model, [module], batch)
            with without_layers(model, architecture, removed):
                pruned, added = run_and_capture(model, [module, projection], batch)
            a = _without_bias(projection, added).flatten(end_dim=-2).double()
            d = (dense.double() - pruned.double()).flatten(end_dim=-2)
            gram, cross = gram + (a.mT @ a).cpu(), cross + (d.mT @ a).cpu()
            advance(len(batch))
    return summed(gram), summed(cross)


def solve_projection(gram: Tensor, cross: Tensor, lam: float) -> Tensor:
    """Minimises Eq. 11 + Eq. 12 exactly: W' = I + D A^T (A A^T + lam I)^-1. All (d, d) float64."""
    identity = torch.eye(len(gram), dtype=gram.dtype)
    matrix: Tensor = identity + torch.linalg.solve(gram + lam * identity, cross, left=False)
    return matrix


def solve_projection_reference(added: Tensor, target: Tensor, lam: float) -> Tensor:
    """The same by least squares on the stacked system [A; sqrt(lam) I] W'^T = [T; sqrt(lam) I].

    added: (n, d), target T: (n, d), rows are tokens.
    """
    root = lam**0.5 * torch.eye(added.shape[1], dtype=added.dtype)
    solution: Tensor = torch.linalg.lstsq(torch.cat([added, root]), torch.cat([target, root])).solution
    return solution.mT


def choose_lambda(
    model: Any,
    architecture: Architecture,
    held_out_ids: Tensor,
    removed: Sequence[int],
    layer: int,
    gram: Tensor,
    cross: Tensor,
    batch_size: int,
) -> Correction:
    """Solves for every candidate lambda and keeps the one of the lowest held-out loss."""
    scale = gram.diagonal().mean().item()
    candidates: list[Correction] = []
    with progress("Choosing lambda on held-out samples", 1 + len(RELATIVE_LAMBDAS)) as advance:
        before = pruned_loss(model, architecture, held_out_ids, removed, {}, batch_size)
        advance(1)
        for relative in RELATIVE_LAMBDAS:
            matrix = solve_projection(gram, cross, relative * scale)
            after = pruned_loss(model, architecture, held_out_ids, removed, {layer: matrix}, batch_size)
            candidates.append(Correction(layer, matrix, relative * scale, relative, before, after))
            advance(1)
    return min(candidates, key=lambda candidate: candidate.held_out_loss_after)


@torch.inference_mode()
def pruned_loss(
    model: Any,
    architecture: Architecture,
    input_ids: Tensor,
    removed: Sequence[int],
    matrices: dict[int, Tensor],
    batch_size: int,
) -> float:
    """Mean next-token cross-entropy (nats per token) of the pruned and corrected model on input_ids (N, T)."""
    total = 0.0
    with pruned_and_corrected(model, architecture, removed, matrices):
        for batch in share_of(input_ids)[0].split(batch_size):
            batch = batch.to(model.device)
            total += sample_losses(model(input_ids=batch, use_cache=False).logits, batch).double().sum().item()
    total = summed(torch.tensor(total, dtype=torch.float64)).item()
    return total / (input_ids.shape[0] * (input_ids.shape[1] - 1))


@contextmanager
def pruned_and_corrected(
    model: Any, architecture: Architecture, removed: Sequence[int], matrices: dict[int, Tensor]
) -> Iterator[None]:
    """Runs `model` without the `removed` layers and with W' multiplied onto down projections, unfolded.

    matrices: original layer index -> W' (d, d). The bias of a down projection is not multiplied.
    """
    layers = architecture.layer_list(model)
    with ExitStack() as stack:
        for index, matrix in matrices.items():
            projection = architecture.down_projection_of(layers[index])
            stack.callback(projection.register_forward_hook(_multiply_hook(matrix)).remove)
        stack.enter_context(without_layers(model, architecture, removed))
        yield


def _multiply_hook(matrix: Tensor) -> Any:
    def on_forward(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = _without_bias(module, output)
        return output - added + added @ matrix.to(output).mT

    return on_forward


@torch.inference_mode()
def run_and_capture(model: Any, modules: Sequence[nn.Module], input_ids: Tensor) -> list[Tensor]:
    """Runs one batch (B, T) and returns the output of each module, (B, T, d) or, where a family flattens, (B*T, d)."""
    captured: dict[nn.Module, Tensor] = {}

    def on_forward(module: nn.Module, args: Any, output: Any) -> None:
        captured[module] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(on_forward).remove)
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)  # logits are not needed
    return [captured[module] for module in modules]


def _mean_outputs(model: Any, modules: Sequence[nn.Module], input_ids: Tensor, batch_size: int) -> Tensor:
    """Mean output of each module over samples and positions: (len(modules), d) float64."""
    total = torch.zeros((), dtype=torch.float64)
    share, _ = share_of(input_ids)
    with progress("Measuring drift (samples)", len(share)) as advance:
        for batch in share.split(batch_size):
            outputs = run_and_capture(model, modules, batch)
            total = total + torch.stack([output.flatten(end_dim=-2).double().sum(dim=0).cpu() for output in outputs])
            advance(len(batch))
    return summed(total) / input_ids.numel()


def _kept_layers(model: Any, architecture: Architecture, removed: Sequence[int]) -> list[int]:
    return [index for index in range(len(architecture.layer_list(model))) if index not in set(removed)]


def _without_bias(projection: nn.Module, output: Tensor) -> Tensor:
    bias: Tensor | None = getattr(projection, "bias", None)  # a mixture of experts has none
    return output if bias is None else output - bias
