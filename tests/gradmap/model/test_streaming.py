"""Scores and plans of a model of which one layer at a time is in memory."""

import json
import os
import shutil
import threading

import pytest
import torch

from gradmap.common.errors import UserError
from gradmap.costs.timing import READS_PER_ROUND
from gradmap.data.calibration import Calibration
from gradmap.methods.compensation import Pruned
from gradmap.methods.gradmap.scores import (
    gradient_scores,
    gradient_scores_reference,
    streamed_gradient_scores,
)
from gradmap.methods.sequential import project_around_runs
from gradmap.methods.shortgpt import block_influences
from gradmap.model.batching import Batches
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import run_layers
from gradmap.model.loading import load_model
from gradmap.model.safetensors_reader import list_tensors
from gradmap.model.streaming import _TensorsOnDisk
from gradmap.model.sublayers import sublayers_left, sublayers_of
from gradmap.model.walk import Walk
from tests.command_line import gradmap
from tests.conftest import inside
from tests.families import LAYERS
from tests.gradmap.pruning.test_prune import prune_arguments
from tests.gradmap.removals import attention, ffn, pairs


def layers_in_memory(pico, model):
    return count_in_memory(pico.architecture.layer_list(model))


def count_in_memory(layers):
    return sum(not any(parameter.is_meta for parameter in layer.parameters()) for layer in layers)


def test_streamed_scores_equal_the_reference(pico, input_ids):
    model = load_model(pico.checkpoint, "float64", streamed=True)
    assert layers_in_memory(pico, model) == 0
    actual = streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(2), [])
    assert layers_in_memory(pico, model) == 1
    expected = gradient_scores_reference(pico.layered(), input_ids)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_hidden_states_before_the_first_removal_are_used_again(pico, input_ids):
    model = load_model(pico.checkpoint, "float64", streamed=True)
    entering: list = []
    streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(5), entering)
    del entering[3:]  # layer 2 goes
    kept = list(entering)
    with LayeredModel.of(model).without(pairs(2)):
        actual = streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(5), entering)
    assert all(one is other for one, other in zip(kept, entering, strict=False))
    whole = pico.load()
    with LayeredModel.of(whole).without(pairs(2)):
        expected = gradient_scores(LayeredModel.of(whole), input_ids, Batches(5))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_a_layer_is_read_only_where_it_runs(picos, input_ids, monkeypatch):
    """Not for embeddings, for logits, or for the arguments of the layers, and not if it is
    removed."""
    pico, reads = picos["llama"], []
    model = load_model(pico.checkpoint, "float64", streamed=True)
    read = _TensorsOnDisk.read
    monkeypatch.setattr(
        _TensorsOnDisk, "read", lambda self, layer: reads.append(layer) or read(self, layer)
    )
    walk = Walk(LayeredModel.of(model), sublayers_of([0, 2, 4]), input_ids, Batches(len(input_ids)))
    walk.go_to(attention(2), {})
    walk.divergence(walk.hidden, {})
    assert reads == [0, 2, 4]
    reads.clear()
    streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(2), [])
    forward_and_backward = READS_PER_ROUND * LAYERS - 1  # the last layer runs twice in a row
    assert reads.count(LAYERS - 1) == 1 and len(reads) == forward_and_backward


@pytest.fixture
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def read_ahead(monkeypatch, ahead=True):
    """As for a GPU."""
    monkeypatch.setattr("gradmap.model.streaming.reads_ahead", lambda device: ahead)


