"""A pico model without some layers, and what its repairs are computed from."""

import torch

from gradmap.data.calibration import Calibration
from gradmap.methods.compensation import Pruned, run_and_capture
from gradmap.model.batching import Batches
from gradmap.model.corrections import linear_output
from gradmap.model.sublayers import sublayers_left
from tests.gradmap.removals import pairs

REMOVED = pairs(1, 3)
LAYER = 4


def prune(pico, input_ids, batch_size=2, removed=REMOVED):
    """Input ids (N, T) to fit on; the first of them are held out too."""
    calibration = Calibration("test", 0, torch.cat([input_ids, input_ids[:2]]))
    pruned = Pruned(pico.layered(), calibration, removed, Batches(batch_size))
    assert torch.equal(calibration.fit_ids, input_ids)
    return pruned


def states_between(model, ids, removed=(), changes=None):
    """What enters the first sublayer that is left, and what follows each of them, (N, T, d) all;
    from one pass of the whole model: what enters the norm of an FFN, and what leaves a layer."""
    norm = model.architecture.feed_forward[0]
    with model.changed(changes or {}, without=removed):
        layers = list(model.layers)
        norms = [layer.get_submodule(norm) for layer in layers]
        captured = run_and_capture(model, [*norms, *layers], ids)
    behind_attentions, of_layers = captured[: len(layers)], captured[len(layers) :]
    states = [of_layers[0][0]]
    for (behind_attention, _), (_, behind_ffn) in zip(behind_attentions, of_layers, strict=True):
        states += [behind_attention.reshape(behind_ffn.shape), behind_ffn]
    return states


def states_behind(model, ids, removed=(), changes=None):
    """What follows each sublayer that is left, by sublayer: see `states_between`."""
    _, *states = states_between(model, ids, removed, changes)
    return dict(zip(sublayers_left(len(model.layers), removed), states, strict=True))


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
