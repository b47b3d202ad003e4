"""Runs of the scripts as processes of their own, without importing torch anew for each of them.

A fresh interpreter needs four seconds of CPU for the imports alone. Here a server imports them once
and forks itself for every run. What tests fresh interpreters or torchrun itself starts these.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_pretrain", "train_linear", "train_finetune", "train_detect", "processes"]
)
# The server starts with the first process, and takes this over.
os.environ["OMP_NUM_THREADS"] = "1"


def run(folder, script, *arguments, processes=1, check=True):
    """Run a script in a folder, by one process or by several that form a process group.

    Args:
        folder: the working directory.
        script: the name of one of our scripts, or the absolute path of a file.
        arguments: its command line.
        processes: how many processes run it.
        check: every process must exit with 0.

    Returns:
        A subprocess.CompletedProcess with the output of the first process and the worst exit code.
    """
    script = os.path.join(ROOT, script)  # an absolute path stays as it is
    arguments = [str(argument) for argument in arguments]
    environments = [{}] if processes == 1 else group_environments(processes)
    started = [
        SERVER.Process(target=run_script, args=(str(folder), script, arguments, environment))
        for environment in environments
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    out = read_output(folder, "out", environments[0])
    errors = [read_output(folder, "err", environment) for environment in environments]
    codes = [process.exitcode for process in started]
    if check:
        assert not any(codes), "\n".join([out, *errors])
    worst_code = max(codes, key=abs)
    return subprocess.CompletedProcess([script, *arguments], worst_code, out, errors[0])


def torchrun(processes, arguments, folder, check=True):
    """Run torchrun itself, which starts fresh interpreters. -> a subprocess.CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc_per_node", str(processes)]
    command += ["--master_port", str(free_port())]
    command += map(str, arguments)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def group_environments(processes):
    """Make the environment variables that torchrun gives each process of one machine."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port(candidates=(0,)):
    """Find a TCP port that nobody listens on. 0 stands for any that the system gives."""
    for port in candidates:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise AssertionError(f"no port of {candidates} is free")


def run_script(folder, script, arguments, environment):
    """Be the script: this is what a fork of the server does."""
    os.chdir(folder)
    os.environ.update(environment)
    # Image workers are forked, as they are in a program that was started by itself.
    multiprocessing.set_start_method("fork", force=True)
    for descriptor, kind in ((1, "out"), (2, "err")):
        path = output_file(folder, kind, environment)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def output_file(folder, kind, environment):
    """Name the file that takes what a process prints. kind: "out" or "err"."""
    return os.path.join(folder, f"said{environment.get('RANK', '')}.{kind}")


def read_output(folder, kind, environment):
    with open(output_file(folder, kind, environment)) as f:
        return f.read()
