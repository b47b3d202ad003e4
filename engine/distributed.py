"""One process or many: every function here is a no-op in one process, so that `python` and `torchrun` run the same program."""
import contextlib
import inspect
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

sent = 0                                                   # bytes that this process has given to others, DDP's gradients aside; see benchmarks/step.py


def start():
    """Join the process group that torchrun announces, if it does. -> the device of this process."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True                  # every step has the same shapes
    if cuda:
        torch.set_float32_matmul_precision("high")         # TF32, where fp32 is asked for; convolutions have it anyway
    if "RANK" in os.environ:                               # the one test: torchrun sets it
        local = int(os.environ.get("LOCAL_RANK", 0))
        if cuda and local >= torch.cuda.device_count():
            raise SystemExit(f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}; lower --nproc_per_node")
        if cuda:
            torch.cuda.set_device(local)
        store, own, world = next(rendezvous("env://"))     # torchrun keeps its store when it restarts, where the addresses of the lost processes still stand
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=attempt, rank=own, world_size=world)
        return torch.device("cuda", local) if cuda else torch.device("cpu")
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def hardware(device):
    """In words, for the log."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return what if world_size() == 1 else f"{world_size()} x {what}"


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module, device):
    """module, with gradients averaged over processes. Its buffers are left alone: see average_buffers."""
    if world_size() == 1:
        return module
    buffers = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in inspect.signature(DistributedDataParallel).parameters)   # newer, older torch
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, **{buffers: False})


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
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def gather(*tensors):
    """(n, ...) of each process, n equal everywhere -> (world * n, ...) in the order of the ranks; of several tensors a tuple, by one message.
    Carries no gradient."""
    if world_size() == 1:
        return tensors if len(tensors) > 1 else tensors[0]
    flat = [as_bytes(x) for x in tensors]
    mine = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    give(mine.nbytes * (world_size() - 1))
    dist.all_gather(parts, mine)
    whole = torch.cat(parts).split([x.shape[1] for x in flat], 1)                      # (world * n, bytes) each
    whole = tuple(w.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for w, x in zip(whole, tensors))
    return whole if len(tensors) > 1 else whole[0]


def as_bytes(x):
    """(n, ...) -> (n, bytes a row)."""
    return x.detach().contiguous().view(len(x), -1).view(torch.uint8)


def give(count):
    global sent
    sent += count


@torch.no_grad()
def exchange(x, order):
    """Deal the rows of all processes anew: x (n, ...), order (world * n,) on the CPU, the same everywhere -> (n, ...), those rows that stand in
    order at this process's n places, where row i of rank r is r * n + i. exchange(exchange(x, order), order.argsort()) is x.

    Only the rows wanted travel: moco's code sends every process's rows to every process."""
    n, world, r = len(x), world_size(), rank()
    if world == 1:
        return x[order.to(x.device)]
    source, own = order // n, order[r * n:(r + 1) * n] // n                            # (world n,), (n,): whose rows
    place = (source == r).nonzero()[:, 0]                                              # (n,)  where ours go, by rank
    out, into = ((who.bincount(minlength=world)).tolist() for who in (place // n, own))
    flat = as_bytes(x[(order[place] - r * n).to(x.device)])
    got = torch.empty_like(flat)
    give((n - out[r]) * flat.shape[1])
    dist.all_to_all_single(got, flat, into, out)
    return got[own.argsort(stable=True).argsort().to(x.device)].view(x.dtype).view(x.shape)         # they came by rank


def gather_with_gradient(x):
    """As gather, and the gradient of every process's use of x comes back to it. (DDP averages over processes, so each averages its own loss.)"""
    return x if world_size() == 1 else Gather.apply(x)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        give(2 * gradient.nbytes * (world_size() - 1) // world_size())
        dist.all_reduce(gradient)                          # the sum over the processes' losses ...
        return gradient.chunk(world_size())[rank()]        # ... of which this part is ours


def broadcast(x):
    """Rank 0's x, on every rank."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def mean(x):
    """The mean over processes of a tensor."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def all_reduce_sum(x):
    """The sum over processes of a tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def anywhere(device, *flags):
    """Which of the flags are true on any process."""
    return [share > 0 for share in mean(torch.tensor([float(flag) for flag in flags], device=device)).tolist()]


def agree(problem):
    """Every process calls it. A sentence that one of them has, or else None, ends all of them; it is said once."""
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        raise SystemExit(problems[0] if is_main() else 1)


@contextlib.contextmanager
def agreeing():
    """Every process comes here. What refuses on one of them ends all of them, by `agree`."""
    problem = None
    try:
        yield
    except SystemExit as refusal:
        problem = refusal.code
    agree(problem)


def gather_objects(x):
    """A Python object of each process -> the list of them."""
    if world_size() == 1:
        return [x]
    parts = [None] * world_size()
    dist.all_gather_object(parts, x)
    return parts


@torch.no_grad()
def average_buffers(module):
    """Make the BatchNorm running statistics those of the whole batch: the mean over processes. Once an epoch, before anything reads them."""
    if world_size() > 1:
        for buffer in running_statistics(module):
            buffer.copy_(mean(buffer))


def running_statistics(*modules):
    """BatchNorm's, the only part of a run's state in which the processes differ during an epoch (their random numbers aside)."""
    return [buffer for module in modules for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
