"""Image workers: processes that read and decode images while this one trains.

torch's DataLoader is not used, because it can wait for ever. It sends each batch through a file in
/dev/shm (in a container 64 MB, unless told otherwise: less than one batch of 256 images of 224
pixels) from a second thread of the worker, whose errors only print a traceback. Here:

* A batch of known shape is written straight into memory that the worker shares with this process,
  `Slots`: anonymous memory, which no file system limits. What has no fixed shape goes through the
  worker's pipe.
* A worker has one thread and one pipe, no queue and no semaphore: nothing lies in /dev/shm, and
  what fails is answered.
* This process waits for the pipes and for the end of any worker at once, so that a worker that is
  killed is noticed immediately.

Whatever goes wrong with the images is raised as `InputLost`, which carries one sentence.
"""

import collections
import contextlib
import errno
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
import weakref
from multiprocessing import connection as pipes

import numpy as np
import torch

# Jobs that each worker has, unless the caller says otherwise: one at work and one to go on with.
BATCHES_AHEAD = 2
CHECK_PARENT_SECONDS = 5
# How long a worker may take to begin before another one takes its place: see `start_workers`. Where
# there is no fork it imports torch anew.
BEGIN_SECONDS = (10, 20, 40, 80) if hasattr(os, "fork") else (600,)
BEGUN = "begun"


class InputLost(SystemExit):
    """No further images come: a broken file, a worker that died. Its one sentence says which."""


@contextlib.contextmanager
def say_what_is_kept(kept):
    """Let an InputLost that passes here end with what `kept()` says: which checkpoint holds what.

    None of it means that there is no checkpoint yet. A MemoryError becomes such a sentence, too.
    """
    try:
        yield
    except InputLost as lost:
        raise InputLost(f"{lost}; {kept() or 'nothing was saved yet'}") from None
    except MemoryError:
        sentence = f"memory ran out; allow more; {kept() or 'nothing was saved yet'}"
        raise SystemExit(sentence) from None


# -------------------------------------------------- batches of known shape


class Slots:
    """Room for batches in memory that is shared with processes forked later.

    A batch that was received is no copy. Its slot is free again when the last tensor that looks
    into it is gone, so whoever keeps a batch, however long, keeps what is in it. Someone who keeps
    all of them leaves no slot free: further batches then come through the pipe.

    Each slot is a map of its own. The system has it back when no tensor looks into it and no
    process has it any more.

    Args:
        count: how many.
        shape: of the largest batch.
        dtype: torch's.
    """

    def __init__(self, count, shape, dtype):
        self.shape, self.dtype = shape, dtype
        self.row_values = math.prod(shape[1:])
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            self.maps = [mmap.mmap(-1, nbytes) for _ in range(count if can_fork() else 0)]
        except OSError as error:
            raise InputLost(
                f"{count} batches of {nbytes / 1e9:.2g} GB in shared memory, for image workers, "
                f"are more than there is ({error.strerror}); lower data.workers or batch_size"
            ) from error
        # The last one used is taken first: its pages are there already.
        self.free = list(range(len(self.maps)))

    def take(self):
        """The number of a free slot, or None."""
        return self.free.pop() if self.free else None

    def array(self, slot, rows):
        """(rows, ...) NumPy's, the first rows of a slot."""
        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        values = np.frombuffer(self.maps[slot], dtype, rows * self.row_values)
        return values.reshape(rows, *self.shape[1:])

    def for_writing(self, slot, rows):
        """In a worker: (rows, ...)."""
        return torch.from_numpy(self.array(slot, rows))

    def received(self, slot, rows):
        """In the main process: (rows, ...), what the worker wrote. Its end frees the slot."""
        array = self.array(slot, rows)
        # The tensor, and every other one that shares its memory, holds the array.
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array)


# -------------------------------------------------- in this process


def can_fork():
    """Whether the system can copy a process, which Windows cannot."""
    return hasattr(os, "fork")


def process_context():
    """Fork wherever there is one: workers then share the data set and the slots.

    Python 3.14's own default would import torch anew in each worker.
    """
    return multiprocessing.get_context("fork" if can_fork() else None)


