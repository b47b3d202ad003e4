"""What a program does when it is told to stop.

SIGTERM comes from kill, from torchrun and at a time limit; SIGUSR1 from SLURM before that limit
(sbatch --signal=USR1@120); SIGINT from Ctrl-C; SIGHUP from an ssh connection that drops. All mean
the same:

* The first ends the program where it stands, by the exception StopRequested, whatever it is doing:
  reading a folder, evaluating, clustering, waiting for another process. Nothing is lost by that,
  for whatever is worth keeping was saved before.
* Within `with deferred():` it only makes `stop_requested()` true. A training step is such a block:
  the loop finishes the step, saves, and leaves. A save is another.
* A thread ends the program at once where the main one can't: after a second signal, after
  PATIENCE seconds without a finished step, and REACTION seconds after a signal outside such
  blocks. This needs nothing of the main thread, which may wait for a lost process for ever.

The exit status is 75, EX_TEMPFAIL: no success, so that `torchrun --max-restarts` starts the run
again where one of its processes alone was told, and no failure either, so that a script can put it
into the queue again. torchrun itself, when told, passes the signal on, kills what is left after 30
seconds (TORCH_ELASTIC_SHUTDOWN_TIMEOUT; newer ones: --shutdown-timeout), and ends with 1 whatever
its processes say: see slurm/train.sbatch.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time

EXIT_CODE = 75
NAMES = "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has two
PATIENCE = 30  # seconds without a finished step
PATIENCE_OF_A_SAVE = 300
REACTION = 3  # seconds that the main thread has to end by StopRequested
# torchrun and srun send on what the terminal or the scheduler sent to all processes: that is one
# request, not two.
REPEAT = 5 if "RANK" in os.environ or "SLURM_JOB_ID" in os.environ else 0

NOTHING_SAVED = "nothing was saved yet, and the same line starts again"


class StopRequested(BaseException):
    """The program was told to stop, in no deferred block. It passes every `except Exception`."""

    code = EXIT_CODE


class State:
    """What is known of requests to stop: one object for the program."""

    def __init__(self):
        self.is_listening = False
        self.first_request = None  # time.monotonic() of the first signal
        self.was_raised = False  # StopRequested
        self.deferred = 0  # nested deferred blocks
        self.patience = PATIENCE
        self.last_progress = time.monotonic()  # of a finished step, or of the end of a block
        self.describe_saved = None  # () -> which checkpoint holds what
        self.has_spoken = False  # the one sentence


state = State()


def run(main):
    """Run a script's main function; end by EXIT_CODE and one sentence if it is told to stop."""
    listen()
    try:
        main()
    except StopRequested:
        say_stopped()
        sys.exit(EXIT_CODE)


def listen():
    """Handle the signals from now on, those that the parent had ignored (nohup) aside.

    A script calls it before it imports torch, which takes seconds; a second call does nothing.
    """
    if state.is_listening:
        return
    state.is_listening = True
    sys.excepthook = functools.partial(stop_quietly, sys.excepthook)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # The handlers run in the main thread, once it is back from C. The byte is written at once.
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    watch_thread = threading.Thread(target=watch, args=(reader, writer), daemon=True)
    watch_thread.start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=obey_only_the_parent)


def handle(number, frame):
    """Handle a signal, in the main thread."""
    note_request()
    if not state.deferred:
        raise_once()


def raise_once():
    """Raise StopRequested, but not a second time while the first one passes."""
    if not state.was_raised:
        state.was_raised = True
        raise StopRequested


def stop_quietly(excepthook, kind, error, trace):
    """An excepthook that obeys a StopRequested outside of `run`, while modules are imported."""
    if issubclass(kind, StopRequested):
        end("told to stop")
    excepthook(kind, error, trace)


def note_request():
    """Note that the program was told to stop."""
    if state.first_request is None:
        state.first_request = state.last_progress = time.monotonic()


def stop_requested():
    """Was the program told to stop?"""
    return state.first_request is not None


@contextlib.contextmanager
def deferred(patience=PATIENCE):
    """A block that a signal does not interrupt: it looks at stop_requested() itself, or is short.

    A request that came meanwhile is obeyed at the end of the outermost block.

    Args:
        patience: after a request, seconds without a finished step until the program is ended.
    """
    before = state.patience
    state.deferred += 1
    state.patience = patience
    try:
        yield
    finally:
        state.deferred -= 1
        state.patience = before
        state.last_progress = time.monotonic()
    if stop_requested() and not state.deferred:
        raise_once()


@contextlib.contextmanager
def interruptible():
    """A part of a deferred block in which a signal ends the program at once, as outside of it."""
    depth, state.deferred = state.deferred, 0
    if stop_requested():
        raise_once()
    try:
        yield
    finally:
        state.deferred = depth
        state.last_progress = time.monotonic()


def step_finished():
    """Note that training goes on; see PATIENCE."""
    state.last_progress = time.monotonic()


def say_when_stopped(describe_saved):
    """Let the sentence of a program that is told to stop tell what is saved.

    Args:
        describe_saved: () -> which checkpoint holds what, as half a sentence; None: nothing yet.
    """
    state.describe_saved = describe_saved


def say_stopped(reason="told to stop"):
    """Print the one sentence, on the first process."""
    if state.has_spoken or os.environ.get("RANK", "0") != "0":
        return
    state.has_spoken = True
    saved = state.describe_saved() if state.describe_saved else None
    print(f"{reason}: {saved or NOTHING_SAVED}", flush=True)


# ----------------------------------------------------------------------------- the watching thread


def watch(reader, writer):
    """End the program where the main thread can't. `writer` is kept from being closed."""
    first_signal = None
    while True:
        reader.settimeout(None if first_signal is None else 0.2)
        try:
            n_signals = sum(number in SIGNALS for number in reader.recv(64))
        except TimeoutError:
            n_signals = 0
        if n_signals and first_signal is None:
            first_signal = time.monotonic()
            note_request()
            n_signals -= 1
        if n_signals and seconds_since(first_signal) >= REPEAT:
            end("told to stop twice, and ended at once")
        if first_signal is not None:
            end_if_overdue()


def seconds_since(moment):
    """Seconds since a time.monotonic()."""
    return time.monotonic() - moment


def end_if_overdue():
    """End the program if the main thread had its time."""
    waited = seconds_since(state.last_progress)
    if state.deferred and waited > state.patience:
        end(f"told to stop, and ended after {waited:.0f} s in which no step was finished")
    if not state.deferred and waited > REACTION:
        end("told to stop")


def end(reason):
    """End the program at once, with one sentence."""
    say_stopped(reason)
    sys.stdout.flush()
    os._exit(EXIT_CODE)


# ----------------------------------------------------------------------------------- image workers


def obey_only_the_parent():
    """Make a forked image worker end when its parent says so, and at no other signal.

    torchrun signals whole process groups, a terminal and SLURM do so too, and without its images no
    step can be finished.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=wait_for_the_parent, daemon=True).start()


def wait_for_the_parent():
    """End this process when its parent tells it to."""
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)  # multiprocessing ends workers so
