"""The choice of a device and what is said of a wrong installation, with stand-ins for the GPUs."""

import threading
import types
import warnings

import pytest
import torch

from data.datasets import ArraySet
from data.prefetch import prefetch
from engine import device as devices
from engine import distributed
from models.resnet import choose_precision

BUILD_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.14 for CUDA 13.0
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version {}). Please update your GPU "
    "driver by downloading and installing a new version from the URL ..."
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU ..."


@pytest.fixture
def machine(monkeypatch):
    """machine(kind, count, capability): the accelerators that torch then seems to find."""

    def pretend(kind, count=1, capability=(8, 0), kernels=BUILD_13):
        found = torch.device(kind) if kind else None
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: found
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(devices, "cuda_problem", lambda: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")

    monkeypatch.setattr(devices, "current", devices.current)  # put back afterwards
    return pretend


@pytest.fixture
def driver(monkeypatch):
    """driver(message): a torch for CUDA 13.0 that meets this message when it starts CUDA."""

    def pretend(message, warned=True, built_for="13.0"):
        def is_available():
            if warned:
                warnings.warn("CUDA initialization: " + message, stacklevel=2)
            return False

        def init():
            raise RuntimeError(message)

        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available=False: (
                torch.device("cuda") if not check_available or torch.cuda.is_available() else None
            ),
        )

    return pretend


def refusal(*arguments):
    with pytest.raises(SystemExit) as end:
        devices.choose(*arguments)
    assert "\n" not in end.value.code
    return end.value.code


# ------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    "kind, expected",
    [
        (None, "cpu"),
        ("cuda", "cuda:0"),
        ("xpu", "xpu:0"),
        ("mps", "mps"),
    ],
)
def test_the_accelerator_is_taken_and_else_the_cpu(machine, kind, expected):
    machine(kind)
    assert devices.choose() == torch.device(expected)
    assert devices.choose("cpu") == torch.device("cpu")


def test_a_device_that_is_asked_for_is_taken(machine):
    machine("cuda", 4)
    assert devices.choose("cuda:2") == torch.device("cuda", 2)
    assert devices.choose("cuda") == torch.device("cuda", 0)
    machine("mps")
    assert devices.choose("mps") == torch.device("mps") == devices.choose("mps:0")


def test_the_gpu_is_not_touched_where_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(devices, "accelerator", lambda: pytest.fail("it was asked for"))
    assert devices.choose("cpu") == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused_by_naming_those_that_are(machine):
    machine("cuda", 2)
    assert "--device cuda:2 is not there" in refusal("cuda:2")
    for asked in ("cuda:2", "mps", "xpu:0", "gpu", "meta"):
        assert "sees cpu, cuda:0, cuda:1" in refusal(asked)
    machine("mps")
    assert refusal("cuda").endswith("sees cpu, mps here")
    machine(None)
    assert refusal("cuda:0").endswith("sees cpu here")


def test_under_torchrun_each_process_takes_its_own(machine):
    machine("cuda", 2)
    chosen = [devices.choose(None, process, 2) for process in range(2)]
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices.choose("cuda", 1, 2) == torch.device("cuda", 1)
    assert devices.choose("cpu", 1, 2) == torch.device("cpu")  # though there are GPUs
    assert "process 2 of this node has no GPU: there are 2" in refusal(None, 2, 3)
    assert "give --device cuda" in refusal("cuda:1", 0, 2)
    assert devices.choose("cuda:1", 0, 1) == torch.device("cuda", 1)  # a process of its own


def test_mps_which_has_no_collectives_is_for_one_process(machine):
    machine("mps")
    assert devices.choose(None, 1, 2) == torch.device("cpu")
    assert "no collectives" in refusal("mps", 0, 2)


def test_the_backend_follows_the_device():
    expected = {"cuda": "nccl", "xpu": "xccl", "mps": "gloo", "cpu": "gloo"}
    assert {kind: devices.backend(kind) for kind in expected} == expected