class Worker:
    """One process and the pipe to it.

    Args:
        function: what it does with each job.
        others: the Workers that there are already.

    Attributes:
        jobs: how many it has and has not answered.
    """

    def __init__(self, function, others):
        context = process_context()
        self.pipe, pipe_of_worker = context.Pipe()
        # What a forked process inherits it must close: as long as anyone holds the other end of a
        # pipe, its end is not noticed.
        inherited = [self.pipe, *(other.pipe for other in others)] if can_fork() else []
        arguments = function, pipe_of_worker, os.getpid(), inherited
        self.process = context.Process(
            target=serve, args=arguments, daemon=True, name="image worker"
        )
        self.jobs, self.parent = 0, os.getpid()
        self.process.start()
        pipe_of_worker.close()

    def has_begun(self, seconds):
        """Wait for its first message. One that died is noticed later, with its reason."""
        if not self.pipe.poll(seconds):
            return False
        with contextlib.suppress(EOFError, OSError):
            assert self.pipe.recv() == BEGUN
        return True

    def stop(self):
        """At once, whatever it does: a worker only reads."""
        # Not in a process that was forked with this object in its memory.
        if os.getpid() != self.parent:
            return
        self.pipe.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join(10)


def in_workers(function, jobs, count, in_flight=None, setting="data.workers"):
    """Yield function(job) of each job, in the jobs' order.

    Args:
        function: where there is no fork it must be one that can be pickled. Its answer may be
            nested tuples, lists and dicts; tensors travel as NumPy arrays, and arrays arrive as
            tensors.
        jobs: small things (a few kB), taken from their iterator when they are handed out.
        count: how many processes; 0: this one computes them.
        in_flight: how many jobs are handed out at once, at most.
        setting: the key that sets count, for messages; None where there is none.

    Raises:
        InputLost: says what became of a worker.
        RuntimeError: any other error of `function`, with its traceback.
    """
    if count == 0:
        for job in jobs:
            yield in_this_process(function, job)
        return
    in_flight = in_flight or BATCHES_AHEAD * count
    jobs = iter(enumerate(jobs))
    workers, answers = [], {}
    order = collections.deque()  # the numbers of the jobs in flight
    try:
        start_workers(workers, function, count, setting)
        while True:
            while len(order) < in_flight and (numbered_job := next(jobs, None)):
                worker = min(workers, key=lambda worker: worker.jobs)
                order.append(numbered_job[0])
                hand_out(worker, numbered_job, workers, setting)
            if not order:
                return
            while order[0] not in answers:
                receive(workers, answers, setting)
            yield unpack(answers.pop(order.popleft()))
    finally:
        for worker in workers:
            worker.stop()


def in_this_process(function, job):
    """function(job); InputLost where the system is short of something."""
    try:
        return function(job)
    except Exception as error:
        why = shortage(error)
        if why:
            raise InputLost(f"images could not be read: {why}") from error
        raise


def start_workers(workers, function, count, setting):
    """Append `count` workers to a list, and wait until they have begun.

    A fork can wait for ever for a lock that some other thread held at that moment, for it has no
    such thread. In CPython 3.11 that is the lock of all thread states, which a thread of C++ takes
    without the GIL (PyOS_AfterFork_Child, _PyThreadState_DeleteExcept; seen after a collective of
    gloo's). Such a worker is killed, and another one is forked.
    """
    try:
        for _ in range(count):
            workers.append(Worker(function, workers))
        for i in range(count):
            wait_or_replace(workers, i, function, setting)
    except OSError as error:
        why = shortage(error) or f"the system has no more processes or memory ({error.strerror})"
        way_out = f"; or lower {setting}" if setting else ""
        raise InputLost(
            f"only {len(workers)} of {count} image workers could be started: {why}{way_out}"
        ) from error


def wait_or_replace(workers, i, function, setting):
    """Wait until worker i of a list has begun. One that does not is replaced, a few times."""
    for seconds in BEGIN_SECONDS:
        if workers[i].has_begun(seconds):
            return
        workers[i].stop()
        workers[i] = Worker(function, workers[:i] + workers[i + 1 :])
    raise InputLost(
        f"an image worker did not begin within {BEGIN_SECONDS[-1]} s, nor did "
        f"{len(BEGIN_SECONDS) - 1} before it: this machine does too much else, or lower "
        f"{setting} (0 needs no workers)"
    )


def hand_out(worker, numbered_job, workers, setting):
    """Give a worker (number, job)."""
    worker.jobs += 1
    try:
        worker.pipe.send(numbered_job)
    except OSError as error:
        raise InputLost(describe_death(worker, workers, setting)) from error


