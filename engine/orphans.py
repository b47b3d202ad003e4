"""Training processes whose torchrun was killed end as well.

torchrun ends its processes when it is told to stop, but not when it is killed itself (kill -9, or
for memory): they would train on, unseen, and hold the GPUs and the run's folder. A script that
`python` started is left alone: under nohup its shell may go.
"""

import os
import signal
import threading
import time

SECONDS_BETWEEN_LOOKS = 1


def end_with_torchrun():
    """Send SIGTERM to this process as soon as torchrun, which started it, is gone.

    So it saves what it can and ends: see engine/signals.py. To be called early, for a torchrun that
    was killed before is not missed. (Linux can send such a signal by itself, but does so when the
    thread ends that started the process.)
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "getppid"):
        arguments = os.getpid(), os.getppid()
        threading.Thread(target=watch, args=arguments, name="torchrun's end", daemon=True).start()


def watch(process, parent):
    """Wait until `process`, which is this one, has another parent than `parent`; then tell it."""
    # A process without a parent gets another one: init, or whoever reaps orphans.
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(process, signal.SIGTERM)
