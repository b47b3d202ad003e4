"""A thread that prepares the next batches while a step is computed.

On CUDA it has a stream of its own. A copy to the GPU waits for what its stream has been given
before, so that on the stream of the steps the augmentation would wait for the steps, and these for
it: the two would take turns.
"""

import contextlib
import queue
import threading
from functools import partial

import torch

from engine import device as devices


def prefetch(items, device, depth=2):
    """The same items, made by a thread, up to `depth` of them before they are asked for.

    What the thread raises is raised here.

    Args:
        items: an iterable; on CUDA of tuples of tensors.
        device: where they are computed.
        depth: how many are ready or in the making, at most.
    """
    made, stop = queue.Queue(depth), threading.Event()
    side, work = None, partial(fill_queue, items, made, stop)
    if device.type == "cuda":
        side = SideStream(device)
        work = partial(side.run, fill_queue, side.with_events(items), made, stop)
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            yield side.take(*item) if side else item
    # The one who asked may stop early.
    finally:
        stop.set()
        thread.join()


def fill_queue(items, made, stop):
    """Put (item, None) for each item into the queue `made`; last (None, what was raised)."""
    try:
        devices.use_in_this_thread()
        for item in items:
            put_unless_stopped(made, (item, None), stop)
            if stop.is_set():
                return
        put_unless_stopped(made, (None, StopIteration()), stop)
    # SystemExit too: a broken image.
    except BaseException as error:
        put_unless_stopped(made, (None, error), stop)


def put_unless_stopped(made, pair, stop):
    """Wait for room in the queue `made`, but not after the event `stop`."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            return made.put(pair, timeout=0.1)


class SideStream:
    """A CUDA stream beside that of the steps, for tensors that are handed from it to them."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # The images may still be on their way to the GPU.
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def run(self, function, *arguments):
        """Call a function whose work on the GPU goes to this stream."""
        with torch.cuda.stream(self.stream):
            function(*arguments)

    def with_events(self, items):
        """Yield (item, event) for each item. The event is over when its tensors are computed."""
        for item in items:
            yield item, self.stream.record_event()

    def take(self, item, event):
        """Return the item once it is safe to use on the stream of the steps."""
        steps = torch.cuda.current_stream(self.device)
        steps.wait_event(event)
        for tensor in item:
            # Its memory is this stream's, which may not have it back before the step is through.
            tensor.record_stream(steps)
        return item
