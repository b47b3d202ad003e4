"""Runs of the scripts as processes of their own, without importing torch anew for each of them.

A fresh interpreter needs four seconds of CPU for the imports alone. Here a server imports them once
and forks itself for every run. What tests fresh interpreters or torchrun itself starts these.
"""

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
os.environ["OMP_NUM_THREADS"] = "1"  # of the server, which is not yet there


def run(folder, script, *arguments, processes=1, check=True):
    """Run a script in a folder, by one process or by several that form a process group.

    script: the name of one of ours, or the path of a file. What it prints, of the first process, and
    what it exits with come back as a subprocess.CompletedProcess. check: it must exit with 0.
    """
    script = os.path.join(ROOT, script)  # a whole path stays as it is
    arguments = [str(argument) for argument in arguments]
    environments = [{}] if processes == 1 else group(processes)
    started = [
        SERVER.Process(target=child, args=(str(folder), script, arguments, environment))
        for environment in environments
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    out, err = (read(folder, kind, environments[0]) for kind in ("out", "err"))
    codes = [process.exitcode for process in started]
    others = [read(folder, "err", environment) for environment in environments[1:]]
    assert not check or not any(codes), "\n".join([out, err, *others])
    return subprocess.CompletedProcess([script, *arguments], max(codes, key=abs), out, err)


def torchrun(processes, arguments, folder, check=True):
    """torchrun itself, which starts fresh interpreters. -> a subprocess.CompletedProcess."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc_per_node", str(processes), "--master_port", str(free_port())),
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def group(processes):
    """What torchrun would tell each of several processes of one machine."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(folder, script, arguments, environment):
    """What a fork of the server does."""
    os.chdir(folder)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a program of its own
    for number, kind in ((1, "out"), (2, "err")):
        path = said(folder, kind, environment)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def said(folder, kind, environment):
    """The file with what a process printed."""
    return os.path.join(folder, f"said{environment.get('RANK', '')}.{kind}")


def read(folder, kind, environment):
    with open(said(folder, kind, environment)) as f:
        return f.read()
