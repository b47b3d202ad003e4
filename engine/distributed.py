"""One process or many: every function here does nothing in one process.

So `python` and `torchrun` run the same program.

Two ways lead from process to process. Tensors go by collectives, which have a time limit (NCCL's
default: 10 minutes), because a process that waits for longer in a training step waits for one that
is lost. Python objects, refusals and whatever one process does for the others (run_on_first) go
through the store of the process group (engine/store.py), which waits as long as the other lives.

What may still outlast a collective is work that one process does between two of them while the
others go on to the next: COCO's average precision in train_detect.py (minutes) and the log's
pictures (seconds).
"""

import contextlib
import functools
import inspect
import os
import socket
import sys

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from . import device as devices
from . import signals
from .cores import busy_cores, limit_threads
from .store import ObjectStore, pack, unpack

LARGEST_IN_STORE = 2**20  # bytes of a packed object; a larger one goes by a collective

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets

# Bytes that this process has given to others, DDP's gradients aside: for benchmarks/step.py.
bytes_sent = 0
# This process's ObjectStore; None where no process group was joined.
object_store = None
# For each rank, the first rank on its node.
node_firsts = [0]


def init_distributed(device_name=None, timeout=None):
    """Join the process group that torchrun announces, if it does.

    Args:
        device_name: what --device says; see engine/device.py.
        timeout: a datetime.timedelta for collectives, None for torch's own.

    Returns:
        The device of this process.

    Raises:
        SystemExit: said once, where a process cannot have its device, where the devices of the
            processes are of unlike kinds, and where the environment announces half a group.
    """
    limit_threads()
    if "RANK" not in os.environ:  # the one test: torchrun sets it
        device = devices.choose(device_name)
        devices.use(device)
    else:
        check_environment()
        device = join(device_name, timeout)
    problem = why_cpu(device_name, device)
    if problem:
        print_main(f"WARNING: {problem}; until then everything runs on the CPU")
    problem = busy_cores() if device.type == "cpu" else None
    if problem:
        print_main(f"WARNING: {problem}")
    return device


