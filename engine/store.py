"""Small Python objects between processes, through the store of the process group.

A collective has a time limit (NCCL's default: 10 minutes), and one process may well list files,
build a cache or write a checkpoint for longer while the others wait. Here they look into the
store, a table of keys and bytes that torchrun's agent keeps for all, as long as it takes. A look
costs about 0.1 ms, and no memory of a GPU.

What must not be is a wait for a process that is gone. torchrun ends the processes of the machine
on which one died, but not those of the other machines. So every process leaves a sign of life in
the store every few seconds, and a process that waits ends if the other one left none for long, or
if the store itself is gone.
"""

import contextlib
import io
import threading
from time import monotonic, sleep

import torch

from . import signals

PIECE = 2**22  # bytes: the store refuses a value of more than 8 MiB
LONGEST_PAUSE = 0.1  # seconds between two looks, which begin at a millisecond
BEAT = 10  # seconds from one sign of life to the next
SILENCE = 180  # seconds without one, after which a process counts as gone
LONGEST_GOODBYE = 5  # seconds that a first process with the store waits for the others to go
LONGEST_ECHO = 2  # seconds that a process which ends waits for the same sentence of rank 0's
LONGEST_START = 1800  # seconds until the first one: a large job takes its time to import torch


def pack(x):
    """An object as bytes: numbers, strings, tensors, and lists, tuples and dicts of these."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def unpack(packed):
    """The object again. No code in it is run, unlike in a pickle: the store is on a network."""
    return torch.load(io.BytesIO(packed), weights_only=True)


def join(parts):
    """A list of bytes as one piece: the length of each, in 8 bytes, before it."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def split(joined):
    """The list of bytes again."""
    parts, start = [], 0
    while start < len(joined):
        end = start + 8 + int.from_bytes(joined[start : start + 8], "little")
        parts.append(joined[start + 8 : end])
        start = end
    return parts


