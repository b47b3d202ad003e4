"""The device that a process computes on: chosen, checked and described in one place.

torch.accelerator says which accelerator there is (CUDA, which includes AMD's ROCm; Apple's MPS;
Intel's XPU); without one it is the CPU. `--device` on every script overrides the choice.

Two mistakes of installation are named before anything is loaded, because torch either trains on
the CPU without a word or fails at the first kernel with words that do not help: a GPU for which
the installed torch holds no kernels (a V100 beside a build for CUDA 13), and an NVIDIA driver that
is older than the build.
"""

import re
import warnings

import torch
import torch.distributed as dist

# What the official builds of torch 2.11 to 2.14 for CUDA 12.6 hold: they are the last with
# sm_50 to sm_70. Builds for CUDA 12.8 and later begin at sm_75.
KERNELS_OF_CUDA_12_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86")
# pip leaves a torch that is there already, whatever it is built for.
UNINSTALL = "pip uninstall -y torch torchvision"
INSTALL_CUDA_12_6 = (
    f"{UNINSTALL} && "
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"
)
INSTALL_NEWEST = f"{UNINSTALL} && pip install -r requirements.txt"

current = torch.device(
    "cpu"
)  # the device that use() was given; set once, by distributed.init_distributed()


# ------------------------------------------------------------------------------------ the choice


def choose(device_name=None, process=0, processes=1):
    """The device of one of the processes of this machine.

    Args:
        device_name: what --device says (cpu, cuda, cuda:1, mps ...), or None for the best there is.
        process: the number of this process among those that torchrun started on this machine, each
            of which takes an accelerator of its own.
        processes: how many these are.

    Raises:
        SystemExit: one sentence, for a device that is not there and for a GPU that the installed
            torch has no kernels for.
    """
    if device_name in ("cpu", "cpu:0"):  # whatever else there is stays untouched
        return torch.device("cpu")
    kind, count = accelerator()
    if device_name is None:
        # Apple's MPS has no collectives, so that several processes compute on the CPU there.
        alone = processes == 1 or kind is None or has_collectives(kind)
        device = torch.device(kind if kind and alone else "cpu")
    else:
        device = parse_device(device_name, kind, count)
    if device.type == "cpu":
        return device
    if processes > 1:
        refuse_sharing(device, process, processes, count)
    if device.type == "mps":  # there is one, which goes without a number
        return torch.device("mps")
    device = torch.device(device.type, process if device.index is None else device.index)
    if device.type == "cuda":
        refuse_unsupported(device)
    return device


def accelerator():
    """The kind of accelerator that is ready here ("cuda", "mps", "xpu") or None, and how many."""
    with warnings.catch_warnings():  # what torch warns of, cuda_problem() says
        warnings.simplefilter("ignore")
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None or device.type == "cuda" and cuda_problem():
            return None, 0
        return device.type, torch.accelerator.device_count()


def parse_device(device_name, kind, count):
    """What --device says, as a torch.device without a number where none was given."""
    names = ["cpu"]
    if kind:
        names += [kind] if kind == "mps" else [f"{kind}:{i}" for i in range(count)]
    listed = ", ".join(names)
    try:
        device = torch.device(device_name)
    except RuntimeError:
        raise SystemExit(
            f"--device {device_name} is no device of torch's; here it sees {listed}"
        ) from None
    if device.type != kind or (device.index or 0) >= count:
        problem = device.type == "cuda" and cuda_problem()
        why = f": {problem}" if problem else f"; torch {torch.__version__} sees {listed} here"
        raise SystemExit(f"--device {device_name} is not there{why}")
    return device


def refuse_sharing(device, process, processes, count):
    """Several processes of one machine need an accelerator each, and collectives between them."""
    if device.index is not None:
        raise SystemExit(
            f"--device {device} is one device, but {processes} processes run on this machine and "
            f"each takes one of its own; give --device {device.type}"
        )
    if not has_collectives(device.type):
        raise SystemExit(
            f"--device {device} serves one process, for torch has no collectives on it, and "
            f"{processes} run on this machine; start one, or give --device cpu"
        )
    if process >= count:
        raise SystemExit(
            f"process {process} of this node has no GPU: there are {count}; "
            "lower --nproc_per_node, or give --device cpu"
        )


def has_collectives(kind):
    """Can processes exchange tensors of this kind of device? Gloo moves those of the CPU."""
    return kind == "cpu" or backend(kind) != "gloo"


def backend(kind):
    """The backend of a process group: nccl for cuda, xccl for xpu, gloo for the CPU."""
    return dist.get_default_backend_for_device(kind)


def use(device):
    """Make it the device of this process, as far as torch keeps such a thing."""
    global current
    current = device
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    if device.type == "cuda":
        # TF32 where fp32 is asked for; convolutions have it anyway.
        torch.set_float32_matmul_precision("high")
    use_in_this_thread()


def use_in_this_thread():
    """Every new thread begins on device 0, whatever the process was told."""
    if current.index is not None:
        torch.accelerator.set_device_index(current.index)


