"""Checkpoints: each file is whole, its checksum says so, and reading it runs no code.

A file is written aside and renamed, so that one with the right name is always whole, and the one
before it is kept. Beside that, the folder of a run: its lock, and how a run begins anew in it.
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

# The files of a run that hold its weights, or belong to them. The first two it leaves at its end.
WEIGHTS = "backbone.preprocessing.yaml", "backbone.pt", "previous.pt", "last.pt"

# On resuming these settings may change, and no others. What precision a device has is its own
# affair: `auto` means another one on other hardware, and whoever names it means no other run.
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


# --------------------------------------------------------------------------------------- one file


@contextlib.contextmanager
def writing(path):
    """End the program with one sentence where a disk is full, fails, or may not be written."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause and not isinstance(cause, OSError):  # torch wraps it
            cause = cause.__context__
        if cause is None:
            raise
        raise SystemExit(
            f"{path} cannot be written: {cause.strerror or cause}; what was there before is as it "
            "was"
        ) from error


def write(path, value, keep=None):
    """torch.save, all or nothing.

    Args:
        path: of the file.
        value: what torch.load(weights_only=True) can read.
        keep: the name that a file which is already there gets; None: it is lost.
    """
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
        if keep and os.path.exists(path):
            keep_file(path, keep)
        os.replace(aside, path)


def keep_file(path, keep):
    """Give a file a second name, without a moment in which the first one is missing.

    On a disk without hard links there is such a moment.
    """
    # A kill between the two renames of a write leaves one file with both names.
    if os.path.exists(keep) and os.path.samefile(path, keep):
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(keep + ".part")
    try:
        os.link(path, keep + ".part")
        os.replace(keep + ".part", keep)
    except OSError:
        os.replace(path, keep)


def append_checksum(f):
    """Put a checksum of a file into its end: a zip's comment, which every reader skips.

    torch.load leaves zip's own checksums unread, and these do not cover all of a file.
    """
    f.seek(-2, os.SEEK_END)
    f.write((14).to_bytes(2, "little"))  # the comment's length is a zip's last field
    comment = checksum(f)  # 14 bytes
    f.seek(0, os.SEEK_END)
    f.write(comment)


def checksum(f, size=None):
    """The checksum of the first `size` bytes of an open file; None: of all."""
    f.seek(0)
    crc = 0
    left = os.fstat(f.fileno()).st_size if size is None else size
    while left > 0 and (part := f.read(min(left, 2**24))):
        crc = zlib.crc32(part, crc)
        left -= len(part)
    return f"crc32 {crc:08x}".encode()


def has_valid_checksum(path):
    """Whether a file is as it was written. Other people's files have no checksum, and pass."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(-min(64, size), os.SEEK_END)
        # The end record of a zip has 18 bytes after its mark, and then the comment.
        record = ([b""] + f.read().split(b"PK\5\6")[1:])[-1]
        comment = record[18:]
        if int.from_bytes(record[16:18], "little") == 0:
            return True
        return comment == checksum(f, size - len(comment))


def read_checkpoint(path):
    """torch.load onto the CPU, without running code. SystemExit where that can't be done."""
    try:
        if not has_valid_checksum(path):
            raise ValueError("it is damaged: its bytes are not those that were written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist") from None
    except Exception as error:  # it is cut off, no checkpoint, or wants to run code
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise SystemExit(
            f"{path} is not a checkpoint that can be read safely "
            f"({type(error).__name__}: {first_line})"
        ) from error


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


# ----------------------------------------------------------------------------- the folder of a run


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
def lock_run_folder(folder, choice="name=..."):
    """Make a run's folder, and let no other process work there until the block has ended.

    Every process calls it; the first one locks. A run that is refused leaves no lock behind, and no
    folder that it made for nothing: the program may be a notebook, which lives on.

    Args:
        folder: is made where it is missing.
        choice: what chooses another folder, for the sentence.
    """
    held, made = None, False
    with distributed.same_exit_on_all_ranks():
        if distributed.is_main():
            with writing(folder):
                made = not os.path.isdir(folder)
                os.makedirs(folder, exist_ok=True)
                held = acquire_lock(folder, choice)
    try:
        yield
    finally:
        if held:
            release_lock(held)
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the run has begun
                os.rmdir(folder)


