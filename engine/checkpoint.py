"""Checkpoints: written aside and renamed, so that a file with the right name is always a whole one; the one before is kept; a damaged one is
noticed; read without unpickling code.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import zlib

import torch

from . import config, distributed
from . import device as devices
from .distributed import print_main

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# The files of a run that hold its weights, or belong to them.
WEIGHTS = "backbone.preprocessing.yaml", "backbone.pt", "previous.pt", "last.pt"

# On resuming these settings may change, and no others. What precision a device has is its own affair:
# `auto` means another one on other hardware, and whoever names it instead means no other run.
MAY_CHANGE = (
    "name",
    "paper",
    "knn",
    "linear",
    "finetune",
    "detect",
    "log",
    "model.precision",
    "data.workers",
    "data.root",
    "data.on_error",
    "data.check_files",
)


# ---------------------------------------------------------------------------------------------------- one file


@contextlib.contextmanager
def writing(path):
    """A disk that is full, or may not be written, or fails, ends the program with one sentence."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch wraps it
            cause = cause.__context__
        if cause is None:
            raise
        raise SystemExit(
            f"{path} cannot be written: {cause.strerror or cause}; what was there before is as it was"
        )


def write(path, value, keep=None):
    """torch.save, all or nothing. keep: the name that a file which is already there gets."""
    aside = path + ".part"
    try:
        with writing(path), open(aside, "w+b") as f:
            torch.save(value, f)
            append_checksum(f)
            f.flush()
            os.fsync(f.fileno())  # on the disk before it takes the name
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    with writing(path):
        if (
            keep
            and os.path.exists(path)
            and not (os.path.exists(keep) and os.path.samefile(path, keep))
        ):  # a kill may have left them one file
            with contextlib.suppress(FileNotFoundError):
                os.remove(keep + ".part")
            try:
                os.link(
                    path, keep + ".part"
                )  # so that there is no moment without a file of the name `path` ...
                os.replace(keep + ".part", keep)
            except OSError:  # ... but on a disk without hard links
                os.replace(path, keep)
        os.replace(aside, path)


def append_checksum(f):
    """Put a checksum of the file into its end: a zip's comment, which every reader skips. (torch.load leaves zip's own checksums unread, and
    these do not cover all of a file.)
    """
    f.seek(-2, os.SEEK_END)
    f.write((14).to_bytes(2, "little"))  # the comment's length is a zip's last field
    comment = checksum(f)  # 14 bytes
    f.seek(0, os.SEEK_END)
    f.write(comment)


def checksum(f, size=None):
    """Of the first `size` bytes of an open file."""
    f.seek(0)
    crc, left = 0, os.fstat(f.fileno()).st_size if size is None else size
    while left > 0 and (part := f.read(min(left, 2**24))):
        crc, left = zlib.crc32(part, crc), left - len(part)
    return f"crc32 {crc:08x}".encode()