def receive(workers, answers, setting):
    """Wait until a worker answers or dies. Each answer is put into a dict {job's number: answer}.

    Answers are taken from all workers, not only from the one whose turn it is: one that could not
    get rid of a large answer would wait instead of decoding the next.
    """
    by_handle = {}
    for worker in workers:
        by_handle[worker.pipe] = by_handle[worker.process.sentinel] = worker
    ready = pipes.wait(by_handle)
    for handle in ready:
        worker = by_handle[handle]
        # An end is looked at below, after what the worker said before.
        if handle is not worker.pipe:
            continue
        try:
            number, reply = worker.pipe.recv()
        except (EOFError, OSError) as error:
            raise InputLost(describe_death(worker, workers, setting)) from error
        worker.jobs -= 1
        answers[number] = reply
    for handle in ready:
        if handle is not by_handle[handle].pipe:
            raise InputLost(describe_death(by_handle[handle], workers, setting))


def unpack(reply):
    """What `answer` made -> the result, or its error raised."""
    kind, value = reply
    if kind == "lost":
        raise InputLost(value)
    if kind == "fault":
        raise RuntimeError(f"an image worker failed:\n{value}")
    return as_tensors(value)


# -------------------------------------------------- in a worker


def serve(function, pipe, parent, inherited):
    """A worker's life: (number, job) comes, (number, answer) goes, until the parent is gone."""
    # Ctrl-C reaches the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(BEGUN)
        while True:
            while not pipe.poll(CHECK_PARENT_SECONDS):
                # It was killed, while another program holds a copy of its end of the pipe.
                if os.getppid() != parent:
                    return
            number, job = pipe.recv()
            try:
                pipe.send((number, answer(function, job)))
            # The answer could not be pickled, and nothing was sent.
            except (MemoryError, TypeError, AttributeError, pickle.PicklingError) as error:
                pipe.send((number, failure(error)))


def answer(function, job):
    """-> ("done", function(job)), ("lost", a sentence) or ("fault", a traceback)."""
    try:
        return "done", as_arrays(function(job))
    except InputLost as lost:
        return "lost", str(lost)
    except Exception as error:
        return failure(error)


def failure(error):
    """What a worker answers where an error was raised: see `answer`."""
    why = shortage(error)
    if why:
        return "lost", f"images could not be read: in a worker {why}"
    return "fault", "".join(traceback.format_exception(error))


def as_arrays(value):
    """Nested tuples, lists and dicts, their tensors as NumPy arrays.

    torch would put a tensor into a file in /dev/shm.
    """
    return convert(value, torch.Tensor, torch.Tensor.numpy)


def as_tensors(value):
    """Nested tuples, lists and dicts, their NumPy arrays as tensors."""
    return convert(value, np.ndarray, torch.from_numpy)


def convert(value, kind, function):
    """function(x) for each x of a kind in nested tuples, lists and dicts."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {name: convert(inner, kind, function) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(convert(inner, kind, function) for inner in value)
    return value


# -------------------------------------------------- what went wrong, in a sentence


def shortage(error):
    """What the system was short of, and the way out, if that is why `error` was raised."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):
            return (
                f"{os.strerror(number)}: more files are open than this process may have "
                f"({file_limit()}); raise ulimit -n"
            )
        torch_has_none = "can't allocate memory" in str(error)
        if number == errno.ENOMEM or isinstance(error, MemoryError) or torch_has_none:
            return "memory ran out; allow more, or take fewer workers or a smaller batch_size"
        error = error.__cause__ or error.__context__
    return None


def file_limit():
    """How many files this process may have open."""
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # On Windows.
    except ImportError:
        return "unknown"


def describe_death(worker, workers, setting):
    """What became of a worker that is gone: a sentence."""
    worker.process.join(5)
    code, name = worker.process.exitcode, f"image worker {worker.process.pid}"
    fewer = "allow more memory"
    if setting:
        fewer = f"lower {setting}, now {len(workers)}, or batch_size, or {fewer}"
    if code is None:
        return f"{name} closed its pipe but goes on; this is a fault of the program"
    if code >= 0:
        return f"{name} ended by itself, with status {code}; see what it printed above"
    is_known = -code in set(signal.Signals)
    signal_name = signal.Signals(-code).name if is_known else f"signal {-code}"
    why = {
        "SIGKILL": f"most likely memory ran out, on this machine or in its container: {fewer}",
        "SIGBUS": f"memory ran out, or the file of data.cache was cut or cannot be read: {fewer}",
        "SIGSEGV": "most likely a library that decodes images crashed: with workers=0, "
        "python -X faulthandler shows where",
    }
    explanation = f"; {why[signal_name]}" if signal_name in why else ""
    return f"{name} was killed by {signal_name}{explanation}"
