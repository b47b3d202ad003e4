"""Jobs: commands of this repository, each a process of its own, in a queue or side by side.

A job writes into a log file. If this program is told to stop, it tells its jobs, which save and
end (engine/signals.py), and waits for them; if it is killed, they see that themselves
(engine/orphans.py).
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from engine import checkpoint, orphans, signals
from engine.progress import duration, progress

SECONDS_BETWEEN_LOOKS = 0.2
# So long jobs may take to save and end.
PATIENCE = signals.PATIENCE + signals.PATIENCE_OF_A_SAVE
LAST_LINES = 5
CPUS_OF_GPU = 8  # for SLURM


@dataclass(eq=False)
class Job:
    """A command to run.

    Args:
        title: what it is, in words.
        command: its words; `python` and `torchrun` are this program's own.
        log: the file that its output is appended to.
        after: the job that must have ended well before, if any.
        state: "waiting", "running", "done", "failed" or "left out".
        reason: the last lines of a job that failed.
    """

    title: str
    command: list
    log: str
    after: "Job | None" = None
    state: str = "waiting"
    reason: str = field(default="", repr=False)

    def is_ready(self):
        """May it start now?"""
        return self.state == "waiting" and (self.after is None or self.after.state == "done")

    def make_log_folder(self):
        """Make the folder of the log; SystemExit with a sentence where that cannot be."""
        with checkpoint.writing(self.log):
            os.makedirs(os.path.dirname(self.log), exist_ok=True)

    def is_lost(self):
        """Can it never start, for what it needs has failed?"""
        needed = self.after
        return self.state == "waiting" and bool(needed) and needed.state in ("failed", "left out")


class Process:
    """A running job."""

    def __init__(self, job, environment):
        self.job, self.began = job, time.monotonic()
        job.make_log_folder()
        with checkpoint.writing(job.log):
            log = open(job.log, "a")  # noqa: SIM115 (it is closed below)
        with log:
            log.write(f"$ {shlex.join(job.command)}\n")
            log.flush()
            self.log_starts = log.tell()
            # A session of its own: Ctrl-C is for this program, which tells its jobs once.
            self.process = subprocess.Popen(
                executable(job.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        job.state = "running"

    def has_ended(self):
        """Has it ended? If so the job's state says how."""
        status = self.process.poll()
        if status is None:
            return False
        self.job.state = "failed" if status else "done"
        if status:
            self.job.reason = self.last_lines() or f"it ended with {status} and without a word"
        return True

    def last_lines(self):
        """The last lines that it printed."""
        with open(self.job.log, errors="replace") as log:
            log.seek(self.log_starts)
            lines = [line.rstrip() for line in log if line.strip()]
        return "\n".join(lines[-LAST_LINES:])

    def stop(self):
        """Tell it to save and to end."""
        self.process.send_signal(signal.SIGTERM)

    def describe_end(self):
        """How it ended, in words."""
        return f"{self.job.state} after {duration(time.monotonic() - self.began)}"


def executable(command):
    """The words of a command, with the Python that runs this program."""
    program, *words = command
    if program == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words]
    return [sys.executable, *words]


def run_jobs(jobs, gpus=()):
    """Run jobs in their order, one at a time, or one on each GPU.

    Args:
        jobs: list of Job. Their states say at the end what became of them.
        gpus: the numbers of GPUs, as words, where an empty one is for a job that sees no GPU;
            without any: one job at a time, which sees all devices.

    Raises:
        StopRequested: this program was told to stop, and its jobs have ended.
    """
    signals.say_when_stopped(how_to_go_on)
    environment = {
        orphans.STARTED_BY: str(os.getpid()),
        # The log is read while the job runs.
        "PYTHONUNBUFFERED": "1",
        # Seconds that torchrun leaves its workers after SIGTERM; its default is 30.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",
    }
    slots = [{**environment, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [environment]
    running = {}  # {the number of a slot: Process}
    with (
        signals.deferred(PATIENCE),
        progress(description="table", total=len(jobs), unit="jobs") as bar,
    ):
        try:
            while not signals.stop_requested():
                leave_out_lost(jobs, bar)
                start_ready(jobs, slots, running, bar)
                if not running:
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)
                collect_ended(running, bar)
        finally:
            stop_all(running)


def how_to_go_on():
    """Half a sentence for a program that is told to stop."""
    return "so were the jobs, and the same line goes on where they are"


def stop_all(running):
    """Tell the processes in `running` to stop, and wait for them."""
    for process in running.values():
        process.stop()
    for process in running.values():
        process.process.wait()


def leave_out_lost(jobs, bar):
    """Mark the jobs whose first part has failed."""
    for job in jobs:
        if job.is_lost():
            job.state = "left out"
            bar.write(f"{job.title}: left out, for what it needs has failed")
            bar.update()


def start_ready(jobs, slots, running, bar):
    """Start a job in each free slot.

    Args:
        jobs: list of Job.
        slots: the environment variables of each job that may run at a time.
        running: {the number of a slot: Process}, which is filled.
        bar: the progress bar.
    """
    for i, environment in enumerate(slots):
        while i not in running and (job := next_ready(jobs)):
            gpu = environment.get("CUDA_VISIBLE_DEVICES")
            where = f" on GPU {gpu}" if gpu else ""
            try:
                running[i] = Process(job, environment)
            except SystemExit as refusal:  # its log cannot be written
                job.state, job.reason = "failed", str(refusal)
                bar.write(f"{job.title}: failed before its start")
                bar.update()
            else:
                bar.write(f"{job.title}: begun{where}, see {job.log}")


def next_ready(jobs):
    """The first job that may start now, or None."""
    return next((job for job in jobs if job.is_ready()), None)


def collect_ended(running, bar):
    """Take the processes that have ended out of `running`."""
    for i, process in list(running.items()):
        if process.has_ended():
            del running[i]
            bar.write(f"{process.job.title}: {process.describe_end()}")
            bar.update()


def submit_jobs(jobs):
    """Hand a list of Job to SLURM, each after the one that it needs.

    Raises:
        SystemExit: one sentence, if sbatch refuses one.
    """
    numbers = {}  # {job: what sbatch calls it}
    for job in jobs:
        job.make_log_folder()
        command = sbatch_command(job, numbers.get(job.after))
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit("--slurm wants sbatch, and there is none on this machine") from None
        if result.returncode:
            reason = " ".join(result.stderr.split())
            raise SystemExit(f"sbatch refused a job: {reason}; it was: {shlex.join(command)}")
        # With several clusters it is "number;cluster".
        numbers[job] = result.stdout.strip().split(";")[0]
        print(f"{job.title}: job {numbers[job]}, see {job.log}", flush=True)


def sbatch_command(job, after=None):
    """The words of sbatch for a job. after: the number of the job that it needs, if any."""
    at = next(i for i, word in enumerate(job.command) if word.endswith(".py"))
    launcher, words = job.command[:at], job.command[at:]
    gpus = launcher[-1] if launcher[0] == "torchrun" else "1"
    name = os.path.basename(os.path.dirname(job.log))
    command = ["sbatch", "--parsable", "--nodes=1", f"--gpus-per-node={gpus}"]
    command += [f"--cpus-per-task={CPUS_OF_GPU * int(gpus)}"]
    command += [f"--job-name={name}", f"--output={job.log}"]
    if after:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, "slurm/train.sbatch", *words]
