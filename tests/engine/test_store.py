"""Objects through a store, each process played by a thread, and what happens when one is gone."""

import threading
import time

import pytest
import torch.distributed as dist

from engine import store
from engine.store import ObjectStore


def together(world, work, kept=None):
    """Call work(store) for each rank, all at once. -> what each returned or raised."""
    kept = kept or dist.HashStore()
    results = [None] * world

    def call_with_store(rank):
        store = ObjectStore(kept, rank, world)
        try:
            results[rank] = work(store)
        except BaseException as error:
            results[rank] = error
        finally:
            store.close()

    threads = [threading.Thread(target=call_with_store, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_an_object_of_each_is_given_to_all():
    def gather(store):
        return [store.gather((store.rank, call)) for call in range(3)]

    expected = [[(rank, call) for rank in range(4)] for call in range(3)]
    assert together(4, gather) == [expected] * 4


def test_bytes_of_any_number_go_in_pieces(monkeypatch):
    monkeypatch.setattr(store, "PIECE", 7)
    for size in (0, 1, 6, 7, 8, 50):
        value = bytes(range(size))
        spread, gathered = (
            together(2, lambda store, value=value, call=call: call(store, value))
            for call in (
                lambda store, value: store.spread([1], value),
                lambda store, value: store.gather_bytes(value),
            )
        )
        assert spread == [{1: value}] * 2
        assert gathered == [[value, value]] * 2


def test_only_the_senders_are_waited_for():
    def spread(store):
        assert store.rank != 2  # it never comes
        return store.spread([0, 1], b"%d" % store.rank)

    assert together(4, spread)[:2] == [{0: b"0", 1: b"1"}] * 2


def test_what_all_have_read_is_deleted():
    """After thirty calls the store holds as many keys as after three."""

    def many(count):
        def call(store):
            for i in range(count):
                store.spread([i % 2], b"x" * 100)
                store.gather(i)

        kept = dist.HashStore()
        together(2, call, kept)
        return kept.num_keys()

    assert many(30) == many(3) < 10


def test_who_leaves_no_sign_of_life_is_not_waited_for(monkeypatch):
    for name, seconds in (("BEAT", 0.01), ("SILENCE", 0.2), ("LONGEST_PAUSE", 0.01)):
        monkeypatch.setattr(store, name, seconds)

    def work(store):
        if store.rank == 0:
            return store.spread([1])
        while store.last_sign(1) is None:  # it lived, and then it did not
            time.sleep(0.001)

    waited, _ = together(2, work)
    assert isinstance(waited, SystemExit)
    assert "waits for process 1" in waited.code

    def slow(store):  # for as long as it lives, though it is late
        if store.rank == 0:
            return store.spread([1])
        time.sleep(0.6)
        return store.spread([1], b"late")

    assert together(2, slow) == [{1: b"late"}] * 2


def test_a_first_process_that_has_the_store_leaves_last(monkeypatch):
    kept, order = dist.HashStore(), []

    def end(rank):
        ObjectStore(kept, rank, 3, in_first=True).leave()
        order.append(rank)

    first = threading.Thread(target=end, args=(0,))
    first.start()
    end(1)
    assert order == [1]
    assert first.is_alive()
    end(2)
    first.join(60)
    assert sorted(order) == [0, 1, 2]  # at once, when the last one said so

    monkeypatch.setattr(store, "LONGEST_GOODBYE", 0.05)
    kept = dist.HashStore()
    end(0)  # but not for ever
    assert order[-1] == 0


@pytest.mark.filterwarnings("ignore")
def test_a_store_that_is_gone_ends_who_waits_with_a_sentence():
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", host.port, is_master=False)
    waits, ended = threading.Event(), []

    class Watched:
        def check(self, keys):
            waits.set()
            return client.check(keys)

        def __getattr__(self, name):
            return getattr(client, name)

    store = ObjectStore(Watched(), 1, 2)

    def work():
        try:
            store.spread([0])
        except SystemExit as end:
            ended.append((time.monotonic(), end.code))

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(30)
    gone = time.monotonic()
    del host
    thread.join(30)
    store.close()
    when, sentence = ended[0]
    assert when - gone < 5
    assert "lost the store" in sentence
    assert "\n" not in sentence
