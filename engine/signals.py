"""Told to stop: SIGTERM (kill, torchrun, a time limit that is reached), SIGUSR1 (SLURM's warning before it: sbatch --signal=USR1@120).

The run finishes its step, saves, and exits with 75, EX_TEMPFAIL: no success, so that `torchrun --max-restarts` starts it again where a worker alone
was told, and no failure of the run either, so that a script can requeue it. torchrun itself, told, passes SIGTERM on, sends SIGKILL after 30 seconds
(TORCH_ELASTIC_SHUTDOWN_TIMEOUT; newer ones: --shutdown-timeout), and ends with 1 whatever its workers say: see slurm/train.sbatch.
"""

import os
import signal
import threading

EXIT = 75
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
]  # Windows has the first alone
caught = []


def listen():
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=obey_the_parent_alone)


def asked():
    return bool(caught)


def obey_the_parent_alone():
    """In a worker that decodes images. torchrun signals whole process groups, SLURM whole jobs, and without its images no step can be finished."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def obey():
        while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)  # multiprocessing ends workers so

    threading.Thread(target=obey, daemon=True).start()