@pytest.mark.parametrize(
    "reports, sentence",
    [
        ([("it is not there", None, None, "a")] * 2, "it is not there"),
        (
            [(None, "cuda", None, "a")] * 2 + [(None, "cpu", "its driver", "b")],
            "process 2 on one of kind cpu (its driver)",
        ),
    ],
)
def test_processes_without_a_device_or_of_two_kinds_end_with_one_sentence(
    monkeypatch, reports, sentence
):
    monkeypatch.setattr(distributed, "object_store", types.SimpleNamespace(close=lambda: None))
    codes = []
    for own in range(len(reports)):
        with pytest.raises(SystemExit) as end:
            distributed.refuse_unlike(reports, own)
        codes.append(end.value.code)
    assert sentence in codes[0]
    assert set(codes[1:]) == {1}
    distributed.refuse_unlike([(None, "cpu", None, "a"), (None, "cpu", None, "b")], 0)


# ------------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize(
    "kernels, capability, served",
    [
        (BUILD_13, (7, 0), False),
        (BUILD_13, (7, 5), True),
        (BUILD_13, (8, 9), True),  # by sm_86
        (BUILD_13, (8, 7), True),
        (BUILD_13, (12, 1), True),
        (BUILD_13, (13, 0), False),
        (["sm_86"], (8, 0), False),  # no lower minor
        (["sm_50", "sm_60", "sm_70"], (7, 0), True),
        (["sm_50", "sm_60"], (6, 1), True),
        (["compute_90"], (12, 0), True),  # PTX is compiled for newer ones
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a", "compute_100a"], (10, 3), False),  # and with an a for none
        (["sm_100f"], (10, 3), True),
        (["sm_100f"], (12, 0), False),
        (["gfx942"], (9, 0), False),
    ],
)
def test_which_gpus_a_build_serves(kernels, capability, served):
    assert devices.supports(kernels, capability) == served


def test_a_v100_beside_a_build_for_cuda_13_is_refused_with_the_way_out(machine):
    machine("cuda", 1, (7, 0))
    sentence = refusal()
    for part in (
        "Tesla V100-SXM2-16GB",
        "7.0",
        torch.__version__,
        "CUDA 13.0",
        "sm_75",
        "https://download.pytorch.org/whl/cu126",
        "--device cpu",
    ):
        assert part in sentence
    assert devices.choose("cpu") == torch.device("cpu")


def test_other_gpus_are_not_sent_to_old_builds(machine):
    machine("cuda", 1, (13, 0))
    assert "a newer build" in refusal()
    assert "cu126" not in refusal()
    machine("cuda", 1, (3, 5))
    assert "no official build" in refusal()
    for capability in ((7, 5), (8, 0), (9, 0), (12, 0)):
        machine("cuda", 1, capability)
        assert devices.choose() == torch.device("cuda", 0)
    machine("cuda", 1, (7, 0), kernels=[])  # a build that does not say
    assert devices.choose() == torch.device("cuda", 0)


# ------------------------------------------------------------------------------------- the driver


@pytest.mark.parametrize("warned", [True, False])  # torch warns once in a process
def test_a_driver_that_is_too_old_is_said_and_refused_where_cuda_is_asked_for(driver, warned):
    driver(TOO_OLD.format(12080), warned)
    sentence = refusal("cuda")
    for part in ("driver", "serves CUDA 12.8", torch.__version__, "CUDA 13.0", "/whl/cu126"):
        assert part in sentence
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own words do not come on top
        assert devices.choose() == torch.device("cpu")


def test_an_old_build_is_offered_only_where_it_would_run(driver):
    driver(TOO_OLD.format(11040))
    assert "serves CUDA 11.4" in devices.cuda_problem()
    assert "cu126" not in devices.cuda_problem()
    driver(TOO_OLD.format(12020), built_for="12.6")
    assert "update the driver" in devices.cuda_problem()
    assert "cu126" not in devices.cuda_problem()