class ObjectStore:
    """What one process keeps of it.

    Every process makes the same calls in the same order, as with collectives.

    Args:
        store: of the process group.
        rank: as the process group's.
        world: as the process group's.
        in_first: whether the store is in the process of rank 0 itself; torchrun keeps it in its
            agent.
    """

    def __init__(self, store, rank, world, in_first=False):
        self.store, self.rank, self.world, self.in_first = store, rank, world, in_first
        self.calls = 0
        self.posted = []  # (call, keys) of what this process has posted and not yet deleted
        self.closed = threading.Event()
        if world > 1:
            threading.Thread(target=self.beat, name="sign of life", daemon=True).start()

    def close(self):
        """Leave no more signs of life."""
        self.leave()
        self.closed.set()

    def leave(self):
        """Say that this process ends. To be called before it does.

        A first process that has the store stays, for some seconds at most, until the others have
        read what it last told them.
        """
        if not self.in_first:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left {self.rank}", "")
            others = [f"left {rank}" for rank in range(1, self.world)]
            end = monotonic() + LONGEST_GOODBYE
            while self.rank == 0 and others and monotonic() < end:
                if self.store.check(others):
                    return
                sleep(0.01)

    def is_said_by_first(self, sentence):
        """Does rank 0 end with the same sentence as this process? Then rank 0 alone says it."""
        is_said = False
        with contextlib.suppress(RuntimeError):  # the store is gone, and rank 0 with it
            if self.rank == 0:
                self.store.set("last sentence", sentence)
            end = monotonic() + LONGEST_ECHO
            while self.rank > 0 and monotonic() < end:
                if self.store.check(["last sentence"]):
                    is_said = self.store.get("last sentence").decode() == sentence
                    break
                sleep(0.01)
        self.leave()
        return is_said

    def gather(self, x):
        """An object of each process -> the list of them, by rank, the same to all."""
        return [unpack(part) for part in self.gather_bytes(pack(x))]

    def gather_bytes(self, x):
        """As gather, of bytes. Rank 0 puts them together, so that each asks for one thing only."""
        call = self.next_call()
        self.post(call, f"{call}/{self.rank}", x)
        if self.rank == 0:
            parts = [self.take(f"{call}/{r}", r) for r in range(self.world)]
            self.post(call, f"{call}/all", join(parts))
        else:
            parts = split(self.take(f"{call}/all", 0))
        self.tidy(call)
        return parts

    def spread(self, senders, x=None):
        """Give the bytes x of each rank in `senders` to all.

        Args:
            senders: the ranks.
            x: of this process, if it is one of them.

        Returns:
            {rank: bytes}.
        """
        call = self.next_call()
        if self.rank in senders:
            self.post(call, f"{call}/{self.rank}", x)
        return {r: self.take(f"{call}/{r}", r) for r in senders}

    # ---------------------------------------------------------------------------------- the store

    def next_call(self):
        """The number of the next call, which is the same on every process."""
        self.calls += 1
        return self.calls

    def post(self, call, key, x):
        """Set a key to bytes of any number; what is too long goes in pieces, the first one last."""
        pieces = [x[i : i + PIECE] for i in range(0, len(x), PIECE)] or [b""]
        keys = [f"{key}/{i}" for i in range(1, len(pieces))]
        for name, piece in zip(keys, pieces[1:]):
            self.ask(self.store.set, name, piece)
        self.ask(self.store.set, key, b"%d\n" % len(pieces) + pieces[0])
        self.posted.append((call, [key, *keys]))

    def take(self, key, sender):
        """The bytes that rank `sender` sets a key to, as soon as it does."""
        self.wait(key, sender)
        count, _, first = self.ask(self.store.get, key).partition(b"\n")
        return first + b"".join(
            self.ask(self.store.get, f"{key}/{i}") for i in range(1, int(count))
        )

    def wait(self, key, sender):
        """Until a key is set. It may take hours, as long as the sender lives."""
        pause, sign, next_check = 0.001, None, monotonic() + BEAT
        heard = monotonic()
        while not self.ask(self.store.check, [key]):
            sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
            if monotonic() < next_check:
                continue
            next_check = monotonic() + BEAT
            last, sign = sign, self.last_sign(sender)
            if sign != last:
                heard = monotonic()
            if monotonic() - heard > (SILENCE if sign else LONGEST_START):
                raise SystemExit(
                    f"process {self.rank} waits for process {sender}, of which nothing was heard "
                    f"for {monotonic() - heard:.0f} s: it is gone; see what it said last"
                )

    def tidy(self, call):
        """Delete what this process posted before a call that every process has entered."""
        for _, keys in (entry for entry in self.posted if entry[0] < call):
            for key in keys:
                self.ask(self.store.delete_key, key)
        self.posted = [entry for entry in self.posted if entry[0] >= call]

    def ask(self, method, *arguments):
        """Call a method of the store; where it is gone this process ends, with one sentence."""
        try:
            return method(*arguments)
        except RuntimeError as error:  # torch's DistError is one
            if signals.stop_requested():  # and so was the process that keeps it
                raise SystemExit(signals.EXIT_CODE) from None
            raise SystemExit(
                f"process {self.rank} has lost the store of the process group "
                f"({str(error).splitlines()[0]}): the process that keeps it has ended; see what "
                "it said last"
            ) from None

    # --------------------------------------------------------------------------------- life signs

    def beat(self):
        """What the thread does that leaves the signs of life."""
        count = 0
        while True:
            count += 1
            try:
                self.store.set(f"sign {self.rank}", str(count))
            except RuntimeError:  # the store is gone, which the main thread will see for itself
                return
            if self.closed.wait(BEAT):
                return

    def last_sign(self, rank):
        """The last sign of life of a rank, or None."""
        key = f"sign {rank}"
        return self.ask(self.store.get, key) if self.ask(self.store.check, [key]) else None