def has_valid_checksum(path):
    """False for a file that ends with a checksum, and not with its own. Other people's files end with none."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(-min(64, size), os.SEEK_END)
        *_, end = (
            b"",
            *f.read().split(b"PK\5\6")[1:],
        )  # the end record of a zip: 18 bytes and the comment
        return int.from_bytes(end[16:18], "little") == 0 or end[18:] == checksum(
            f, size - len(end[18:])
        )


def read_checkpoint(path):
    """torch.load without code, onto the CPU."""
    try:
        if not has_valid_checksum(path):
            raise ValueError("it is damaged: its bytes are not those that were written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist")
    except Exception as error:  # truncated, not a checkpoint, or one that wants to run code
        raise SystemExit(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )


def digest(data):
    """A short name of bytes: the same for the same."""
    return "sha256 " + hashlib.sha256(data).hexdigest()[:16]


def file_digest(path):
    """The digest of a file."""
    try:
        with open(path, "rb") as f:
            return digest(f.read())
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist") from None


# ---------------------------------------------------------------------------------------------------- a run's folder and state


def check_writable(folder):
    """End all processes, with one sentence, if files can't be written into a folder.

    The folder need not be there yet. Scripts ask before work whose figures they write at its end.
    """
    with distributed.same_exit_on_all_ranks():
        if distributed.is_main():
            with writing(folder):
                is_new = not os.path.isdir(folder)
                os.makedirs(folder, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))
                    file.flush()
                if is_new:
                    os.rmdir(folder)


@contextlib.contextmanager
def lock_run_folder(folder):
    """Make a run's folder, and let no other process train there until the block has ended.

    Every process calls it; the first one locks. A run that is refused leaves no lock behind, and no
    folder that it made for nothing: the program may be a notebook, which lives on.
    """
    held, made = None, False
    with distributed.same_exit_on_all_ranks():
        if distributed.is_main():
            with writing(folder):
                made = not os.path.isdir(folder)
                os.makedirs(folder, exist_ok=True)
                held = acquire_lock(folder)
    try:
        yield
    finally:
        if held:
            release_lock(held)
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the run has begun
                os.rmdir(folder)


def acquire_lock(folder):
    """-> the locked file, or None on a disk without locks.

    lockf, not flock: workers that decode images do not inherit it, and they may live on for some
    seconds after this process was killed.
    """
    while True:
        file = open(os.path.join(folder, "lock"), "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise SystemExit(
                f"{folder} is in use: {who} trains there; stop it, wait for it, or choose another name=..."
            )
        except (AttributeError, OSError) as error:  # Windows, or a network disk without locks
            file.close()
            print_main(
                f"{folder} cannot be locked ({error}): see to it yourself that no second process trains there"
            )
            return None
        if still_there(file):
            break
        # Its owner removed it after it was opened here, so that the next one would lock another.
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def release_lock(file):
    """Remove a locked file while it is still locked: whoever opened it before sees in `acquire_lock` that it
    is gone, whoever comes later makes a new one.
    """
    with contextlib.suppress(OSError):
        if still_there(file):
            os.remove(file.name)
    file.close()


def still_there(file):
    """Is an open file the one that has its name on the disk?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def move_aside(folder):
    """What a run's folder holds of weights that it starts over without gets names ending in .before,
    so that nothing takes it for the new run's; what had such a name before is lost.

    That is the weights, what was evaluated and trained from them, their settings and their log. The
    weights come last: a start that is killed here does the rest the next time.
    """
    present = os.listdir(folder)
    weights = [name for name in WEIGHTS if name in present]
    results = [name for name in present if name.endswith(".jsonl") and name != "log.jsonl"]
    results += [name for name in ("linear", "finetune", "detect") if name in present]
    # Without weights these two are of a start that saved nothing yet, and are written anew.
    records = [name for name in ("config.yaml", "log.jsonl") if name in present and weights]
    for name in results + records + weights:
        path = os.path.join(folder, name)
        if os.path.isdir(path + ".before"):
            shutil.rmtree(path + ".before")
        os.replace(path, path + ".before")


def previous_checkpoint(path):
    """Where the checkpoint before the last one is kept."""
    return os.path.join(os.path.dirname(path), "previous.pt")


def exists(path):
    """Is there a checkpoint to resume? To every process the same."""
    return any(
        distributed.all_gather_object(
            os.path.exists(path) or os.path.exists(previous_checkpoint(path))
        )
    )


def save(path, settings, epoch, **parts):
    """Everything that training holds, after `epoch` epochs. parts: modules, optimizer, scaler. Every process must call it; none returns before
    the file is there. What is not finite is never saved.
    """
    rng = distributed.all_gather_object(devices.rng_state())
    with distributed.same_exit_on_all_ranks():
        if distributed.is_main():
            value = {k: v.state_dict() for k, v in parts.items()}
            broken = not_finite(
                {k: v for k, v in value.items() if k != "place"}
            )  # whose figures may be
            if broken:
                raise SystemExit(
                    f"{path} is not written, for {broken} is not finite; what was there before is as it was"
                )
            precision = getattr(parts.get("encoder"), "precision", None)
            write(
                path,
                {"epoch": epoch, "settings": settings, "rng": rng, "precision": precision, **value},
                keep=previous_checkpoint(path),
            )


