"""Which GPUs vLLM will compute on, and what is refused because of them; NVML is a fake."""

from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from serving import machine
from serving.identity import Identity, Trust
from serving.launch import Launch, run
from serving.log import Log
from serving.machine import Gpu, dtype_flags, require_gpu_memory, require_gpus
from serving.ports import free_port
from serving.settings import ServerSettings
from serving.supervisor import Policy
from tests.deploy.manifests import parse_vllm
from tests.fake_nvml import GIB, Card, FakeNvml, Slice

SMALL, LARGE = Gpu(24 * GIB, (7, 5)), Gpu(80 * GIB, (9, 0))
CARDS = (
    Card("GPU-aaaa", SMALL.total_bytes, SMALL.capability),
    Card("GPU-bbbb"),
    Card("GPU-cccc"),
    Card("GPU-dddd"),
)
IN_MIG_MODE = (
    Card("GPU-eeee", capability=(8, 0), slices=(Slice("MIG-0001", 3, 0, 20 * GIB),)),
    Card("GPU-ffff"),
)


@pytest.fixture
def gpus_of(monkeypatch, tmp_path):
    """Returns `gpus_of(*flags, visible=None, cards=CARDS)`: the GPUs that vLLM's CUDA build would
    compute on."""

    def gpus_of(*flags, visible=None, cards=CARDS):
        FakeNvml(cards).install(monkeypatch)
        monkeypatch.setattr(machine, "is_cpu_build", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return require_gpus(ServerSettings(tmp_path, vllm_flags=flags, environment=environment))

    return gpus_of


def test_vllm_computes_on_the_first_gpu_that_it_sees(gpus_of):
    assert gpus_of() == (SMALL,)
    assert gpus_of(visible="GPU-bb,GPU-aa") == (LARGE,)
    assert gpus_of(visible="0") == (SMALL,)


def test_the_variable_of_this_process_is_the_servers_too(gpus_of, monkeypatch, tmp_path):
    gpus_of()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert require_gpus(ServerSettings(tmp_path)) == (LARGE,)


def test_a_slice_has_its_own_memory_and_its_cards_capability(gpus_of):
    for visible in ("MIG-0001", "MIG-GPU-eeee/3/0", "GPU-eeee", "1"):
        assert gpus_of(visible=visible, cards=IN_MIG_MODE) == (Gpu(20 * GIB, (8, 0)),)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-parallel-size", "2"),
        ("--tensor_parallel_size=2",),
        ("--tensor", "2"),
        ("-tp", "2"),
        ("-tp=2",),
        ("-t", "2"),
        ("-tp", "4", "-tp", "2"),
        ("-pp=2",),
        ("--pipe", "2"),
        ("--tensor-p=2", "-pp", "2"),
    ],
)
def test_flags_say_how_many_gpus_as_vllm_reads_them(gpus_of, tmp_path, flags):
    asked = parse_vllm(["/model", *flags], tmp_path)
    count = asked.tensor_parallel_size * asked.pipeline_parallel_size
    assert 1 < count == len(gpus_of(*flags))
    with pytest.raises(
        UserError,
        match=rf"needs {count} GPUs and sees 1 \(CUDA_VISIBLE_DEVICES=3\); let it see more",
    ):
        gpus_of(*flags, visible="3")


def test_more_gpus_than_the_machine_has_are_refused(gpus_of):
    with pytest.raises(
        UserError, match=r"needs 8 GPUs and sees 4 \(CUDA_VISIBLE_DEVICES is not set\)"
    ):
        gpus_of("-tp", "8")


@pytest.mark.parametrize("visible", ["", "-1", "GPU-typo", "7", "1,1"])
def test_a_variable_that_hides_all_gpus_is_refused(gpus_of, visible):
    with pytest.raises(
        UserError, match=rf"needs 1 GPU and sees 0 \(CUDA_VISIBLE_DEVICES={visible}\)"
    ):
        gpus_of(visible=visible)


