"""What of a machine's GPUs a process may use, by what CUDA_VISIBLE_DEVICES says; NVML is a fake."""

import pynvml
import pytest

from gradmap.common.gpus import ask, visible_gpus
from tests.fake_nvml import Card, FakeNvml, Slice

PLAIN = tuple(Card(f"GPU-{letters}") for letters in ("aaaa-1", "aabb-2", "cccc-3"))
# One card in three GPU instances, of which the second has two compute instances, beside a whole
# card.
SLICED = (
    Card(
        "GPU-aaaa-1",
        slices=(
            Slice("MIG-0001", 3),
            Slice("MIG-0102", 5, 0),
            Slice("MIG-0103", 5, 1),
            Slice("MIG-0204", 9),
        ),
    ),
    Card("GPU-bbbb-2"),
)


def visible(cards, monkeypatch, variable=None):
    """The UUIDs of what is shown."""
    nvml = FakeNvml(cards)
    nvml.install(monkeypatch)
    with visible_gpus({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) as devices:
        assert nvml.opened == 1
    assert nvml.opened == 0
    return [device.uuid for device in devices]


@pytest.mark.parametrize(
    ("variable", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("2,0", [2, 0]),
        (" 1, +2", [1, 2]),
        ("1x", [1]),
        ("0,-1,1", [0]),
        ("0,3,1", [0]),
        ("3", []),
        ("1,1", []),
        ("0,2,0", []),
        ("GPU-cccc-3,GPU-aaaa-1", [2, 0]),
        ("GPU-c,GPU-aab", [2, 1]),
        ("GPU-aa", []),
        ("GPU-c,GPU-aa,GPU-aab", [2]),
        ("GPU-dddd", []),
        ("GPU-c,GPU-dddd,GPU-aab", [2]),
        ("GPU-c,GPU-cccc-3", []),
        ("0,GPU-c", [0]),
        ("GPU-c,0", [2]),
        ("MIG-0001", []),
    ],
)
def test_the_variable_names_gpus_and_their_order(variable, places, monkeypatch):
    assert visible(PLAIN, monkeypatch, variable) == [PLAIN[place].uuid for place in places]


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        (None, ["GPU-bbbb-2", "MIG-0001", "MIG-0102", "MIG-0204"]),
        ("MIG-0103", ["MIG-0103"]),
        ("MIG-0204,MIG-0001", ["MIG-0204", "MIG-0001"]),
        ("MIG-0103,MIG-0102", ["MIG-0103"]),
        ("MIG-02", ["MIG-0204"]),
        ("MIG-01", []),
        ("MIG-9999", []),
        ("MIG-0001,MIG-0001", []),
        ("MIG-GPU-aaaa-1/5/1", ["MIG-0103"]),
        ("MIG-GPU-aaaa-1/9/0,MIG-GPU-aaaa-1/3/0", ["MIG-0204", "MIG-0001"]),
        ("MIG-GPU-aaaa-1/5/2", []),
        ("MIG-GPU-bbbb-2/3/0", []),
        ("GPU-aaaa-1", ["MIG-0001"]),
        ("GPU-bbbb-2,GPU-aaaa-1", ["GPU-bbbb-2", "MIG-0001"]),
        ("0", ["GPU-bbbb-2"]),
        ("2,1", ["MIG-0102", "MIG-0001"]),
        ("4", []),
    ],
)
def test_a_gpu_in_mig_mode_is_used_through_its_slices(variable, shown, monkeypatch):
    assert visible(SLICED, monkeypatch, variable) == shown


def test_a_slice_that_is_a_machines_only_device_needs_no_name(monkeypatch):
    """As in a container that was given one."""
    alone = (Card("GPU-aaaa-1", slices=(Slice("MIG-0103", 5, 1),)),)
    for variable in (None, "0", "GPU-aaaa"):
        assert visible(alone, monkeypatch, variable) == ["MIG-0103"]


def test_a_gpu_in_mig_mode_without_slices_is_none(monkeypatch):
    cards = (Card("GPU-aaaa-1", slices=()), Card("GPU-bbbb-2"))
    assert visible(cards, monkeypatch) == visible(cards, monkeypatch, "0") == ["GPU-bbbb-2"]
    assert visible(cards, monkeypatch, "GPU-aaaa-1") == []


def test_a_gpu_that_this_process_may_not_use_is_not_counted(monkeypatch):
    cards = (Card("GPU-aaaa-1", forbidden=True), Card("GPU-bbbb-2"))
    assert visible(cards, monkeypatch) == visible(cards, monkeypatch, "0") == ["GPU-bbbb-2"]


def test_without_a_driver_there_are_none(monkeypatch):
    def refuse():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    with visible_gpus({}) as devices:
        assert devices == []


def test_nvml_is_shut_down_whatever_happens(monkeypatch):
    nvml = FakeNvml(PLAIN)
    nvml.install(monkeypatch)
    with pytest.raises(KeyError), visible_gpus({}):
        raise KeyError
    assert nvml.opened == 0


def test_what_a_device_does_not_tell_is_none(monkeypatch):
    FakeNvml(SLICED).install(monkeypatch)
    with visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-0001"}) as (device,):
        assert ask(pynvml.nvmlDeviceGetUtilizationRates, device.handle) is None
        assert ask(pynvml.nvmlDeviceGetUtilizationRates, device.card).gpu == 50
