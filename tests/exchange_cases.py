"""An exchange on a free port of this machine with certificates of its own, and who calls it."""

import resource
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import grpc

from fedlora.client.exchange import ExchangeClient
from fedlora.protos.exchange_pb2_grpc import DeltaExchangeStub
from fedlora.server.blob_store import BlobStore
from fedlora.server.exchange import ExchangeServer
from fedlora.server.run_events import FollowedFolders
from fedlora.tickets import METADATA_KEY, Ticket, mint
from tests.certificates import Authority

KEY = bytes(range(32))


class Exchange:
    """A server and what its callers need.

    Attributes:
        store, server, port, authority: as made.
        revoked: serial numbers of void certificates.
    """

    def __init__(self, folder, *, mutual: bool = True, authority=None, **options) -> None:
        self.folder = folder
        self.authority = authority or Authority()
        self.store = BlobStore(folder / "store")
        self.mutual = mutual
        self.revoked: set[int] = set()
        (folder / "runs").mkdir(exist_ok=True)
        issued = self.authority.issue("exchange", "server")
        arguments = {
            "address": "127.0.0.1:0",
            "credentials": self.authority.server_credentials(issued, mutual=mutual),
            "require_identity": mutual,
            "is_revoked": self.revoked.__contains__,
            "events": FollowedFolders(folder / "runs"),
        }
        self.server = ExchangeServer(self.store, KEY, **{**arguments, **options})
        self.port = self.server.start()
        self._open = ExitStack()

    def ticket(self, direction="up", client="site-0", **changes) -> str:
        made = Ticket("run", 1, 0, client, 7, direction, 1 << 30, time.time() + 600)
        return mint(KEY, replace(made, **changes))

    def credentials(self, name="site-0", role="client") -> grpc.ChannelCredentials:
        return self.authority.channel_credentials(self.authority.issue(name, role))

    def client(self, name="site-0", *, port=None, patience_s=20.0, **options) -> ExchangeClient:
        client = ExchangeClient(
            f"127.0.0.1:{port or self.port}",
            self.credentials(name),
            patience_s=patience_s,
            **options,
        )
        self._open.callback(client.close)
        return client

    def channel(self, credentials=None) -> grpc.Channel:
        channel = grpc.secure_channel(
            f"127.0.0.1:{self.port}",
            credentials or self.credentials(),
            # else all channels of a process share connections, and so certificates
            (("grpc.use_local_subchannel_pool", 1),),
        )
        return self._open.enter_context(channel)

    def stub(self, credentials=None) -> DeltaExchangeStub:
        return DeltaExchangeStub(self.channel(credentials))

    def when_closed(self, call) -> None:
        self._open.callback(call)

    def close(self) -> None:
        self._open.close()
        self.server.drain(0)


@contextmanager
def exchange(folder, **options):
    made = Exchange(folder, **options)
    try:
        yield made
    finally:
        made.close()


def metadata(ticket: str) -> tuple[tuple[str, str], ...]:
    return ((METADATA_KEY, ticket),)


@contextmanager
def largest_file(size_bytes: int):
    """Writes beyond this length fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