def acquire_lock(folder, choice="name=..."):
    """Lock a run's folder. Returns the locked file, or None on a disk without locks.

    lockf, not flock: workers that decode images do not inherit it, and they may live on for some
    seconds after this process was killed.
    """
    while True:
        file = open(os.path.join(folder, "lock"), "a+")  # noqa: SIM115 (it stays open)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise SystemExit(
                f"{folder} is in use: {owner} is at work there; stop it, wait for it, or choose "
                f"another {choice}"
            ) from None
        except (AttributeError, OSError) as error:  # Windows, or a network disk without locks
            file.close()
            print_main(
                f"{folder} cannot be locked ({error}): see to it yourself that no second process "
                "trains there"
            )
            return None
        if is_still_there(file):
            break
        # Its owner removed it after it was opened here, so that the next one would lock another.
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def release_lock(file):
    """Remove a locked file while it is still locked.

    Whoever opened it before sees in `acquire_lock` that it is gone; whoever comes later makes a new
    one.
    """
    with contextlib.suppress(OSError):
        if is_still_there(file):
            os.remove(file.name)
    file.close()


def is_still_there(file):
    """Whether an open file is the one that has its name on the disk."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def move_aside(folder):
    """Give what old weights left in a run's folder names ending in .before, as a run starts over.

    So nothing takes it for the new run's. What had such a name before is lost. It is the weights,
    what was evaluated and trained from them, their settings and their log. The weights come last: a
    start that is killed here does the rest the next time.
    """
    present = os.listdir(folder)
    weights = [name for name in WEIGHTS if name in present]
    # Without weights these two are of a start that saved nothing yet, and are written anew.
    records = [name for name in ("config.yaml", "log.jsonl") if name in present and weights]
    rename_to_before(folder, results_in(folder) + records + weights)


def move_results_aside(folder):
    """Move aside what a run left at its end, as it goes on for more epochs.

    Its checkpoints and its log stay.
    """
    weights = [name for name in WEIGHTS[:2] if os.path.exists(os.path.join(folder, name))]
    rename_to_before(folder, results_in(folder) + weights)


def results_in(folder):
    """The names of what was evaluated and trained from a run's weights."""
    present = os.listdir(folder)
    results = [name for name in present if name.endswith(".jsonl") and name != "log.jsonl"]
    others = "linear", "finetune", "detect", "negatives.png"
    return results + [name for name in others if name in present]


def rename_to_before(folder, names):
    """Let names in a folder end in .before."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path + ".before"):
            shutil.rmtree(path + ".before")
        os.replace(path, path + ".before")


def previous_checkpoint(path):
    """Where the checkpoint before the last one is kept."""
    return os.path.join(os.path.dirname(path), "previous.pt")


# ------------------------------------------------------------------------------------ a run's state


def exists(path):
    """Whether there is a checkpoint to resume, the same to every process."""
    is_there = os.path.exists(path) or os.path.exists(previous_checkpoint(path))
    return any(distributed.all_gather_object(is_there))


def save(path, settings, epoch, **parts):
    """Write everything that training holds. Every process calls it, and waits for the file.

    What is not finite is never saved: SystemExit.

    Args:
        path: of the file; the one that is there is kept as previous_checkpoint(path).
        settings: of the run.
        epoch: how many epochs are done.
        parts: modules, optimizer, scaler, and `place`, an EpochProgress.
    """
    rng = distributed.all_gather_object(devices.rng_state())
    with distributed.same_exit_on_all_ranks():
        if distributed.is_main():
            state = {name: part.state_dict() for name, part in parts.items()}
            # The figures in `place` may be anything.
            trained = {name: value for name, value in state.items() if name != "place"}
            broken = not_finite(trained)
            if broken:
                raise SystemExit(
                    f"{path} is not written, for {broken} is not finite; what was there before is "
                    "as it was"
                )
            precision = getattr(parts.get("encoder"), "precision", None)
            state |= {"epoch": epoch, "settings": settings, "rng": rng, "precision": precision}
            write(path, state, keep=previous_checkpoint(path))


def not_finite(value, name=""):
    """The name of the first tensor in nested dicts and lists with an inf or a NaN; or None."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.numel():
            return None
        # A NaN comes out of aminmax as NaN. isfinite would make a copy of a whole bank.
        return None if torch.stack(value.aminmax()).isfinite().all() else name
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        broken = not_finite(inner, f"{name}.{key}".lstrip("."))
        if broken is not None:
            return broken
    return None


