"""One process or many: every function here does nothing in one process, so that `python` and
`torchrun` run the same program.

Two ways lead from process to process. Tensors go by collectives, which have a time limit (NCCL's
default: 10 minutes), because a process that waits for longer in a training step waits for one that
is lost. Python objects, refusals and whatever one process does for the others (run_on_first) go
through the store of the process group (engine/store.py), which waits as long as the other lives.

What may still outlast a collective is work that one process does between two of them while the
others go on to the next: COCO's average precision in train_detect.py (minutes) and the log's
pictures (seconds).
"""

import contextlib
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
from .store import ObjectStore, pack, unpack

LARGEST_IN_STORE = 2**20  # bytes of a packed object; a larger one goes by a collective

sent = 0  # bytes that this process has given to others, DDP's gradients aside; benchmarks/step.py
object_store = None  # this process's ObjectStore; None where no process group was joined
node_firsts = [0]  # for each rank, the first rank on its node


def start(asked=None, timeout=None):
    """Join the process group that torchrun announces, if it does. -> the device of this process.

    asked: what --device says; see engine/device.py. timeout: a datetime.timedelta for collectives,
    None for torch's own.

    Raises SystemExit, said once, where a process cannot have its device, and where the devices of
    the processes are of unlike kinds.
    """
    if "RANK" not in os.environ:  # the one test: torchrun sets it
        device = devices.choose(asked)
        devices.use(device)
    else:
        device = join(asked, timeout)
    problem = why_cpu(asked, device)
    if problem:
        say(f"WARNING: {problem}; until then everything runs on the CPU")
    return device


def why_cpu(asked, device):
    """What keeps a process on the CPU that was not asked to compute there, or None."""
    return devices.cuda_problem() if asked is None and device.type == "cpu" else None


def join(asked, timeout):
    """Join the process group. -> the device of this process."""
    global object_store, node_firsts
    store, own, world = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts, where the addresses of the lost processes stand.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    object_store = ObjectStore(
        dist.PrefixStore("objects", store),
        own,
        world,
        in_first=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )

    device = refusal = None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        device = devices.choose(asked, local, processes)
    except SystemExit as end:
        refusal = end.code
    node = os.environ.get("GROUP_RANK", socket.gethostname())
    kind, why = (None, None) if refusal else (device.type, why_cpu(asked, device))
    reports = object_store.gather((refusal, kind, why, node))
    refuse_unlike(reports, own)
    nodes = [node for *_, node in reports]
    node_firsts = [nodes.index(node) for node in nodes]

    devices.use(device)
    dist.init_process_group(
        devices.backend(device.type), store=store, rank=own, world_size=world, timeout=timeout
    )
    sys.excepthook = shorten_lost_connections(own, sys.excepthook)
    return device