def test_the_next_layer_is_read_while_one_is_computed(
    picos, input_ids, monkeypatch, no_thread_is_left
):
    """Forward and backward, without the layer that is removed, and no more than two are held."""
    read_ahead(monkeypatch)
    pico = picos["llama"]
    model = load_model(pico.checkpoint, "float64", streamed=True)
    layers = list(pico.architecture.layer_list(model))
    reads, held, unplaced, arrived = [], [], [], threading.Condition()
    read, place = _TensorsOnDisk.read, _TensorsOnDisk.place

    def recorded_read(self, layer):
        unplaced.append(layer)
        held.append(layers_in_memory(pico, model) + len(unplaced))
        tensors = read(self, layer)
        with arrived:
            reads.append(layer)
            arrived.notify()
        return tensors

    def recorded_place(self, tensors):
        place(self, tensors)
        unplaced.pop(0)

    # so many were read by the end of each layer's run, though nobody has asked for the last of them
    # yet
    runs = iter([(0, 2), (1, 3), (3, 4), (4, 4), (4, 4), (3, 6), (1, 7), (0, 7)])

    def wait_for_the_next(layer, args, output):
        if "forward" not in vars(layer):
            index, count = next(runs)
            assert layer is layers[index]
            with arrived:
                assert arrived.wait_for(lambda: len(reads) == count, timeout=60), reads

    monkeypatch.setattr(_TensorsOnDisk, "read", recorded_read)
    monkeypatch.setattr(_TensorsOnDisk, "place", recorded_place)
    for layer in layers:
        layer.register_forward_hook(wait_for_the_next)
    with LayeredModel.of(model).without(pairs(2)):
        actual = streamed_gradient_scores(
            LayeredModel.of(model), input_ids, Batches(len(input_ids)), []
        )
    assert reads == [0, 1, 3, 4, 3, 1, 0]
    assert held == [1, 2, 2, 2, 1, 2, 2]
    whole = pico.load()
    with LayeredModel.of(whole).without(pairs(2)):
        expected = gradient_scores(LayeredModel.of(whole), input_ids, Batches(5))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)


def test_a_layer_that_was_read_in_vain_is_let_go(picos, input_ids, monkeypatch, no_thread_is_left):
    read_ahead(monkeypatch)
    pico = picos["mixtral"]
    model, whole = load_model(pico.checkpoint, "float64", streamed=True), pico.load()
    walks = [
        Walk(LayeredModel.of(one), sublayers_of([0, 2, 4]), input_ids, Batches(len(input_ids)))
        for one in (model, whole)
    ]
    streamed, at_once = (walk.divergence(walks[1].hidden, {}) for walk in walks)
    assert streamed == pytest.approx(at_once, rel=1e-7)
    assert layers_in_memory(pico, model) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_is_cut_short_meanwhile_is_named(
    picos, input_ids, monkeypatch, tmp_path, no_thread_is_left, ahead
):
    read_ahead(monkeypatch, ahead)
    pico, directory = picos["llama"], tmp_path / "model"
    shutil.copytree(pico.directory, directory)
    (file,) = directory.glob("*.safetensors")
    model = load_model(open_checkpoint(str(directory)), "float64", streamed=True)
    os.truncate(
        file,
        min(stored.offset for stored in list_tensors(file) if ".layers.1." in stored.spec.name),
    )
    with pytest.raises(
        UserError, match=f"^{file} was cut short while it was read; copy it again.$"
    ):
        streamed_gradient_scores(LayeredModel.of(model), input_ids, Batches(2), [])


UNITS_LEFT = {
    "layers": ("layer", ()),
    "a layer of two": ("layer", pairs("M0+A1", 3)),
    "sublayers": ("pair", ()),
    "sublayers of a layer of two": ("pair", pairs("M0+A1", 3)),
}


@pytest.fixture(params=UNITS_LEFT)
def left(request):
    """What goes at a time, and what is gone."""
    return UNITS_LEFT[request.param]


@pytest.mark.parametrize("ahead", [False, True])
def test_pairs_are_scored_from_disk_as_in_memory(pico, input_ids, monkeypatch, ahead, left):
    read_ahead(monkeypatch, ahead)
    unit, removed = left
    model = LayeredModel.of(load_model(pico.checkpoint, "float64", streamed=True))
    whole = pico.layered()
    with model.without(removed), whole.without(removed):
        actual = streamed_gradient_scores(model, input_ids, Batches(2), [], unit)
        torch.testing.assert_close(
            actual, gradient_scores(whole, input_ids, Batches(2), unit), rtol=1e-7, atol=0
        )
        torch.testing.assert_close(
            block_influences(model, input_ids, unit),
            block_influences(whole, input_ids, unit),
            rtol=1e-7,
            atol=0,
        )