def test_a_server_that_sees_no_gpu_is_not_started(gpus_of, picos, monkeypatch, tmp_path):
    gpus_of()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-typo")
    settings = ServerSettings(Path(), port=free_port())
    launch = Launch(
        [picos["llama"].directory], settings, Policy(), "127.0.0.1", free_port(), [Trust()]
    )
    with pytest.raises(UserError, match="needs 1 GPU and sees 0"):
        run(launch, Log(tmp_path / "log"))


def test_vllm_on_a_cpu_needs_no_gpu(gpus_of, monkeypatch, tmp_path):
    assert gpus_of("-tp", "2", cards=()) == ()
    gpus_of()
    monkeypatch.setattr(machine, "is_cpu_build", lambda: True)
    assert require_gpus(ServerSettings(tmp_path, vllm_flags=("-tp", "2"))) == ()


@pytest.mark.parametrize(
    "flags",
    [
        ("--nnodes", "2"),
        ("-n=2",),
        ("--device-ids=1,2",),
        ("--distributed-executor-backend", "ray"),
    ],
)
def test_gpus_that_are_placed_elsewhere_cannot_be_checked_here(gpus_of, tmp_path, flags):
    asked = ("-tp", "8", *flags)
    gpus = gpus_of(*asked)
    assert gpus == (SMALL, LARGE, LARGE, LARGE)
    require_gpu_memory(
        ServerSettings(tmp_path, vllm_flags=asked), Identity("model", weight_bytes=1000 * GIB), gpus
    )


@pytest.mark.parametrize(
    ("flag", "name"), [("-tp=two", "--tensor-parallel-size"), ("-pp=0", "--pipeline-parallel")]
)
def test_a_number_of_gpus_is_a_number(gpus_of, flag, name):
    with pytest.raises(UserError, match=rf"{name}.* is (two|0); give a number of GPUs"):
        gpus_of(flag)


def test_weights_must_fit_the_gpu(tmp_path):
    identity = Identity("model", weight_bytes=75 * GIB)
    with pytest.raises(
        UserError, match=r"take 75\.0 GiB, and vLLM has 73\.6 GiB there; .*--tensor-parallel-size N"
    ):
        require_gpu_memory(ServerSettings(tmp_path), identity, [LARGE])
    require_gpu_memory(ServerSettings(tmp_path), identity, [LARGE, LARGE])


def test_the_smallest_of_several_gpus_must_hold_its_part(tmp_path):
    require_gpu_memory(
        ServerSettings(tmp_path), Identity("model", weight_bytes=44 * GIB), [SMALL, LARGE]
    )
    with pytest.raises(
        UserError, match=r"take 22\.5 GiB on each of 2 GPUs, and vLLM has 22\.1 GiB there"
    ):
        require_gpu_memory(
            ServerSettings(tmp_path), Identity("model", weight_bytes=45 * GIB), [LARGE, SMALL]
        )


@pytest.mark.parametrize(
    "flags",
    [
        ("--gpu-memory-utilization", "0.46"),
        ("--gpu_memory_utilization=0.46",),
        ("--gpu-mem", "0.46"),
    ],
)
def test_weights_must_fit_the_share_of_the_gpu(tmp_path, flags):
    settings = ServerSettings(tmp_path, vllm_flags=flags)
    require_gpu_memory(settings, Identity("model", weight_bytes=36 * GIB), [LARGE])
    with pytest.raises(UserError, match=r"36\.8 GiB there"):
        require_gpu_memory(settings, Identity("model", weight_bytes=37 * GIB), [LARGE])


def test_a_share_of_the_gpu_is_a_number(tmp_path):
    settings = ServerSettings(tmp_path, vllm_flags=("--gpu-memory-utilization=half",))
    with pytest.raises(UserError, match="is half; give a share of the GPU"):
        require_gpu_memory(settings, Identity("model", weight_bytes=1), [LARGE])


def test_old_gpus_get_float16():
    assert dtype_flags([SMALL], ()) == dtype_flags([LARGE, SMALL], ()) == ("--dtype", "float16")
    for given in ("--dtype=float32", "--dt=float32"):
        assert dtype_flags([SMALL], (given,)) == ()
    assert dtype_flags([LARGE], ()) == ()  # without one: tests/serving/test_checks.py
