"""Checkpoints: written aside and renamed, so that a file with the right name is always a whole one; read without unpickling code."""
import os

import torch

from . import config, distributed

MAY_CHANGE = ("name", "paper", "knn", "linear", "finetune", "detect", "data.workers", "data.root")            # on resuming; nothing else of the settings may


def rng_state():
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(path, value):
    """torch.save, all or nothing."""
    aside = path + ".part"
    with open(aside, "wb") as f:
        torch.save(value, f)
        f.flush()
        os.fsync(f.fileno())                               # on the disk before it takes the name
    os.replace(aside, path)


def read(path):
    """torch.load without code, onto the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist")
    except Exception as error:                             # truncated, not a checkpoint, or one that wants to run code
        raise SystemExit(f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")


def save(path, settings, epoch, **parts):
    """Everything that training holds, after `epoch` epochs. parts: modules, optimizer, scaler. Every process must call it."""
    rng = distributed.gather_objects(rng_state())
    if distributed.is_main():
        write(path, {"epoch": epoch, "settings": settings, "rng": rng, **{k: v.state_dict() for k, v in parts.items()}})


def resume(path, settings, **parts):
    """Put a checkpoint's state into parts, on every process. -> the number of epochs done."""
    saved = read(path)
    missing = [k for k in ("epoch", "settings", "rng", *parts) if k not in saved] if isinstance(saved, dict) else ["everything"]
    if missing:
        raise SystemExit(f"{path} is not a checkpoint of train_pretrain.py: it has no {missing[0]}")
    other = config.difference(saved["settings"], settings, MAY_CHANGE)
    if other:
        raise SystemExit(f"{path} is of another run: {other}; choose another name=..., or start this one over with --fresh")
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"{path} does not fit: {' '.join(str(error).split())[:300]}; was the data set changed? start over with --fresh")
    if len(saved["rng"]) == distributed.world_size():
        set_rng_state(saved["rng"][distributed.rank()])
    elif distributed.is_main():
        print(f"{path} is of {len(saved['rng'])} processes, now there are {distributed.world_size()}: it goes on with fresh random numbers")
    return saved["epoch"]