def test_an_old_driver_that_nvml_hides_is_noticed(driver, monkeypatch):
    """PYTORCH_NVML_BASED_CUDA_CHECK=1: torch counts GPUs, and fails at the first kernel."""
    driver(TOO_OLD.format(12080))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "too old" in devices.cuda_problem()
    assert devices.choose() == torch.device("cpu")


def test_training_on_the_cpu_because_of_the_driver_is_said_once(driver, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    driver(TOO_OLD.format(12080))
    assert distributed.init_distributed() == torch.device("cpu")
    assert capsys.readouterr().out.count("WARNING: the NVIDIA driver") == 1
    assert distributed.init_distributed("cpu") == torch.device("cpu")
    assert capsys.readouterr().out == ""


def test_other_trouble_with_cuda_is_passed_on(driver):
    driver("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized")
    assert "802: system not yet initialized" in devices.cuda_problem()


def test_a_machine_without_a_gpu_is_silent(driver, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for message in (NO_DRIVER, "No CUDA GPUs are available"):
        driver(message, warned=False)
        assert distributed.init_distributed() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert distributed.init_distributed() == torch.device("cpu")
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------- what differs from device to device


def test_what_was_never_measured_is_trained_in_fp32():
    assert choose_precision(torch.device("mps")) == choose_precision(torch.device("xpu")) == "fp32"


def test_images_stay_where_they_are_unless_half_of_the_free_memory_is_enough(monkeypatch):
    data = ArraySet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, None, (0.0,), (1.0,))
    moved = []
    data.images = types.SimpleNamespace(nbytes=96, to=lambda device: moved.append(device))
    for free in (0, 100, 192):  # 0: it cannot be known
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        data.to(torch.device("mps"))
    assert moved == []
    monkeypatch.setattr(devices, "free_memory", lambda device: 200)
    data.to(torch.device("mps"))
    assert moved == [torch.device("mps")]


def test_free_memory_by_kind_of_device(monkeypatch):
    assert devices.free_memory(torch.device("cpu")) == 0
    module = types.SimpleNamespace(mem_get_info=lambda device: (7, 9))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert devices.free_memory(torch.device("cuda", 1)) == 7

    def unknown(device):
        raise RuntimeError("the device does not support it")

    module.mem_get_info = unknown
    assert devices.free_memory(torch.device("xpu", 0)) == 0
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4)
    assert devices.free_memory(torch.device("mps")) == 6


def test_random_states_are_kept_of_the_device_that_is_used(machine, monkeypatch):
    """And those of another kind of device, or of an older checkpoint, do no harm."""
    assert list(devices.rng_state()) == ["cpu"]
    devices.set_rng_state({**devices.rng_state(), "cuda": "of another machine"})

    machine("xpu")
    put = []
    module = types.SimpleNamespace(get_rng_state=lambda: "state", set_rng_state=put.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(devices, "current", torch.device("xpu", 0))
    state = devices.rng_state()
    assert list(state) == ["cpu", "xpu"]
    assert state["xpu"] == "state"
    devices.set_rng_state(state)
    devices.set_rng_state({"cpu": state["cpu"]})
    assert put == ["state"]


def test_the_thread_that_prefetches_uses_the_device_of_its_process(machine, monkeypatch):
    used = []
    monkeypatch.setattr(
        torch.accelerator,
        "set_device_index",
        lambda index: used.append((threading.current_thread().name, index)),
    )
    machine("cuda", 4)
    monkeypatch.setattr(devices, "current", torch.device("cuda", 3))
    assert list(prefetch(iter(range(5)), torch.device("cpu"))) == [0, 1, 2, 3, 4]
    assert used == [("prefetch", 3)]
    monkeypatch.setattr(devices, "current", torch.device("mps"))  # it has no number
    assert list(prefetch(iter(range(5)), torch.device("cpu"))) == [0, 1, 2, 3, 4]
    assert len(used) == 1
