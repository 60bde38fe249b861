"""An update is in the outbox whole or not at all."""

import os

import torch

from fedlora.adapter import AdapterSpec, AdapterState
from fedlora.client.outbox import Outbox
from fedlora.messages import ClientUpdate
from fedlora.wire import encode_update, sha256

SPEC = AdapterSpec("lora", 1, 2.0, (), (), {}, "base", 0)


def update(number):
    delta = AdapterState(SPEC, {"w": torch.full((4,), float(number))})
    return encode_update(ClientUpdate("run", number, 0, "one", "0" * 64, delta, 3))


def key(number):
    return sha256(str(number).encode())


def test_what_was_kept_is_found_by_another_process(tmp_path):
    manifest, payload = update(1)
    Outbox(tmp_path / "box").keep(key(1), manifest, payload)
    found = Outbox(tmp_path / "box").find(key(1))
    assert found.manifest == manifest
    assert found.payload.read_bytes() == payload
    assert Outbox(tmp_path / "box").find(key(2)) is None


def test_a_damaged_update_counts_as_none(tmp_path):
    manifest, payload = update(1)
    for spoil in (
        lambda box: box.find(key(1)).payload.write_bytes(payload[:-1] + b"x"),
        lambda box: box.find(key(1)).payload.unlink(),
        lambda box: (tmp_path / f"{key(1)}.json").write_bytes(b"{}"),
    ):
        box = Outbox(tmp_path)
        box.keep(key(1), manifest, payload)
        spoil(box)
        assert box.find(key(1)) is None
        assert box.keep(key(1), manifest, payload).payload.read_bytes() == payload


def test_the_newest_stay_and_the_acknowledged_go(tmp_path):
    box = Outbox(tmp_path, most=3)
    for number in range(1, 6):
        box.keep(key(number), *update(number))
        # two files may be of the same tick of the clock
        os.utime(tmp_path / f"{key(number)}.json", (number, number))
    assert [n for n in range(1, 6) if box.find(key(n))] == [3, 4, 5]
    box.drop([key(4), key(9)])
    assert [n for n in range(1, 6) if box.find(key(n))] == [3, 5]
    assert len(box) == 2
    assert len(list(tmp_path.iterdir())) == 4