def check_environment():
    """Refuse a RANK without the rest of what torchrun sets, and numbers that are none."""
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise SystemExit(
            f"the environment has RANK={os.environ['RANK']}, but not {', '.join(missing)}: "
            "start with torchrun, which sets them all, or unset RANK for one process"
        )
    rank, world, port = (os.environ[n] for n in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    are_numbers = all(number.isdecimal() for number in (rank, world, port))
    if not are_numbers or int(rank) >= int(world):
        raise SystemExit(
            f"the environment has RANK={rank}, WORLD_SIZE={world} and MASTER_PORT={port}: they "
            "must be whole numbers, RANK below WORLD_SIZE; torchrun sets them so"
        )


def why_cpu(device_name, device):
    """What keeps a process on the CPU that was not asked to compute there, or None."""
    return devices.cuda_problem() if device_name is None and device.type == "cpu" else None


def join(device_name, timeout):
    """Join the process group. -> the device of this process."""
    global object_store, node_firsts
    store, rank, world = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts, where the addresses of the lost processes stand.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    object_store = ObjectStore(*store_of_objects(store, rank, world))

    device = refusal = None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        device = devices.choose(device_name, local, processes)
    except SystemExit as end:
        refusal = end.code
    node = os.environ.get("GROUP_RANK", socket.gethostname())
    kind, why = (None, None) if refusal else (device.type, why_cpu(device_name, device))
    reports = object_store.gather((refusal, kind, why, node))
    refuse_unlike(reports, rank)
    nodes = [node for *_, node in reports]
    node_firsts = [nodes.index(node) for node in nodes]

    devices.use(device)
    dist.init_process_group(
        devices.backend(device.type), store=store, rank=rank, world_size=world, timeout=timeout
    )
    sys.excepthook = functools.partial(say_who_is_lost, rank, sys.excepthook)
    return device


def store_of_objects(store, rank, world):
    """What an ObjectStore is made of: store, rank, world, and whether the store is rank 0's own.

    torchrun's store goes when torchrun is killed. On one machine rank 0 therefore keeps another
    one, by which the processes still agree on a last checkpoint. Between machines only the ports
    that torchrun was given may be open.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    if not is_torchruns or not is_one_machine or world == 1:
        return dist.PrefixStore("objects", store), rank, world, not is_torchruns
    if rank == 0:
        own_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port of objects", str(own_store.port))
    else:
        own_store = dist.TCPStore("127.0.0.1", int(store.get("port of objects")))
    return own_store, rank, world, True


def refuse_unlike(reports, rank):
    """End all processes, with one sentence, unless each has a device and all are of one kind.

    Args:
        reports: of each rank (refusal, kind of device, why it is the CPU, node).
        rank: of this process.
    """
    sentence = next((refusal for refusal, *_ in reports if refusal), None)
    kinds = [kind for _, kind, _, _ in reports]
    if sentence is None and len(set(kinds)) > 1:
        other = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
        reasons = [f" ({why})" for _, _, why, _ in reports if why] or [""]
        sentence = (
            f"process 0 is on a device of kind {kinds[0]} and process {other} on one of kind "
            f"{kinds[other]}{reasons[0]}: they must be alike; mend that machine, or give "
            "--device cpu"
        )
    if sentence:
        object_store.close()
        raise SystemExit(sentence if rank == 0 else 1)


def say_who_is_lost(rank, excepthook, kind, error, trace):
    """Print a sentence instead of a traceback where another process ended.

    The process that ended says why in a sentence of its own.

    Args:
        rank: of this process.
        excepthook: for all else.
        kind, error, trace: what sys.excepthook gets.
    """
    signs = "Connection closed by peer", "Connection reset by peer", "remote process exited"
    if not any(sign in str(error) for sign in signs):
        excepthook(kind, error, trace)
    elif not signals.stop_requested():  # or the other one was told to stop, too
        print(
            f"process {rank} lost another one, which ended (what it says itself tells why) or "
            "cannot be reached",
            file=sys.stderr,
        )


@contextlib.contextmanager
def say_refusals_once():
    """A sentence (SystemExit) with which this process and the first one end is said by the first.

    What only one process ends with is said by that one. No process waits for another for longer
    than seconds.
    """
    try:
        yield
    except SystemExit as refusal:
        is_sentence = isinstance(refusal.code, str)
        if is_sentence and object_store and object_store.is_said_by_first(refusal.code):
            raise SystemExit(1) from None
        raise


def describe_devices(device):
    """The devices of all processes in words, for the log."""
    words = devices.describe(device)
    return words if world_size() == 1 else f"{world_size()} x {words}"


def cleanup():
    """Leave the process group, if this process is in one."""
    if object_store:
        object_store.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap_ddp(module, device):
    """Average the gradients of a module over processes, by DistributedDataParallel.

    Its buffers are left alone: see `average_buffers`.
    """
    if world_size() == 1:
        return module
    parameters = inspect.signature(DistributedDataParallel).parameters
    names = ("forward_sync_buffers", "broadcast_buffers")  # newer and older torch
    name = next(name for name in names if name in parameters)
    ids = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(module, device_ids=ids, **{name: False})


def gradient_sync(model, is_last):
    """A context for backward(), in which DDP averages gradients after a batch's last part only."""
    if is_last or world_size() == 1:
        return contextlib.nullcontext()
    return model.no_sync()


def print_main(*words, **options):
    """Print, on the first process alone."""
    if is_main():
        print(*words, **options, flush=True)


def rank():
    """The number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Is this the first process?"""
    return rank() == 0


def barrier():
    """Wait for all processes, which must not be far apart: it is a collective, with its limit.

    Where one of them works for the others there is `run_on_first`.
    """
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------- tensors: collectives


@torch.no_grad()
def all_gather(*tensors):
    """Concatenate tensors over processes, by one message. It carries no gradient.

    Args:
        tensors: (n, ...) each, with n equal everywhere.

    Returns:
        (world * n, ...) in the order of the ranks; of several tensors a tuple.
    """
    if world_size() == 1:
        return tensors if len(tensors) > 1 else tensors[0]
    row_bytes = [as_bytes(x) for x in tensors]
    local = torch.cat(row_bytes, 1) if len(row_bytes) > 1 else row_bytes[0]
    parts = [torch.empty_like(local) for _ in range(world_size())]
    count_bytes(local.nbytes * (world_size() - 1))
    dist.all_gather(parts, local)
    columns = torch.cat(parts).split([x.shape[1] for x in row_bytes], 1)  # (world * n, bytes) each
    gathered = tuple(
        column.contiguous().view(x.dtype).view(-1, *x.shape[1:])
        for column, x in zip(columns, tensors)
    )
    return gathered if len(tensors) > 1 else gathered[0]


def as_bytes(x):
    """(n, ...) -> (n, bytes a row)."""
    return x.detach().contiguous().view(len(x), -1).view(torch.uint8)


def count_bytes(count):
    """Count bytes that this process sends."""
    global bytes_sent
    bytes_sent += count


@torch.no_grad()
def all_to_all_rows(x, order):
    """Deal the rows of all processes anew.

    Row i of rank r has the number r * n + i. Only the rows wanted travel: moco's code sends every
    process's rows to every process. With `order.argsort()` the rows go back.

    Args:
        x: (n, ...), the rows of this process.
        order: (world * n,) on the CPU, the same everywhere: numbers of rows.

    Returns:
        (n, ...), the rows whose numbers stand in `order` at the n positions of this process.
    """
    n, world, r = len(x), world_size(), rank()
    if world == 1:
        return x[order.to(x.device)]
    source = order // n  # (world n,)  the rank that has the row of each position
    wanted_from = source[r * n : (r + 1) * n]  # (n,)  the ranks whose rows this process gets
    positions = (source == r).nonzero()[:, 0]  # (n,)  where the rows of this process go, by rank
    send_counts = (positions // n).bincount(minlength=world).tolist()
    receive_counts = wanted_from.bincount(minlength=world).tolist()
    local_rows = as_bytes(x[(order[positions] - r * n).to(x.device)])
    received = torch.empty_like(local_rows)
    count_bytes((n - send_counts[r]) * local_rows.shape[1])
    dist.all_to_all_single(received, local_rows, receive_counts, send_counts)
    # The rows came sorted by rank.
    back = wanted_from.argsort(stable=True).argsort()
    return received[back.to(x.device)].view(x.dtype).view(x.shape)


def all_gather_with_gradient(x):
    """As `all_gather`, and the gradient of every process's use of x comes back to it.

    (DDP averages over processes, so each averages its own loss.)
    """
    return x if world_size() == 1 else AllGather.apply(x)


class AllGather(torch.autograd.Function):
    """`all_gather`, and backwards the sum over all processes' losses."""

    @staticmethod
    def forward(ctx, x):
        """(n, ...) -> (world * n, ...)."""
        return all_gather(x)

    @staticmethod
    def backward(ctx, gradient):
        """(world * n, ...) -> (n, ...)."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        count_bytes(2 * gradient.nbytes * (world_size() - 1) // world_size())
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def all_reduce_mean(x):
    """The mean over processes of a tensor."""
    return x if world_size() == 1 else all_reduce_sum(x.clone()) / world_size()


def all_reduce_sum(x):
    """The sum over processes of a tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(device, *flags):
    """Which of the flags are true on any process, as a list of booleans."""
    local_flags = torch.tensor([float(flag) for flag in flags], device=device)
    return [share > 0 for share in all_reduce_mean(local_flags).tolist()]


@torch.no_grad()
def average_buffers(module):
    """Make the BatchNorm running statistics those of the whole batch: the mean over processes.

    Once an epoch, before anything reads them.
    """
    if world_size() > 1:
        for buffer in running_statistics(module):
            buffer.copy_(all_reduce_mean(buffer))


def running_statistics(*modules):
    """The buffers of BatchNorm.

    They are the only part of a run's state in which the processes differ during an epoch (their
    random numbers aside).
    """
    return [
        buffer
        for module in modules
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]


# ------------------------------------------------------------------- Python objects: the store


def exit_all_ranks(problem):
    """End all processes if one of them has a sentence, and say it once. Every process calls it.

    Args:
        problem: a sentence, or None.
    """
    problems = [p for p in all_gather_object(problem) if p]
    if problems:
        if object_store:
            object_store.leave()
        raise SystemExit(problems[0] if is_main() else 1)


@contextlib.contextmanager
def same_exit_on_all_ranks():
    """What refuses (SystemExit) on one process ends all of them, by `exit_all_ranks`.

    Every process comes here, and one may stay inside for as long as it needs, a slow disk included:
    see engine/store.py.
    """
    problem = None
    try:
        yield
    except SystemExit as refusal:
        problem = refusal.code
    exit_all_ranks(problem)


def all_gather_object(x):
    """The Python objects of all processes, as a list by rank.

    Through the store, however late a process comes. If one object has more than LARGEST_IN_STORE
    bytes, all of them go by a collective then, for which by that time every process is there.
    """
    if world_size() == 1:
        return [x]
    packed = pack(x)
    is_small = len(packed) <= LARGEST_IN_STORE
    parts = object_store.gather_bytes(packed if is_small else b"")
    if all(parts):
        return [unpack(part) for part in parts]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def run_on_first(function, per_node=False):
    """Run a function by the first process alone, while the others wait. Every process calls it.

    It may take hours: no collective is involved.

    Args:
        function: takes no arguments, and calls nothing that every process must call. What it
            returns is made of what store.pack takes, and goes through the store, at some 100 MB/s.
        per_node: by the first process of each node, and each process gets what came out on its
            node: for work on a disk that is not shared.

    Returns:
        What the function returned, on every process.

    Raises:
        SystemExit: on all processes, whatever the function raised on one, once all nodes are done;
            a sentence is said once.
    """
    if world_size() == 1:
        return function()
    firsts = node_firsts if per_node else [0] * world_size()
    runner = firsts[rank()]
    value = error = None
    outcome = b""
    if rank() == runner:
        value, outcome, error = run_for_others(function)
    senders = sorted(set(firsts))
    outcomes = object_store.spread(senders, outcome)
    outcomes = {r: unpack(outcomes[r]) for r in senders}
    failed = [r for r in senders if outcomes[r][0]]
    if failed:
        object_store.leave()
        if rank() == failed[0]:
            raise error
        raise SystemExit(outcomes[failed[0]][1])
    return value if rank() == runner else outcomes[runner][1]


def run_for_others(function):
    """Run a function for other processes.

    Returns:
        What it returned, bytes for the others, and the exception that it raised. The bytes hold
        (False, the value), or (True, the code for the others to exit with).
    """
    try:
        value = function()
        return value, pack((False, value)), None
    except BaseException as error:  # SystemExit too; the caller raises it
        code = getattr(error, "code", 1)  # a sentence is for this process alone to say
        code = code if isinstance(code, int) else 1
        return None, pack((True, code)), error