def resume(path, settings, may_change=MAY_CHANGE, goes_on_longer=None, **parts):
    """Load a checkpoint's state into parts. Every process calls it.

    If the file is damaged the one before is taken. SystemExit where neither can be.

    Args:
        path: of the file.
        settings: of the run; those of the checkpoint must be the same.
        may_change: the settings that may differ.
        goes_on_longer: is asked, with the path and the checkpoint's settings, whether those of the
            run differ as they may because it is to train for more epochs.
        parts: see `save`.

    Returns:
        The number of epochs done.
    """
    path, saved = read_last(path)
    required = ["epoch", "settings", "rng", *(name for name in parts if name != "place")]
    missing = ["everything"]
    if isinstance(saved, dict):
        missing = [name for name in required if name not in saved]
    if missing:
        raise SystemExit(f"{path} is not a checkpoint of train_pretrain.py: it has no {missing[0]}")
    is_longer = goes_on_longer is not None and goes_on_longer(path, saved["settings"])
    other = None if is_longer else config.difference(saved["settings"], settings, may_change)
    if other:
        raise SystemExit(
            f"{path} is of another run: {other}; choose another name=..., or start this one over "
            "with --fresh"
        )
    for name, part in parts.items():
        # An empty scaler was written in a precision without loss scaling. If it is needed now, it
        # begins now.
        if name != "scaler" or saved[name]:
            load_part(path, part, saved.get(name, {}))
    tell_other_precision(path, saved.get("precision"), parts.get("encoder"))
    resume_random_numbers(path, saved["rng"])
    return saved["epoch"]


def statistics_of(path):
    """{"mean", "std"} of the images' normalisation, as the settings in a checkpoint have them.

    None for what they do not say. Of a damaged file that of the one before is taken, as by
    `resume`. No tensor is read.
    """
    for candidate in (path, previous_checkpoint(path)):
        with contextlib.suppress(Exception):  # `resume` says what is wrong
            saved = torch.load(candidate, map_location="cpu", weights_only=True, mmap=True)
            data = saved["settings"]["data"]
            return {"mean": data["mean"], "std": data["std"]}
    return {"mean": None, "std": None}


def read_last(path):
    """Read a checkpoint, or where it is damaged the one before.

    All processes read the same file: what one of them can't read none of them takes.

    Returns:
        The path of the file, and what it holds.
    """
    problems = []
    for candidate in (path, previous_checkpoint(path)):
        saved = problem = None
        try:
            saved = read_checkpoint(candidate)
        except SystemExit as refusal:
            problem = refusal.code
        of_all = [p for p in distributed.all_gather_object(problem) if p]
        if not of_all:
            break
        problems.append(of_all[0])
    else:
        distributed.exit_all_ranks(f"{problems[0]}, and {problems[1]}: start over with --fresh")
    if problems:
        print_main(f"{problems[0]}; going on from the one before, {candidate}")
        if distributed.is_main() and os.path.exists(path):
            # Or the next save would put it in the place of the good one.
            with writing(path):
                os.replace(path, path + ".damaged")
    return candidate, saved


def load_part(path, part, state):
    """part.load_state_dict(state), whose refusal ends the program with one sentence."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise SystemExit(
            f"{path} does not fit: {words}; was the data set changed? start over with --fresh"
        ) from error


def tell_other_precision(path, old, encoder):
    """Say so if a run goes on in another precision. old: None in a file of before it was noted."""
    new = getattr(encoder, "precision", None)
    if None not in (old, new) and old != new:
        print_main(f"{path} was trained in {old} so far, and goes on in {new}")


def resume_random_numbers(path, states):
    """Go on with each process's random numbers.

    Other processes or another kind of device have other random numbers. That is no fault, and said.

    Args:
        path: of the checkpoint, for the sentence.
        states: of each process that wrote it, as device.rng_state() gives them.
    """
    if len(states) != distributed.world_size():
        print_main(
            f"{path} is of {len(states)} processes, now there are {distributed.world_size()}: it "
            "goes on with fresh random numbers"
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
            f"{path} was written on {old}, and goes on on {new}: from here on its random numbers "
            "are others"
        )
