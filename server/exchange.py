"""The exchange: the gRPC server of a federation, with its health and reflection."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from fedlora.errors import ConfigError
from fedlora.server.blob_store import BlobStore
from fedlora.server.call_limit import CallLimit
from fedlora.server.exchange_service import MAX_WATCHES, SERVICE, ExchangeService
from fedlora.server.open_services import HealthService, ReflectionService, certified, everybody
from fedlora.server.request_deadline import RequestDeadline
from fedlora.server.run_events import RunEvents
from fedlora.server.transfers import Transfers

MAX_MESSAGE_BYTES = 4 << 20
# short calls that find a thread while all transfers and watches are busy
SPARE_THREADS = 64
# calls of one caller: all watches, and a few short ones beside
MAX_CALLS = MAX_WATCHES + 8
# of one client: the one it makes, and one that broke and has not been noticed yet
TRANSFERS_EACH = 2
# less than this on average is no transfer; clients give up at twice as much
SLOWEST_BYTES_PER_S = 8 * 1024
# the only message of such a call comes with it or soon after
READ_S = 10.0

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 32),
    # with the probe the window grows to many MiB for each connection, and so does memory
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # a peer that vanished without a word is noticed, and one that asks about us is answered
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


class ExchangeServer:
    """Serves DeltaExchange and whatever else belongs on its port.

    Args:
        store: the blobs.
        key: of the tickets (see fedlora.tickets.ticket_key).
        address: host:port; port 0 takes a free one.
        credentials: TLS; None serves in plain text.
        require_identity: callers must show a certificate; needs credentials made with
            require_client_auth.
        is_revoked: whether the certificate with this serial number is void.
        events: what a Watch shows.
        services: further services by full name: each adds itself to the server.
        max_transfers: uploads and downloads at once.
        stall_s: a transfer without progress for so long is cancelled.
        clock: seconds since 1970-01-01 UTC, for tickets.

    Raises:
        ConfigError: identities are required without TLS.
    """

    def __init__(
        self,
        store: BlobStore,
        key: bytes,
        *,
        address: str,
        credentials: grpc.ServerCredentials | None,
        require_identity: bool,
        is_revoked: Callable[[int], bool],
        events: RunEvents,
        services: Mapping[str, Callable[[grpc.Server], object]] | None = None,
        max_transfers: int = 64,
        stall_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if require_identity and credentials is None:
            raise ConfigError("identities need TLS; give credentials, or require no identity")
        self._address = address
        self._draining = threading.Event()
        self.transfers = Transfers(
            max_transfers, stall_s, most_each=TRANSFERS_EACH, slowest=SLOWEST_BYTES_PER_S
        )
        self._reads = Transfers(SPARE_THREADS, min(stall_s, READ_S))
        threads = max_transfers + MAX_WATCHES + SPARE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, "exchange"),
            options=OPTIONS,
            interceptors=[CallLimit(MAX_CALLS), RequestDeadline(self._reads)],
            # what finds no thread is refused, for waiting in a queue it would hold memory
            maximum_concurrent_rpcs=threads,
        )
        self._service = ExchangeService(
            store,
            key,
            transfers=self.transfers,
            events=events,
            require_identity=require_identity,
            is_revoked=is_revoked,
            draining=self._draining,
            clock=clock,
        )
        self._service.add_to_server(self._server)
        for add_to_server in (services or {}).values():
            add_to_server(self._server)
        admit = certified(is_revoked) if require_identity else everybody
        self._health = HealthService(admit)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = (SERVICE, *(services or {}))
        shown = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            ReflectionService(shown, admit, self._reads), self._server
        )
        self._credentials = credentials

    def start(self) -> int:
        """Serves from now on; returns the port.

        Raises:
            ConfigError: the address cannot be bound.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as e:
            raise ConfigError(
                f"address {self._address} cannot be bound: {e}; choose a free port of this machine"
            ) from e
        self._server.start()
        self.transfers.start()
        self._reads.start()
        for name in ("", *self._names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return int(port)

    @property
    def is_serving(self) -> bool:
        """New calls are taken."""
        return not self._draining.is_set()

    @property
    def watches(self) -> int:
        """Open watches."""
        return self._service.watches

    def drain(self, grace_s: float) -> None:
        """Takes no new calls, lets those under way end for `grace_s` seconds, and stops.

        Uploads that are cut off are kept, and go on at the next start.
        """
        self._draining.set()
        self._health.enter_graceful_shutdown()
        self._service.end_watches()
        self._server.stop(grace_s).wait()
        self.transfers.stop()
        self._reads.stop()
