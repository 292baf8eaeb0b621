"""What is sampled while a load runs; NVML is a fake."""

import time

import pytest

from loadtest import resources
from loadtest.records import Cell
from loadtest.resources import sampled
from tests.fake_nvml import GIB, Card, FakeNvml, Slice

CARDS = (
    Card("GPU-aaaa"),
    Card("GPU-bbbb", 24 * GIB),
    Card("GPU-cccc", slices=(Slice("MIG-0001"),)),
)


@pytest.fixture
def gpus_of(monkeypatch):
    """Returns `gpus_of(variable, cards)`: of the first sample, what is told of each GPU."""
    monkeypatch.setattr(resources, "INTERVAL_S", 0.01)

    def gpus_of(variable, cards=CARDS):
        nvml = FakeNvml(cards)
        nvml.install(monkeypatch)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        with sampled(Cell("dense", 0, "one")) as samples:
            while not samples:
                time.sleep(0.01)
        assert nvml.opened == 0
        return samples[0].gpus

    return gpus_of


def test_only_gpus_that_the_server_may_use_are_sampled(gpus_of):
    (gpu,) = gpus_of("1")
    assert gpu.memory_bytes == 12 * GIB
    assert (gpu.utilisation, gpu.power_w, gpu.clock_mhz, gpu.throttled) == (0.5, 300.0, 1500, False)
    assert [gpu.memory_bytes for gpu in gpus_of("GPU-bbbb,GPU-aaaa")] == [12 * GIB, 40 * GIB]
    assert gpus_of("") == gpus_of("GPU-typo") == gpus_of("0", cards=()) == ()


def test_a_slice_tells_its_memory_and_not_its_neighbours_power(gpus_of):
    (gpu,) = gpus_of("MIG-0001")
    assert gpu.memory_bytes == 5 * GIB
    assert (gpu.utilisation, gpu.power_w, gpu.clock_mhz, gpu.throttled) == (None,) * 4
