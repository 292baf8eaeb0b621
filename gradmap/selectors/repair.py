"""Ours: the loss without a layer after the damage was repaired, so that what a repair can mend does not count.

For each layer, the retained layer before it is fitted (W', in closed form, see gradmap.compensators.ridge) to give what
the layer gave in the dense model, and the loss of the rest of the model is measured behind it. The best removal is kept
together with its repair. Samples to fit on and samples to measure on are different ones.

Not every layer is tried in every round. Removals make others dearer, hardly ever cheaper, so that what a layer cost
before is a lower bound, and trying stops where the bounds exceed the best (the lazy greedy algorithm, Minoux 1978).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmap.batching import forward_batch
from gradmap.compensators.ridge import plus_identity, ridge_sums, solve_ridge, widened
from gradmap.corrections import Change, Place, Projection, corrected, linear_output
from gradmap.distributed import share_of, summed
from gradmap.errors import UserError
from gradmap.layerwise import LayerCall, losses_from, record_layer_calls
from gradmap.selection import Advance, Selection, Subject

# Of the samples to fit on, and of those that are held out. Their hidden states between all layers are kept in memory.
FIT_TOKENS = 6144
MEASURE_TOKENS = 4096
RELATIVE_LAMBDA = 0.1


@dataclass(frozen=True)
class States:
    """Of some samples, in the layers that are left: what enters each layer (and leaves the last), (n, T, d) each, what
    each down projection adds, likewise."""

    entering: list[Tensor]
    added: list[Tensor]


class RepairScorer:
    """The loss that a removal adds after its repair, nats per token. The first layer has none before it, and stays."""

    def __init__(self, subject: Subject) -> None:
        """Raises UserError if layers cannot be repaired, or are not in memory."""
        if subject.architecture.uncorrectable is not None:
            raise UserError(
                f"--selector repair tries repairs, and {subject.architecture.uncorrectable}; use --selector sleb."
            )
        if subject.streamed:
            raise UserError("--selector repair needs all weights in memory; leave out --stream, or use gradient.")
        self._subject = subject
        self._layers = list(subject.architecture.layer_list(subject.model))
        calibration = subject.calibration
        tokens = calibration.input_ids.shape[1]
        self._fit_ids = share_of(calibration.fit_ids[: max(1, FIT_TOKENS // tokens)])[0]
        measured = calibration.held_out_ids[: max(1, MEASURE_TOKENS // tokens)]
        self._measured_tokens = len(measured) * (tokens - 1)
        self._measure_ids = share_of(measured)[0]
        self._changes: dict[Place, tuple[Change, ...]] = {}
        self._removed: tuple[int, ...] = ()
        self._repairs: dict[int, Tensor] = {}
        self._wanted = self._run(self._fit_ids).entering[1:]  # what each layer gives in the dense model

    def work(self, alive: int) -> int:
        return alive

    @torch.no_grad()
    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        for layer in so_far.removal_order[len(self._removed) :]:
            if layer not in self._repairs:  # decided by a run that was interrupted
                self._repairs[layer] = self._fit(layer, self._run(self._fit_ids))
            self._adopt(layer)
        alive = self._subject.alive(self._removed)
        fitted, measured = self._run(self._fit_ids), self._run(self._measure_ids)
        base = self._loss_behind(len(alive), measured.entering[-1])
        bounds = so_far.steps[-1].scores if so_far.steps else {}
        candidates = [layer for layer in alive[1:] if layer not in self._subject.protected]
        costs = {layer: bounds.get(layer, float("-inf")) for layer in candidates}
        untried = sorted(candidates, key=costs.__getitem__)
        best = float("inf")
        while untried and best >= costs[untried[0]]:
            layer = untried.pop(0)
            self._repairs[layer] = self._fit(layer, fitted)
            costs[layer] = self._loss_without(layer, measured) - base
            best = min(best, costs[layer])
            advance(1)
        advance(len(alive) - len(candidates) + len(untried))
        return costs

    def _adopt(self, layer: int) -> None:
        """Removes the layer; the repair stays."""
        alive = self._subject.alive(self._removed)
        before = Place(alive[alive.index(layer) - 1], self._subject.architecture.down_projection)
        repair = Projection(plus_identity(self._repairs[layer].to(self._subject.model.device)))
        self._changes[before] = (*self._changes.get(before, ()), repair)
        self._changes.pop(Place(layer, before.target), None)
        self._removed += (layer,)
        self._repairs.clear()

    def _fit(self, layer: int, states: States) -> Tensor:
        """S (d, d) float64: what to add to the output of the layer before, as a map of what its FFN adds.

        Computed on the model's device, and kept, as the states are, in the CPU's memory: there are many.
        """
        place = self._subject.alive(self._removed).index(layer)
        wanted, given, added = self._on_device(self._wanted[layer], states.entering[place], states.added[place - 1])
        gram, cross = map(summed, ridge_sums(added, widened(wanted) - widened(given), wanted))
        return solve_ridge(gram, cross, RELATIVE_LAMBDA * gram.diagonal().mean().item()).cpu()

    def _on_device(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self._subject.model.device) for tensor in tensors]

    def _loss_without(self, layer: int, states: States) -> float:
        place = self._subject.alive(self._removed).index(layer)
        given, added = self._on_device(states.entering[place], states.added[place - 1])
        return self._loss_behind(place + 1, given + added @ self._repairs[layer].to(added).mT)

    def _loss_behind(self, place: int, hidden: Tensor) -> float:
        """Mean cross-entropy (nats per token) of the samples to measure on, given what enters the layer at `place`."""
        model, total = self._subject.model, 0.0
        alive = self._subject.alive(self._removed)[place:]
        size = forward_batch(self._measure_ids, model.device)
        batches = zip(self._measure_ids.split(size), hidden.split(size), strict=True)
        with corrected(model, self._subject.architecture, self._changes):
            for ids, part in batches:
                ids, part = ids.to(model.device), part.to(model.device)
                _, calls = record_layer_calls(model, self._layers, ids)
                for index in alive:
                    part = calls[index].run(self._layers[index], part)
                total += losses_from(model, self._layers, part, ids).double().sum().item()
        return summed(torch.tensor(total, dtype=torch.float64)).item() / self._measured_tokens

    @torch.no_grad()
    def _run(self, input_ids: Tensor) -> States:
        """Through the layers that are left, with the repairs so far."""
        model, architecture = self._subject.model, self._subject.architecture
        alive = self._subject.alive(self._removed)
        entering: list[list[Tensor]] = [[] for _ in range(len(alive) + 1)]
        added: list[list[Tensor]] = [[] for _ in alive]
        with corrected(model, architecture, self._changes):
            for ids in input_ids.split(forward_batch(input_ids, model.device)):
                hidden, calls = record_layer_calls(model, self._layers, ids.to(model.device))
                for place, index in enumerate(alive):
                    entering[place].append(hidden.cpu())
                    hidden, of_ffn = self._run_layer(index, calls[index], hidden)
                    added[place].append(of_ffn.cpu())
                entering[-1].append(hidden.cpu())
        return States([torch.cat(parts) for parts in entering], [torch.cat(parts) for parts in added])

    def _run_layer(self, index: int, call: LayerCall, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves a layer, (B, T, d), and what its down projection adds to it, bias aside."""
        projection = self._subject.architecture.down_projection_of(self._layers[index])
        outputs: list[Tensor] = []
        handle = projection.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            leaving = call.run(self._layers[index], hidden)
        finally:
            handle.remove()
        (output,) = outputs
        output = output[0] if isinstance(output, tuple) else output
        return leaving, linear_output(projection, output).reshape(leaving.shape)
