"""What is found of a machine, and what follows from it."""

import os
import subprocess
import sys

import pytest

from gradmap.common import machine
from gradmap.common.machine import Rates, available_bytes, measure_cpu, usable_cores
from gradmap.model import precision
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.loading import resolve_dtype

# What oneDNN and torch are told, so that a CPU with native bfloat16 computes as one without.
WITHOUT_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
NATIVE = Rates({"float32": 100.0, "bfloat16": 400.0, "float16": 30.0})
EMULATED = Rates({"float32": 68.0, "bfloat16": 15.0, "float16": 16.0})


@pytest.fixture
def on(monkeypatch):
    """Makes the CPU one with these rates."""

    def pretend(rates):
        for module in (machine, precision):
            monkeypatch.setattr(module, "measure_cpu", lambda: rates)
        precision.announce.cache_clear()
        precision.warn_if_slow.cache_clear()

    return pretend


def test_a_container_s_quota_counts_where_it_is_less_than_the_cores(tmp_path):
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == cores  # no cgroup there
    for quota, expected in (
        ("max 100000", cores),
        ("100000 100000", 1),
        ("50000 100000", 1),
        (f"{99 * 10**5} 100000", cores),
    ):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert usable_cores(tmp_path) == expected


def test_a_container_s_limit_counts_where_less_is_left_of_it(tmp_path):
    free = available_bytes(tmp_path)
    for limit, expected in (("1000", 600), ("max", free)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("400\n")
        assert available_bytes(tmp_path) == pytest.approx(expected, rel=0.2)


def test_files_that_were_read_do_not_fill_a_container(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert available_bytes(tmp_path) == 100
    stat = (
        "anon 200\nfile 650\nshmem 50\ninactive_anon 60\nactive_anon 190\ninactive_file "
        "500\nactive_file 100\n"
    )
    (tmp_path / "memory.stat").write_text(stat)
    assert available_bytes(tmp_path) == 700


@pytest.mark.parametrize(("rates", "expected"), [(NATIVE, "autocast"), (EMULATED, "float32")])
def test_auto_is_what_the_cpu_multiplies_fastest(picos, on, capsys, rates, expected):
    on(rates)
    checkpoint = open_checkpoint(str(picos["llama"].directory))
    for _ in range(2):
        assert resolve_dtype("auto", "cpu", checkpoint) == expected
    said = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("Computing in")
    ]
    assert said == [f"Computing in {expected} (found: {rates.describe()})"]


@pytest.mark.parametrize(
    ("stored", "capability", "expected"),
    [
        ("bfloat16", (8, 0), "bfloat16"),
        ("bfloat16", (7, 5), "float32"),
        ("float16", (9, 0), "float16"),
        ("float16", (7, 5), "float16"),
        ("float32", (9, 0), "autocast"),
        ("float32", (7, 5), "float32"),
    ],
)
def test_auto_on_a_gpu_is_what_is_stored_unless_that_is_emulated(
    monkeypatch, stored, capability, expected
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda index: ((9, 0), capability)[index]
    )
    assert precision.fastest_dtype(stored, "cuda:0") == expected


def test_an_explicit_choice_is_obeyed_and_its_cost_said(picos, on, capsys):
    on(EMULATED)
    checkpoint = open_checkpoint(str(picos["llama"].directory))
    assert resolve_dtype("bfloat16", "cpu", checkpoint) == "bfloat16"
    assert "--dtype bfloat16 computes 4.5 times as slowly as float32" in capsys.readouterr().err
    assert resolve_dtype("float32", "cpu", checkpoint) == "float32"
    on(NATIVE)
    assert resolve_dtype("autocast", "cpu", checkpoint) == "autocast"
    assert "Warning" not in capsys.readouterr().err


def test_a_cpu_whose_products_are_limited_to_avx2_is_found_out():
    """The slow path can be forced on a fast machine."""
    code = "from gradmap.common.machine import *; print(bfloat16_pays(), multiplies_int8_exactly())"
    environment = {**os.environ, **WITHOUT_BFLOAT16}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == ["False", "False"]  # nor has AVX2 the 8-bit products of VNNI


@pytest.mark.parametrize("slower", [True, False])
def test_threads_that_wait_for_each_other_are_said(monkeypatch, capsys, slower):
    threads = [2]
    monkeypatch.setattr("torch.get_num_threads", lambda: threads[0])
    monkeypatch.setattr("torch.set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(machine, "limit_threads", lambda: None)
    seconds = {1: 1.0, 2: 3.0 if slower else 0.6}
    monkeypatch.setattr(machine, "_seconds_of_product", lambda inputs, weight: seconds[threads[0]])
    machine.warn_if_threads_hinder.cache_clear()
    machine.warn_if_threads_hinder()
    assert ("2 threads take 3.0 times as long as one" in capsys.readouterr().err) is slower
    assert threads == [2]


def test_every_dtype_is_measured():
    assert measure_cpu().by_dtype.keys() == {"float32", "bfloat16", "float16"}
    assert min(measure_cpu().by_dtype.values()) > 0
    assert measure_cpu().ratio("float32") == 1
