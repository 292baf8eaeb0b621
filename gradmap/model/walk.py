"""Samples on their way through the sublayers of a model: whoever works from front to back need not
begin again.

A sublayer that is looked at runs once more when it is passed, and a loss runs what is ahead without
passing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from gradmap.common.distributed import share_of, summed
from gradmap.model.batching import Batches
from gradmap.model.corrections import Changes
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import (
    LayerCalls,
    Piece,
    capturing,
    divergences_from,
    record_layer_calls,
)
from gradmap.model.sublayers import Sublayer, sublayers_of

# What enters and leaves each watched module, (B, T, ...), and what leaves the sublayer, (B, T, d);
# of which samples.
Look = Callable[[slice, list[tuple[Tensor, Tensor]], Tensor], None]


class Walk:
    """This process's share of some samples, in front of one of a model's sublayers.

    hidden: what enters it, (n, T, d), on the model's device. input_ids: (n, T), likewise.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LayeredModel,
        sublayers: Sequence[Sublayer],
        input_ids: Tensor,
        batches: Batches,
    ) -> None:
        """sublayers: those to walk through, in order. input_ids: (N, T)."""
        self._model, self._batches = model, batches
        self._ahead = list(sublayers)
        self._tokens = input_ids.numel()  # of all processes
        self.input_ids = share_of(input_ids)[0].to(model.device)
        self._calls = LayerCalls(model, self.input_ids)
        self.hidden = self._gathered(self._embed)

    def go_to(self, sublayer: Sublayer, changes: Changes) -> None:
        """On to its entrance, through those before it that are ahead, with the changes."""
        first = self._together(sublayer)[0]
        self._pass([ahead for ahead in self._ahead if ahead < first], changes)

    def go_behind(self, sublayer: Sublayer, changes: Changes) -> None:
        """On to where it ends, through it if it is ahead."""
        last = self._together(sublayer)[-1]
        self._pass([ahead for ahead in self._ahead if ahead <= last], changes)

    def finish(self, changes: Changes) -> Tensor:
        """Through all that are ahead: what leaves the last layer, (n, T, d)."""
        self._pass(self._ahead, changes)
        return self.hidden

    @torch.no_grad()
    def look(
        self, sublayer: Sublayer, modules: Sequence[nn.Module], changes: Changes, visit: Look
    ) -> None:
        """Runs the sublayer, which is the next one, batch after batch without passing it; `visit`
        sees what its modules do."""
        together = self._together(sublayer)
        assert self._ahead[: len(together)] == together

        def run_batch(samples: slice) -> None:
            with capturing(modules) as captured:
                leaving = self.run(together, samples)
            visit(samples, [captured[module] for module in modules], leaving)

        with self._model.changed(changes):
            self._batches.run(len(self.hidden), run_batch)

    @torch.no_grad()
    def divergence(self, wanted: Tensor, changes: Changes) -> float:
        """Mean divergence of the next-token distributions (nats per token) from those that follow
        from `wanted`, the dense model's last output (n, T, d), if the rest of the way is gone with
        the changes."""
        divergences = torch.zeros(len(self.hidden), dtype=torch.float64, device=self.hidden.device)

        def run_batch(samples: slice) -> None:
            leaving = self.run(self._ahead, samples)
            of_batch = divergences_from(
                self._model, leaving, wanted[samples], self.input_ids[samples]
            )
            divergences[samples] = of_batch.double().to(divergences.device)

        with self._model.changed(changes):
            self._batches.run(len(self.hidden), run_batch)
        return summed(divergences.sum().cpu()).item() / self._tokens

    @torch.no_grad()
    def _pass(self, sublayers: Sequence[Sublayer], changes: Changes) -> None:
        """Through the first of those that are ahead."""
        if not sublayers:
            return
        with self._model.changed(changes):
            self.hidden = self._gathered(lambda samples: self.run(sublayers, samples))
        self._ahead = self._ahead[len(sublayers) :]

    def run(self, sublayers: Sequence[Sublayer], samples: slice) -> Tensor:
        """What some of the samples become in these, (n, T, d), if they come next."""
        hidden = self.hidden[samples]
        for piece in self._pieces(sublayers, len(hidden)):
            hidden = piece.run(hidden)
        return hidden

    def _together(self, sublayer: Sublayer) -> list[Sublayer]:
        """What can only be run at once: where sublayers are not one behind the other, those of a
        layer."""
        if self._model.architecture.unpaired is None:
            return [sublayer]
        return sublayers_of([sublayer.layer])

    def _pieces(self, sublayers: Sequence[Sublayer], samples: int) -> Iterator[Piece]:
        """To run so many samples through; where both sublayers of a layer come, the layer as a
        whole."""
        for index, of_layer in groupby(sublayers, lambda sublayer: sublayer.layer):
            call = self._calls.of(index, samples)
            yield Piece(self._model.of_sublayers(list(of_layer)), call)

    def _embed(self, samples: slice) -> Tensor:
        return record_layer_calls(self._model, self.input_ids[samples])[0]

    def _gathered(self, compute: Callable[[slice], Tensor]) -> Tensor:
        """What `compute` gives of all samples, (n, T, d), in batches."""
        parts: list[Tensor] = []
        self._batches.run(len(self.input_ids), lambda samples: parts.append(compute(samples)))
        return torch.cat(parts)
