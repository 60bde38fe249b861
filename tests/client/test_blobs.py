"""A blob in pieces, and the bytes that a site takes in one round."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from fedlora.client.blobs import DamagedBlob, IncomingBlob
from fedlora.client.courier import Courier
from fedlora.client.parts import Parts
from fedlora.client.policy import Policy, TransferPolicy
from fedlora.errors import PolicyError
from fedlora.wire import sha256

MIB = 2**20


class Sender:
    """Announces and sends what it is made with, whatever is asked for."""

    def __init__(self, announced, chunks):
        self.announced, self.chunks, self.sent = announced, chunks, 0

    def fetch(self, ticket, digest, size_bytes=None, accept=int):
        blob = IncomingBlob(digest, size_bytes, accept)
        for chunk in self.chunks:
            blob.add(chunk, self.announced)
            self.sent += len(chunk)
        blob.check()
        return blob.data()


def courier(sender, folder, max_down_mib):
    order = SimpleNamespace(exchange="here:1", download_ticket="", parts={})
    policy = Policy(transfer=TransferPolicy(max_down_mib=max_down_mib))
    return Courier(order, Parts(folder), lambda address: nullcontext(sender), policy)


def test_what_a_site_does_not_permit_is_refused_at_the_first_message(tmp_path):
    sender = Sender(1 << 40, [bytes(MIB)] * 3)
    with courier(sender, tmp_path, 2.0) as moved, pytest.raises(PolicyError, match="max_down_mib"):
        moved.fetch("0" * 64)
    assert sender.sent == 0


def test_parts_of_one_round_count_together(tmp_path):
    first, second = bytes(MIB), bytes(MIB + 1)
    sender = Sender(MIB, [first])
    with courier(sender, tmp_path, 2.0) as moved:
        assert moved.fetch(sha256(first)) == first
        sender.announced, sender.chunks, sender.sent = MIB + 1, [second], 0
        with pytest.raises(PolicyError, match="max_down_mib"):
            moved.fetch(sha256(second))
    assert sender.sent == 0


def test_no_more_comes_than_was_announced(tmp_path):
    sender = Sender(MIB, [bytes(MIB), b"x"])
    with courier(sender, tmp_path, 2.0) as moved, pytest.raises(DamagedBlob, match="more than"):
        moved.fetch(sha256(bytes(MIB)))
