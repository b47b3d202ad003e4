"""Training processes whose launcher was killed end as well.

torchrun and reproduce.py end their processes when they are told to stop, but not when they are
killed themselves (kill -9, or for memory): these would train on, unseen, and hold the GPUs and the
run's folder. A script that `python` started from a shell is left alone: under nohup its shell may
go.
"""

import os
import signal
import threading
import time

SECONDS_BETWEEN_LOOKS = 1
# The variable in which reproduce.py tells its jobs which process it is.
STARTED_BY = "STARTED_BY_REPRODUCE"


def end_with_launcher():
    """Send SIGTERM to this process as soon as torchrun or reproduce.py, which started it, is gone.

    So it saves what it can and ends: see engine/signals.py. To be called early, for a torchrun that
    was killed before is not missed. (Linux can send such a signal by itself, but does so when the
    thread ends that started the process.)
    """
    if hasattr(os, "getppid") and (launcher := find_launcher()) is not None:
        arguments = os.getpid(), launcher
        threading.Thread(target=watch, args=arguments, name="launcher's end", daemon=True).start()


def find_launcher():
    """The number of the process whose end is this one's, or None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.getppid()
    started_by = os.environ.get(STARTED_BY, "")
    return int(started_by) if started_by.isdecimal() else None


def watch(process, parent):
    """Wait until `process`, which is this one, has another parent than `parent`; then tell it."""
    # A process without a parent gets another one: init, or whoever reaps orphans.
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(process, signal.SIGTERM)
