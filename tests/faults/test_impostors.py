"""Somebody else in the exchange's place: a client leaves before it has said anything.

What passes is counted by a proxy, so that nothing of a delta can have left unseen.
"""

import random

import pytest

from fedlora.client.exchange import ExchangeClient
from fedlora.errors import TransferError
from tests.certificates import Authority
from tests.faults.exchange_process import ExchangeProcess
from tests.faults.proxy import Proxy

MIB = 1 << 20
# of handshakes that lead nowhere
MOST_BYTES = 64 * 1024
CLIENT = "site-0"


def files(folder, authority):
    """Certificate, key and CA of a server."""
    issued = authority.issue("exchange", "server")
    named = {"server.pem": issued.certificate, "server.key": issued.key, "ca.pem": authority.pem}
    for name, data in named.items():
        (folder / name).write_bytes(data)
    return tuple(folder / name for name in named)


@pytest.fixture(params=["another CA", "plain text"])
def impostor(request, tmp_path):
    """An exchange whose certificate is of its own CA, or that has none."""
    own = Authority()
    made = files(tmp_path, own) if request.param == "another CA" else ()
    with ExchangeProcess(tmp_path, made) as process:
        process.authority = own if made else None
        yield process


class Sending:
    """A client with these credentials that wants to send 1 MiB, past a proxy that counts."""

    def __init__(self, process, credentials, patience_s):
        self.proxy = Proxy(process.port, iter(()))
        address = f"127.0.0.1:{self.proxy.port}"
        self.client = ExchangeClient(address, credentials, patience_s=patience_s)
        self.ticket = process.ticket(client=CLIENT)

    def send(self):
        self.client.send(self.ticket, b"{}", random.Random(0).randbytes(MIB))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.proxy.close()


@pytest.mark.parametrize("repetition", range(2))
def test_no_byte_of_a_delta_goes_to_an_impostor(impostor, repetition):
    ours = Authority()
    credentials = ours.channel_credentials(ours.issue(CLIENT, "client"))
    with Sending(impostor, credentials, 0.5) as sending:
        with pytest.raises(TransferError, match=r"CA|plain text"):
            sending.send()
        assert sending.proxy.connections
    assert sending.proxy.forwarded < MOST_BYTES
    assert impostor.store.received("run", 1, 0) == {}


def test_the_same_impostor_gets_all_from_a_client_that_trusts_it(impostor):
    """Or the test above could not fail."""
    credentials = None
    if impostor.authority is not None:
        issued = impostor.authority.issue(CLIENT, "client")
        credentials = impostor.authority.channel_credentials(issued)
    with Sending(impostor, credentials, 60.0) as sending:
        sending.send()
    assert sending.proxy.forwarded > MIB
    assert list(impostor.store.received("run", 1, 0)) == [CLIENT]
