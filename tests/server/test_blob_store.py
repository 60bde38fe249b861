"""The blob store: replies are whole or not there, whatever happens in between."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import StorageError, UploadRefused
from fedlora.server.blob_store import BlobStore
from fedlora.server.receipts import Receipt, decode_receipt, encode_receipt, file_stem
from fedlora.storage import sealed
from fedlora.tickets import Ticket
from tests.exchange_cases import largest_file

TICKET = Ticket("run", 4, 1, "site-0", 9, "up", 1 << 30, 1e12)
DATA = bytes(range(256)) * 40
MANIFEST = b'{"m":1}'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def upload(store, data=DATA, ticket=TICKET, *, piece=1000):
    """The whole of `data`, from where the store stands; returns the bytes sent."""
    held, whole = store.held(ticket, digest(data))
    if whole:
        return 0
    with store.begin_upload(ticket, digest(data), len(data), held, MANIFEST) as going:
        for start in range(held, len(data), piece):
            going.append(data[start : start + piece])
        going.finish()
    return len(data) - held


def begun(store, data=DATA, ticket=TICKET, *, upto: int):
    """An open upload of which `upto` bytes have come."""
    going = store.begin_upload(ticket, digest(data), len(data), 0, MANIFEST)
    going.append(data[:upto])
    return going


def test_a_reply_is_found_by_another_process_with_its_manifest(tmp_path):
    upload(BlobStore(tmp_path))
    store = BlobStore(tmp_path)
    receipts = store.received("run", 4, 1)
    assert receipts == {"site-0": Receipt("site-0", 9, digest(DATA), len(DATA), MANIFEST)}
    assert store.payload("run", 4, 1, receipts["site-0"]) == DATA
    assert store.received("run", 4, 0) == {}


def test_nothing_is_there_before_it_is_whole(tmp_path):
    store = BlobStore(tmp_path)
    with begun(store, upto=len(DATA)) as going:
        assert store.received("run", 4, 1) == {}
        assert store.held(TICKET, digest(DATA)) == (len(DATA), False)
        going.finish()
    assert set(store.received("run", 4, 1)) == {"site-0"}


def test_what_was_cut_off_is_continued_and_only_the_rest_is_sent(tmp_path):
    store = BlobStore(tmp_path)
    begun(store, upto=4000).close()
    assert store.held(TICKET, digest(DATA)) == (4000, False)
    assert upload(BlobStore(tmp_path)) == len(DATA) - 4000
    assert upload(store) == 0


def refused(code):
    return pytest.raises(UploadRefused, match=rf"\({code}\)")


def test_an_offset_that_is_not_the_stores_is_refused(tmp_path):
    store = BlobStore(tmp_path)
    begun(store, upto=4000).close()
    for offset in (0, 3999, 4001, len(DATA)):
        with refused("offset"):
            store.begin_upload(TICKET, digest(DATA), len(DATA), offset, MANIFEST)


def test_a_second_upload_of_a_reply_waits_for_the_first(tmp_path):
    store = BlobStore(tmp_path)
    with begun(store, upto=10):
        for other in (store, BlobStore(tmp_path)):
            for data in (DATA, b"other"):
                with refused("busy"):
                    begun(other, data, upto=0)
        # other clients, rounds and attempts are not concerned
        for change in ({"client": "site-1"}, {"round": 5}, {"attempt": 0}, {"run": "run2"}):
            upload(store, ticket=replace(TICKET, **change))
    assert upload(store) == len(DATA) - 10


def test_the_first_whole_reply_stands(tmp_path):
    store = BlobStore(tmp_path)
    upload(store)
    with refused("taken"):
        store.held(TICKET, digest(b"other"))
    with refused("taken"):
        begun(store, b"other", upto=0)
    # the same bytes once more: to be asked about again
    with refused("busy"):
        begun(store, upto=0)
    assert store.receipt(TICKET).sha256 == digest(DATA)


def test_wrong_bytes_are_dropped_and_can_be_sent_again(tmp_path):
    store = BlobStore(tmp_path)
    going = store.begin_upload(TICKET, digest(DATA), len(DATA), 0, MANIFEST)
    with going, refused("digest"):
        going.append(DATA[::-1])
        going.finish()
    assert store.held(TICKET, digest(DATA)) == (0, False)
    assert upload(store) == len(DATA)


def test_neither_more_nor_fewer_bytes_than_announced_are_taken(tmp_path):
    store = BlobStore(tmp_path)
    with begun(store, upto=len(DATA)) as going, refused("size"):
        going.append(b"x")
    with begun(store, ticket=replace(TICKET, client="b"), upto=5) as going, refused("size"):
        going.finish()
    assert store.received("run", 4, 1) == {}


def test_a_client_keeps_one_unfinished_upload_at_most(tmp_path):
    store = BlobStore(tmp_path)
    for number in range(20):
        begun(store, bytes([number]) * 1000, upto=999).close()
    assert store.used() == 999


def test_a_bound_on_the_store_holds_for_what_is_promised(tmp_path):
    store = BlobStore(tmp_path, max_bytes=25_000)
    first, second = (replace(TICKET, client=name) for name in "ab")
    with (
        begun(store, ticket=first, upto=0),
        begun(store, ticket=second, upto=0),
        pytest.raises(StorageError, match="room for 25000 bytes"),
    ):
        begun(store, upto=0)
    upload(store, ticket=first)
    upload(store, ticket=second)
    with pytest.raises(StorageError, match="room"):
        upload(store)
    store.forget_round("run", 4)
    upload(store, ticket=replace(TICKET, round=5))


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path):
    store = BlobStore(tmp_path)
    with largest_file(5000), pytest.raises(StorageError, match="cannot be written"):
        upload(store)
    with largest_file(5000), pytest.raises(StorageError):
        store.offer("run", DATA)
    assert store.received("run", 4, 1) == {}
    assert store.offered("run", digest(DATA)) is None
    assert store.held(TICKET, digest(DATA)) == (5000, False)
    assert upload(store) == len(DATA) - 5000


def killed_at(step: int, work) -> bool:
    """Runs `work` in a process killed before its system call number `step`; False if it ended."""
    child = os.fork()
    if child == 0:
        steps = count()

        def counted(call):
            def wrapper(*args, **kwargs):
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in ("write", "fsync", "rename", "link", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_before_any_system_call_loses_nothing_that_was_acknowledged(tmp_path):
    """Every point at which the exchange can die, one by one; the next process goes on."""
    step = 0
    while True:
        folder = tmp_path / str(step)
        store = BlobStore(folder)
        if not killed_at(step, lambda folder=folder: upload(BlobStore(folder), piece=4000)):
            break
        for receipt in store.received("run", 4, 1).values():
            assert store.payload("run", 4, 1, receipt) == DATA
        upload(store)
        assert store.payload("run", 4, 1, store.received("run", 4, 1)["site-0"]) == DATA
        step += 1
    # folders, three writes, syncs, rename, receipt, link
    assert step > 15


def test_offers_are_idempotent_whole_and_withdrawn_by_name(tmp_path):
    store = BlobStore(tmp_path)
    kept, gone = store.offer("run", DATA), store.offer("run", b"other")
    assert store.offer("run", DATA) == kept == digest(DATA)
    assert BlobStore(tmp_path).offered("run", kept).read_bytes() == DATA
    assert store.offered("run2", kept) is None
    assert store.offered("run", "../" + kept) is None
    store.withdraw("run", [kept])
    assert store.offered("run", gone) is None
    assert store.offered("run", kept) is not None


def test_a_forgotten_round_is_gone_and_takes_no_late_reply(tmp_path):
    store = BlobStore(tmp_path)
    later = replace(TICKET, round=40)
    upload(store)
    upload(store, ticket=later)
    late = begun(store, ticket=replace(TICKET, client="late"), upto=len(DATA))
    BlobStore(tmp_path).forget_round("run", 4)
    with late, refused("closed"):
        late.finish()
    for ticket in (TICKET, replace(TICKET, attempt=2)):
        with refused("closed"):
            upload(store, ticket=ticket)
    assert store.received("run", 4, 1) == {}
    assert set(store.received("run", 40, 1)) == {"site-0"}
    assert store.used() == len(DATA) + len(encode_receipt(store.receipt(later)))


def test_a_round_that_is_done_anew_takes_replies_again(tmp_path):
    store = BlobStore(tmp_path)
    upload(store)
    store.forget_round(TICKET.run, TICKET.round)
    store.reopen(TICKET.run, TICKET.round + 1)
    with refused("closed"):
        upload(store)
    store.reopen(TICKET.run, TICKET.round)
    assert not store.received(TICKET.run, TICKET.round, TICKET.attempt)
    upload(store)
    assert store.received(TICKET.run, TICKET.round, TICKET.attempt)


def test_finished_runs_and_half_deleted_ones_are_collected(tmp_path):
    store = BlobStore(tmp_path)
    for run in ("a", "b", "c"):
        upload(store, ticket=replace(TICKET, run=run))
        store.offer(run, DATA)
    (tmp_path / ".trash.0").mkdir()
    store.remove_run("a")
    store.collect(["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert set(store.received("b", 4, 1)) == {"site-0"}
    assert store.received("c", 4, 1) == {}


def test_a_damaged_payload_is_noticed(tmp_path):
    store = BlobStore(tmp_path)
    upload(store)
    receipt = store.received("run", 4, 1)["site-0"]
    [payload] = (tmp_path / "run" / "inbox" / "4.1").glob(f"*.{receipt.sha256}")
    payload.write_bytes(DATA[:-1])
    with pytest.raises(StorageError, match="check the disk"):
        store.payload("run", 4, 1, receipt)
    payload.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        store.payload("run", 4, 1, receipt)


ODD = ["..", ".", "a/b", "a.b", "a%2Fb", "~" + "0" * 64, "\0", "\n", "ключ", "x" * 256, "a.json"]


def test_odd_client_names_stand_side_by_side(tmp_path):
    store = BlobStore(tmp_path)
    for name in ODD:
        upload(store, name.encode(), replace(TICKET, client=name))
    receipts = store.received("run", 4, 1)
    assert sorted(receipts) == sorted(ODD)
    for name in ODD:
        assert store.payload("run", 4, 1, receipts[name]) == name.encode()


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)


@given(names, names)
def test_stems_are_safe_and_tell_clients_apart(one, other):
    assert (file_stem(one) == file_stem(other)) == (one == other)
    assert not set(file_stem(one)) & set("./\0")
    assert len(file_stem(one)) <= 180


@given(
    st.builds(Receipt, names, st.integers(0, 2**64), st.just("0" * 64), st.integers(0), st.binary())
)
def test_receipts_round_trip(receipt):
    assert decode_receipt(encode_receipt(receipt)) == receipt


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
fields = st.sampled_from(["client", "node", "sha256", "size_bytes", "manifest"])


@given(
    st.binary()
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(fields, json_values).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_a_receipt_or_a_storage_error(data):
    with pytest.raises(StorageError):
        decode_receipt(data)
    try:
        receipt = decode_receipt(sealed(data))
    except StorageError:
        return
    assert decode_receipt(encode_receipt(receipt)) == receipt
