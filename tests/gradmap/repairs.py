"""A pico model without some layers, and what its repairs are computed from."""

import torch

from gradmap.data.calibration import Calibration
from gradmap.methods.compensation import Pruned, run_and_capture
from gradmap.model.batching import Batches
from gradmap.model.corrections import linear_output

REMOVED = (1, 3)
LAYER = 4


def prune(pico, input_ids, batch_size=2, removed=REMOVED):
    """Input ids (N, T) to fit on; the first of them are held out too."""
    calibration = Calibration("test", 0, torch.cat([input_ids, input_ids[:2]]))
    pruned = Pruned(pico.layered(), calibration, removed, Batches(batch_size))
    assert torch.equal(calibration.fit_ids, input_ids)
    return pruned


def activations(pruned, refit, layer=LAYER):
    """F and D of one layer as (n, f) and (n, d) float64, from whole forward passes."""
    ids = pruned.calibration.fit_ids
    module = pruned.model.layers[layer]
    projection = pruned.model.architecture.down_projection_of(module)
    ((_, dense),) = run_and_capture(pruned.model, [module], ids)
    with pruned.model.without(REMOVED):
        (_, given), (inputs, output) = run_and_capture(pruned.model, [module, projection], ids)
    features = inputs if refit else linear_output(projection, output)
    return features.flatten(end_dim=-2), (dense - given).flatten(end_dim=-2)