# ------------------------------------------------------------------------------------ the checks


def cuda_problem():
    """Why a torch that is built for CUDA cannot use it here, as a sentence without its full stop.

    None where it can, where torch is not built for CUDA, and where there is simply no GPU.
    """
    if not torch.backends.cuda.is_built() or torch.version.cuda is None:  # None: AMD's ROCm
        return None
    # Both are asked: is_available() warns only once in a process and, where the environment
    # variable PYTORCH_NVML_BASED_CUDA_CHECK is set, is True beside a driver that is too old.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
        try:
            torch.cuda.init()
            return None
        except (RuntimeError, AssertionError) as error:
            reasons = [str(error)]
    if not is_available:
        warned = [str(warning.message) for warning in caught]
        reasons += [reason for reason in warned if "CUDA" in reason]
    too_old = next((reason for reason in reasons if "too old" in reason), None)
    if too_old:
        return driver_too_old(too_old)
    # A machine without a GPU says one of these, and nothing is wrong with it.
    usual = ("Found no NVIDIA driver", "No CUDA GPUs are available", "no CUDA-capable device")
    reasons = [reason for reason in reasons if not any(words in reason for words in usual)]
    if not reasons:
        return None
    first = reasons[0].strip().splitlines()[0].removeprefix("CUDA initialization: ").rstrip(".")
    return f"torch {torch.__version__} cannot use the GPU ({first})"


def driver_too_old(reason):
    """A sentence for a driver that is too old, with what to do.

    reason: torch's own, which holds the CUDA version that the driver serves: 11040 is 11.4.
    """
    match = re.search(r"found version (\d+)", reason)
    version = int(match[1]) if match else 0
    serves = f", which serves CUDA {version // 1000}.{version % 1000 // 10}," if version else ""
    way_out = "update the driver"
    # A driver of CUDA 12.0 serves every build for CUDA 12.
    if version >= 12000 and release(torch.version.cuda) > (12, 6):
        way_out += f", or install a build for CUDA 12.6: {INSTALL_CUDA_12_6}"
    return (
        f"the NVIDIA driver{serves} is too old for torch {torch.__version__}, "
        f"which is built for CUDA {torch.version.cuda}; {way_out}"
    )


def release(version):
    """The string 12.6 as (12, 6)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def refuse_unsupported(device):
    """Refuse a GPU for which the installed torch has no kernels."""
    kernels = torch.cuda.get_arch_list()
    if torch.version.cuda is None or not kernels:  # AMD's ROCm has names of its own
        return
    capability = torch.cuda.get_device_capability(device)
    if supports(kernels, capability):
        return
    if supports(KERNELS_OF_CUDA_12_6, capability):
        way_out = (
            "the official builds of torch 2.11 to 2.14 for CUDA 12.6 have them: "
            f"{INSTALL_CUDA_12_6}; or give --device cpu"
        )
    elif capability > (5, 0):
        way_out = f"install a newer build: {INSTALL_NEWEST}; or give --device cpu"
    else:
        way_out = "no official build has them; give --device cpu"
    raise SystemExit(
        f"{device} is {torch.cuda.get_device_name(device)} of compute capability "
        f"{capability[0]}.{capability[1]}, for which torch {torch.__version__} (CUDA "
        f"{torch.version.cuda}: {', '.join(kernels)}) has no kernels; {way_out}"
    )


def supports(kernels, capability):
    """Does a build with these kernels run on a GPU of this capability (major, minor)?

    sm_86 is machine code: it runs on an equal or higher minor of the same major. compute_90 is
    PTX, which the driver compiles for any GPU from 9.0 on. A letter behind the number restricts
    it: sm_90a and compute_90a run on 9.0 alone, sm_100f on its family, which is its major.
    """
    for name in kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not match:
            continue
        code = int(match[2]), int(match[3])
        if match[4] == "a":
            fits = capability == code
        elif match[1] == "compute" and not match[4]:
            fits = capability >= code
        else:
            fits = capability[0] == code[0] and capability >= code
        if fits:
            return True
    return False


# ------------------------------------------------------------- what differs from device to device


def describe(device):
    """The device in words, for the log."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.get_device_module(device).get_device_name(device)


def free_memory(device):
    """Bytes that are free on an accelerator; 0 for the CPU and where torch cannot say."""
    if device.type == "cpu":
        return 0
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return torch.get_device_module(device).mem_get_info(device)[0]
    except (AttributeError, RuntimeError):  # not every XPU can say
        return 0


def rng_state():
    """The states of torch's random number generators that this process draws from, by device."""
    state = {"cpu": torch.get_rng_state()}
    if current.type != "cpu":
        state[current.type] = torch.get_device_module(current).get_rng_state()
    return state


def set_rng_state(state):
    """Put back what rng_state() gave; that of another kind of device is left alone."""
    torch.set_rng_state(state["cpu"])
    if current.type != "cpu" and current.type in state:
        torch.get_device_module(current).set_rng_state(state[current.type])
