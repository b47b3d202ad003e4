"""Begin from weights: a run of pre-training that does not begin at random (--weights FILE).

Any file that engine/weights.py knows gives its backbone. One of our last.pt also gives its head,
its momentum encoder, its queue and its memory bank, where they fit.
"""

import os
from typing import NamedTuple

from engine import checkpoint, distributed, weights
from engine.distributed import print_main
from models.memory_bank import MemoryBank
from models.memory_queue import Queue


class Source(NamedTuple):
    """What a run begins from."""

    path: str
    backbone: dict  # {torchvision's key: tensor}
    sentence: str  # what was taken of the file
    encoder: dict  # state dicts, of one of our last.pt; else empty
    host: dict
    images: tuple  # the number and the fingerprint of those it was trained on


def read_source(run, path):
    """Read the file that a run begins from, before anything else is loaded.

    Every process calls it, and all must find the same file.

    Args:
        run: a Run.
        path: of the file, or None.

    Returns:
        a Source; None where the run begins at random, or goes on: then the file may be gone.

    Raises:
        SystemExit: says in one sentence what is wrong with the file.
    """
    if path is None or run.is_resumed:
        return None
    with distributed.same_exit_on_all_ranks():
        folder, file = os.path.split(path)
        is_own = os.path.realpath(folder) == os.path.realpath(run.folder)
        if is_own and file in checkpoint.WEIGHTS:
            raise SystemExit(
                f"--weights {path} lies in the folder of the run that is to begin from it, and "
                "would make room for the new weights; choose another name=..."
            )
        saved = weights.read_safely(path)
        backbone, sentence, _ = weights.find_backbone(path, saved)
        with open(path, "rb") as f:
            checksum = checkpoint.checksum(f)
    if len(set(distributed.all_gather_object(checksum))) > 1:
        distributed.exit_all_ranks(f"--weights {path} is not the same file to all processes")
    if not weights.is_last(saved):
        return Source(path, backbone, sentence, {}, {}, ())
    progress = saved.get("place", {})
    images = progress.get("images"), progress.get("data")
    return Source(path, backbone, sentence, saved["encoder"], saved["host"], images)


def fill(source, encoder, host, dataset):
    """Put what a file holds into a new encoder and a new host, and say what is taken.

    Args:
        source: a Source; None leaves everything at random.
        encoder: an Encoder.
        host: the host around it.
        dataset: that is trained on.

    Raises:
        SystemExit: the backbone does not fit.
    """
    if source is None:
        return
    weights.fill_backbone(source.path, encoder.backbone, source.backbone)
    taken, anew = ["backbone"], []
    has_head = load_if_it_fits(encoder.head, part_of(source.encoder, "head."))
    (taken if has_head else anew).append("head")
    if hasattr(host, "key_encoder"):
        net = host.key_encoder.net
        if load_if_it_fits(net, part_of(source.host, "key_encoder.net.")):
            taken.append("momentum encoder")
        else:
            net.load_state_dict(encoder.state_dict())
            anew.append("momentum encoder (equal to the encoder)")
    has_same_images = bool(source.host) and source.images == (len(dataset), dataset.fingerprint())
    for name, memory in host.named_children():
        if isinstance(memory, (Queue, MemoryBank)):
            state = part_of(source.host, name + ".")
            is_taken = has_head and fill_memory(memory, state, has_same_images)
            (taken if is_taken else anew).append(memory_name(name, memory))

    if source.encoder:
        print_main(f"began from {source.path}, one of our last.pt: its {in_words(taken)}")
    else:
        print_main(f"began from {source.sentence}")
    if anew:
        print_main(f"{in_words(anew)} begin{'s' if len(anew) == 1 else ''} anew")


def part_of(state, prefix):
    """The part of a state dict whose names begin so, without this beginning."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def load_if_it_fits(module, state):
    """Load a state dict if it has the names and the shapes of the module's. -> whether it has."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        return False
    module.load_state_dict(state)
    return True


def fill_memory(memory, state, has_same_images):
    """Take over old embeddings, if they fit. -> whether they do.

    A memory bank's rows are those of its images, and are of no use for others. A queue's keys are
    negatives, whatever images they are of: of others they only lose their index.
    """
    if isinstance(memory, MemoryBank):
        return has_same_images and load_if_it_fits(memory, state)
    is_taken = load_if_it_fits(memory, state)
    if is_taken and not has_same_images:
        memory.index.fill_(-1)
    return is_taken


def memory_name(name, memory):
    """The word for a queue or a bank. name: that it has in its host."""
    if isinstance(memory, Queue):
        return "queue"
    return "memory bank" if name == "bank" else f"memory bank of {name}"  # CMC has two


def in_words(names):
    """A list in words: "head, queue and memory bank"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
