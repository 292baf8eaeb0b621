"""GradMAP's own: the size of the loss gradient (Eq. 5-7)."""

from __future__ import annotations

from torch import Tensor

from gradmap.common.distributed import share_of
from gradmap.methods.gradmap.scores import fitting_batches, layer_scores, streamed_layer_scores
from gradmap.methods.selection import Advance, Selection, Subject
from gradmap.model.architectures import without_layers


class GradientScorer:
    """Eq. 7. Streamed, hidden states that enter layers before the first removed one are kept
    between rounds."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._input_ids = subject.calibration.input_ids
        self._batches = fitting_batches(
            subject.model, subject.architecture, self._input_ids, subject.streamed
        )
        self._entering: list[Tensor] = []
        self._last_alive: list[int] = []

    def work(self, alive: int) -> int:
        return 2 * alive * len(share_of(self._input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        removed = so_far.removal_order
        model, architecture = self._subject.model, self._subject.architecture
        alive = self._subject.alive(removed)
        # What enters the first layer that is gone since the last round now enters the one after it.
        gone = [place for place, layer in enumerate(self._last_alive) if layer in removed]
        del self._entering[gone[0] + 1 if gone else len(self._entering) :]
        with without_layers(model, architecture, removed):
            if self._subject.streamed:
                scores = streamed_layer_scores(
                    model, architecture, self._input_ids, self._batches, self._entering, advance
                )
            else:
                scores = layer_scores(model, architecture, self._input_ids, self._batches, advance)
        self._last_alive = alive
        return dict(zip(alive, scores.tolist(), strict=True))