def test_a_layer_of_two_is_read_from_both_and_only_they_are_held(picos, input_ids, monkeypatch):
    pico, reads, held = picos["llama"], [], []
    model = load_model(pico.checkpoint, "float64", streamed=True)
    read = _TensorsOnDisk.read
    monkeypatch.setattr(
        _TensorsOnDisk, "read", lambda self, layer: reads.append(layer) or read(self, layer)
    )
    layered = LayeredModel.of(model)
    layers = list(layered.layers)
    for layer in layers:
        layer.register_forward_hook(lambda *args: held.append(count_in_memory(layers)))
    with layered.without(pairs("M1+A2", 3)):
        run_layers(layered, input_ids)
    assert reads == [0, 1, 2, 4]
    assert held == [0, 0, 0, 1, 2, 1]  # what they are called with is asked first, and runs none
    reads.clear()
    held.clear()
    left = sublayers_left(LAYERS, pairs("M1+A2", 3))
    walk = Walk(layered, left, input_ids, Batches(len(input_ids)))
    walk.go_to(ffn(4), {})
    assert reads == [0, 1, 2, 4]
    assert max(held) == count_in_memory(layers) == 1


def test_what_a_layer_of_two_needs_is_read_ahead_and_once(
    picos, input_ids, monkeypatch, no_thread_is_left
):
    """Forward and backward: of the two, the one that is on its way is taken first."""
    read_ahead(monkeypatch)
    reads, read = [], _TensorsOnDisk.read
    model = LayeredModel.of(load_model(picos["llama"].checkpoint, "float64", streamed=True))
    monkeypatch.setattr(
        _TensorsOnDisk, "read", lambda self, layer: reads.append(layer) or read(self, layer)
    )
    with model.without(pairs("M1+A2")):
        streamed_gradient_scores(model, input_ids, Batches(len(input_ids)), [])
    assert reads == [0, 1, 2, 3, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("removed", [pairs(2), pairs("M0+A1", 3)])
def test_sequential_repairs_from_disk_as_in_memory(picos, input_ids, removed):
    pico, found = picos["llama"], []
    calibration = Calibration("random", 0, input_ids, held_out=2)
    for model in (load_model(pico.checkpoint, "float64", streamed=True), pico.load()):
        pruned = Pruned(LayeredModel.of(model), calibration, removed, Batches(len(input_ids)))
        found.append(project_around_runs(pruned).corrections)
    assert [made.place for made in found[0]] == [made.place for made in found[1]]
    assert len(found[0]) == 2 * len(removed)  # on either side
    for streamed, whole in zip(*found, strict=True):
        torch.testing.assert_close(
            inside(streamed).matrix, inside(whole).matrix, rtol=1e-7, atol=1e-9
        )
        assert streamed.held_out_divergence_after == pytest.approx(
            whole.held_out_divergence_after, rel=1e-7
        )


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ()),
        ("mixtral", ()),
        ("llama", ("--unit", "pair", "--selector", "block-influence")),
    ],
)
def test_a_streamed_plan_is_that_of_the_whole_model(picos, word_file, tmp_path, family, flags):
    plans = []
    for name, streaming in (("whole", ()), ("streamed", ("--stream",))):
        arguments = prune_arguments(picos[family], word_file, tmp_path / name, remove=3)
        finished = gradmap(*arguments, *flags, *streaming)
        assert finished.returncode == 0, finished.stderr
        plans.append(json.loads((tmp_path / name / "plan.json").read_text()))
    whole, streamed = plans
    assert streamed["removal_order"] == whole["removal_order"]
    assert streamed["corrections"] == [
        {
            key: pytest.approx(value, rel=1e-7) if isinstance(value, float) else value
            for key, value in one.items()
        }
        for one in whole["corrections"]
    ]


def test_smollm2_is_scored_the_same_from_disk(smollm2):
    from gradmap.data.calibration import build_calibration
    from gradmap.model.loading import load_tokenizer
    from tests.conftest import BOOLQ

    ids = build_calibration(
        load_tokenizer(smollm2.directory), BOOLQ, samples=2, tokens=128, seed=42
    ).input_ids
    streamed = streamed_gradient_scores(
        LayeredModel.of(load_model(smollm2, "float32", streamed=True)), ids, Batches(2), []
    )
    expected = gradient_scores(LayeredModel.of(load_model(smollm2, "float32")), ids, Batches(2))
    # the same operations in the same order, but for the loss gradient's
    torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=0)