def refuse_unlike(reports, own):
    """End all processes, with one sentence, unless each has a device and all are of one kind.

    reports: of each rank (refusal, kind of device, why it is the CPU, node). own: this rank.
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
        raise SystemExit(sentence if own == 0 else 1)


def shorten_lost_connections(rank, hook):
    """An excepthook for sys: where another process ended, a sentence instead of a traceback.

    The process that ended says why in a sentence of its own. hook: the excepthook for all else.
    """
    signs = "Connection closed by peer", "Connection reset by peer", "remote process exited"

    def say_who_is_lost(kind, error, trace):
        if not any(sign in str(error) for sign in signs):
            return hook(kind, error, trace)
        if signals.stop_requested():  # and so was the other one
            return
        print(
            f"process {rank} lost another one, which ended (what it says itself tells why) or "
            "cannot be reached",
            file=sys.stderr,
        )

    return say_who_is_lost


def hardware(device):
    """In words, for the log."""
    what = devices.describe(device)
    return what if world_size() == 1 else f"{world_size()} x {what}"


def stop():
    """Leave the process group, if this process is in one."""
    if object_store:
        object_store.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module, device):
    """module, with gradients averaged over processes. Its buffers are left alone: see
    average_buffers.
    """
    if world_size() == 1:
        return module
    known = inspect.signature(DistributedDataParallel).parameters
    names = ("forward_sync_buffers", "broadcast_buffers")  # newer and older torch
    buffers = next(name for name in names if name in known)
    ids = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(module, device_ids=ids, **{buffers: False})


def gradient_sync(model, is_last):
    """A context in which backward() averages gradients over processes, after the last part of a
    batch only.
    """
    if is_last or world_size() == 1:
        return contextlib.nullcontext()
    return model.no_sync()


def say(*words, **how):
    """print, on one process."""
    if is_main():
        print(*words, **how, flush=True)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    """Wait for all processes, which must not be far apart: it is a collective, with its limit.

    Where one of them works for the others there is run_on_first.
    """
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------- tensors: collectives


@torch.no_grad()
def gather(*tensors):
    """(n, ...) of each process, n equal everywhere -> (world * n, ...) in the order of the ranks.

    Of several tensors a tuple, by one message. It carries no gradient.
    """
    if world_size() == 1:
        return tensors if len(tensors) > 1 else tensors[0]
    flat = [as_bytes(x) for x in tensors]
    mine = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    give(mine.nbytes * (world_size() - 1))
    dist.all_gather(parts, mine)
    whole = torch.cat(parts).split([x.shape[1] for x in flat], 1)  # (world * n, bytes) each
    whole = tuple(
        rows.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for rows, x in zip(whole, tensors)
    )
    return whole if len(tensors) > 1 else whole[0]


def as_bytes(x):
    """(n, ...) -> (n, bytes a row)."""
    return x.detach().contiguous().view(len(x), -1).view(torch.uint8)


def give(count):
    """Count bytes that this process sends."""
    global sent
    sent += count


@torch.no_grad()
def exchange(x, order):
    """Deal the rows of all processes anew.

    x: (n, ...). order: (world * n,) on the CPU, the same everywhere. -> (n, ...), those rows that
    stand in order at this process's n places, where row i of rank r is r * n + i.
    exchange(exchange(x, order), order.argsort()) is x.

    Only the rows wanted travel: moco's code sends every process's rows to every process.
    """
    n, world, r = len(x), world_size(), rank()
    if world == 1:
        return x[order.to(x.device)]
    source = order // n  # (world n,)  whose row stands at each place
    own = source[r * n : (r + 1) * n]  # (n,)  whose rows this process gets
    place = (source == r).nonzero()[:, 0]  # (n,)  where its own rows go, by rank
    out, into = (who.bincount(minlength=world).tolist() for who in (place // n, own))
    flat = as_bytes(x[(order[place] - r * n).to(x.device)])
    got = torch.empty_like(flat)
    give((n - out[r]) * flat.shape[1])
    dist.all_to_all_single(got, flat, into, out)
    back = own.argsort(stable=True).argsort()  # the rows came by rank
    return got[back.to(x.device)].view(x.dtype).view(x.shape)


def gather_with_gradient(x):
    """As gather, and the gradient of every process's use of x comes back to it.

    (DDP averages over processes, so each averages its own loss.)
    """
    return x if world_size() == 1 else Gather.apply(x)


class Gather(torch.autograd.Function):
    """gather; its gradient is the sum over the processes' losses, of which each keeps its part."""

    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        give(2 * gradient.nbytes * (world_size() - 1) // world_size())
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def broadcast(x):
    """Rank 0's x, on every rank."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def mean(x):
    """The mean over processes of a tensor."""
    return x if world_size() == 1 else all_reduce_sum(x.clone()) / world_size()


def all_reduce_sum(x):
    """The sum over processes of a tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def anywhere(device, *flags):
    """Which of the flags are true on any process."""
    mine = torch.tensor([float(flag) for flag in flags], device=device)
    return [share > 0 for share in mean(mine).tolist()]


@torch.no_grad()
def average_buffers(module):
    """Make the BatchNorm running statistics those of the whole batch: the mean over processes.

    Once an epoch, before anything reads them.
    """
    if world_size() > 1:
        for buffer in running_statistics(module):
            buffer.copy_(mean(buffer))


def running_statistics(*modules):
    """BatchNorm's, the only part of a run's state in which the processes differ during an epoch
    (their random numbers aside).
    """
    return [
        buffer
        for module in modules
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]


# ------------------------------------------------------------------- Python objects: the store


def agree(problem):
    """Every process calls it. A sentence that one of them has, or else None, ends all of them; it
    is said once.
    """
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        if object_store:
            object_store.leave()
        raise SystemExit(problems[0] if is_main() else 1)


@contextlib.contextmanager
def agreeing():
    """Every process comes here. What refuses on one of them ends all of them, by `agree`.

    One may stay inside for as long as it needs, a slow disk included: see engine/store.py.
    """
    problem = None
    try:
        yield
    except SystemExit as refusal:
        problem = refusal.code
    agree(problem)


def gather_objects(x):
    """A Python object of each process -> the list of them.

    Through the store, however late a process comes. If one object has more than LARGEST_IN_STORE
    bytes, all of them go by a collective then, for which by that time every process is there.
    """
    if world_size() == 1:
        return [x]
    mine = pack(x)
    small = len(mine) <= LARGEST_IN_STORE
    parts = object_store.gather_bytes(mine if small else b"")
    if all(parts):
        return [unpack(part) for part in parts]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


def run_on_first(function, per_node=False):
    """What function() returns, run by the first process alone while the others wait. Every process
    calls it.

    per_node: by the first process of each node, and each process gets what came out on its node:
    for work on a disk that is not shared.

    It may take hours: no collective is involved. What comes out is made of what store.pack takes,
    and goes through the store, at some 100 MB/s. Within the function no other call may be made that
    every process makes. Whatever the function raises ends all processes, none of them before all
    nodes are done; a sentence (SystemExit) is said once.
    """
    if world_size() == 1:
        return function()
    firsts = node_firsts if per_node else [0] * world_size()
    runner = firsts[rank()]
    value = error = None
    outcome = b""
    if rank() == runner:
        value, outcome, error = attempt(function)
    senders = sorted(set(firsts))
    outcomes = object_store.spread(senders, outcome)
    outcomes = {r: unpack(outcomes[r]) for r in senders}
    failed = [r for r in senders if outcomes[r][0]]
    if failed:
        object_store.leave()
        raise error if rank() == failed[0] else SystemExit(outcomes[failed[0]][1])
    return value if rank() == runner else outcomes[runner][1]


def attempt(function):
    """Run function(). -> what it returns, bytes for the other processes, and what it raises.

    The bytes hold (False, the value), or (True, the code for the others to exit with).
    """
    try:
        value = function()
        return value, pack((False, value)), None
    except BaseException as error:  # SystemExit too; the caller raises it
        code = getattr(error, "code", 1)  # a sentence is for this process alone to say
        code = code if isinstance(code, int) else 1
        return None, pack((True, code)), error