def not_finite(value, name=""):
    """The name of the first tensor, in nested dicts and lists, with an inf or a NaN; or None."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return None
        # A NaN comes out of aminmax as NaN. isfinite would make a copy of a whole bank.
        return None if torch.stack(value.aminmax()).isfinite().all() else name
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    return next(
        (found for key, v in inside if (found := not_finite(v, f"{name}.{key}".lstrip(".")))), None
    )


def resume(path, settings, may_change=MAY_CHANGE, **parts):
    """Put a checkpoint's state into parts, on every process. -> the number of epochs done. If it is damaged the one before is taken."""
    problems = []
    for candidate in (path, previous_checkpoint(path)):
        saved = problem = None
        try:
            saved = read_checkpoint(candidate)
        except SystemExit as refusal:
            problem = refusal.code
        found = [
            p for p in distributed.all_gather_object(problem) if p
        ]  # all processes take the same file
        if not found:
            break
        problems.append(found[0])
    else:
        distributed.exit_all_ranks(f"{problems[0]}, and {problems[1]}: start over with --fresh")
    if problems:
        print_main(f"{problems[0]}; going on from the one before, {candidate}")
        if distributed.is_main() and os.path.exists(path):
            with writing(path):
                os.replace(
                    path, path + ".damaged"
                )  # or the next save would put it in the place of the good one
    needed = (
        "epoch",
        "settings",
        "rng",
        *(k for k in parts if k != "place"),
    )  # which older ones lack
    missing = [k for k in needed if k not in saved] if isinstance(saved, dict) else ["everything"]
    if missing:
        raise SystemExit(
            f"{candidate} is not a checkpoint of train_pretrain.py: it has no {missing[0]}"
        )
    other = config.difference(saved["settings"], settings, may_change)
    if other:
        raise SystemExit(
            f"{candidate} is of another run: {other}; choose another name=..., or start this one over with --fresh"
        )
    for name, part in parts.items():
        if name == "scaler" and not saved[name]:
            continue  # written in a precision without loss scaling, which begins now if it is needed
        try:
            part.load_state_dict(saved.get(name, {}))
        except (RuntimeError, ValueError) as error:
            raise SystemExit(
                f"{candidate} does not fit: {' '.join(str(error).split())[:300]}; was the data set changed? start over with --fresh"
            )
    say_other_precision(
        candidate, saved.get("precision"), getattr(parts.get("encoder"), "precision", None)
    )
    resume_random_numbers(candidate, saved["rng"])
    return saved["epoch"]


def say_other_precision(path, old, new):
    """old: None in a file of before it was noted."""
    if None not in (old, new) and old != new:
        print_main(f"{path} was trained in {old} so far, and goes on in {new}")


def resume_random_numbers(path, states):
    """states: of each process that wrote the file, as device.rng_state() gives them.

    Other processes or another kind of device have other random numbers. That is no fault, and said.
    """
    if len(states) != distributed.world_size():
        print_main(
            f"{path} is of {len(states)} processes, now there are {distributed.world_size()}: it goes on with fresh random numbers"
        )
        return
    state, new = states[distributed.rank()], devices.current.type
    old = next((kind for kind in state if kind != "cpu"), "cpu")
    try:
        devices.set_rng_state(state)
    except (RuntimeError, TypeError):  # of a generator that keeps another state
        old = f"another kind of {old}"
    if old != new:
        print_main(
            f"{path} was written on {old}, and goes on on {new}: from here on its random numbers are others"
        )
