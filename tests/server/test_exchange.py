"""The exchange over TLS: what is asked for moves, and nothing else does."""

import hashlib
import json
import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedlora.client.exchange import ExchangeClient
from fedlora.errors import ConfigError, TransferError
from fedlora.protos.exchange_pb2 import (
    DownloadRequest,
    StatRequest,
    UploadHeader,
    UploadMessage,
    WatchRequest,
)
from fedlora.server.exchange import MAX_CALLS
from tests.certificates import Authority
from tests.exchange_cases import Exchange, exchange, largest_file, metadata

MIB = 1 << 20
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with exchange(tmp_path_factory.mktemp("exchange")) as made:
        yield made


@pytest.fixture
def run(request):
    """A run of its own for each test."""
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:16]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def header(data: bytes, **changes) -> UploadMessage:
    fields = {"sha256": digest(data), "size_bytes": len(data), "manifest": b"{}", **changes}
    return UploadMessage(header=UploadHeader(**fields))


def messages(data: bytes, **changes):
    yield header(data, **changes)
    for start in range(0, len(data), MIB):
        yield UploadMessage(chunk=data[start : start + MIB])


def refusal(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB + 3])
def test_bytes_go_up_and_down_unchanged_once(served, run, size):
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    data = data[:size]
    client = served.client()
    up = served.ticket(run=run)
    assert client.send(up, b"manifest", data) == size
    assert client.send(up, b"manifest", data) == 0
    [receipt] = served.store.received(run, 1, 0).values()
    assert (receipt.client, receipt.node, receipt.manifest) == ("site-0", 7, b"manifest")
    assert served.store.payload(run, 1, 0, receipt) == data
    offered = served.store.offer(run, data)
    assert client.fetch(served.ticket("down", run=run), offered) == data
    assert client.fetch(served.ticket("down", run=run), offered, size) == data


def test_a_file_is_sent_like_bytes(served, run, tmp_path):
    data = bytes(3 * MIB + 5)
    (tmp_path / "payload").write_bytes(data)
    assert served.client().send(served.ticket(run=run), b"", tmp_path / "payload") == len(data)
    [receipt] = served.store.received(run, 1, 0).values()
    assert served.store.payload(run, 1, 0, receipt) == data


def test_a_standard_stub_is_served(served, run):
    """Generated code, which knows nothing of our framing, is the reference."""
    data, stub = bytes(2 * MIB + 7), served.stub()
    up, down = metadata(served.ticket(run=run)), metadata(served.ticket("down", run=run))
    assert stub.Stat(StatRequest(sha256=digest(data)), metadata=up).size_bytes == 0
    assert stub.Upload(messages(data), metadata=up).size_bytes == len(data)
    reply = stub.Stat(StatRequest(sha256=digest(data)), metadata=up)
    assert (reply.size_bytes, reply.complete) == (len(data), True)
    served.store.offer(run, data)
    for offset in (0, 1, MIB, len(data)):
        request = DownloadRequest(sha256=digest(data), offset_bytes=offset)
        chunks = list(stub.Download(request, metadata=down))
        assert b"".join(chunk.chunk for chunk in chunks) == data[offset:]
        assert chunks[0].size_bytes == len(data)
        assert all(len(chunk.chunk) <= MIB for chunk in chunks)


TICKETS = {
    "none": (lambda s: (), Code.UNAUTHENTICATED, "0 tickets"),
    "two": (lambda s: metadata(s.ticket()) * 2, Code.UNAUTHENTICATED, "2 tickets"),
    "noise": (lambda s: metadata("x" * 4000), Code.UNAUTHENTICATED, "is not a ticket"),
    "long": (lambda s: metadata("x" * 5000), Code.UNAUTHENTICATED, "5000"),
    "forged": (lambda s: metadata(s.ticket()[:-8] + "AAAAAAA="), Code.UNAUTHENTICATED, "signature"),
    "expired": (lambda s: metadata(s.ticket(expires_s=5.0)), Code.UNAUTHENTICATED, "expired"),
    "foreign": (lambda s: metadata(s.ticket(client="b")), Code.PERMISSION_DENIED, "'b'"),
}


@pytest.mark.parametrize("case", TICKETS)
def test_a_ticket_that_is_not_the_callers_moves_nothing(served, case):
    make, code, why = TICKETS[case]
    stub = served.stub()
    request = StatRequest(sha256="0" * 64)
    calls = [
        lambda: stub.Stat(request, metadata=make(served)),
        lambda: stub.Upload(messages(b"x"), metadata=make(served)),
        lambda: list(stub.Download(DownloadRequest(sha256="0" * 64), metadata=make(served))),
    ]
    for call in calls:
        error = refusal(call)
        assert error.code() == code
        assert why in error.details()


def test_a_ticket_serves_one_direction(served):
    stub = served.stub()
    error = refusal(lambda: stub.Upload(messages(b"x"), metadata=metadata(served.ticket("down"))))
    assert error.code() == Code.PERMISSION_DENIED
    request = DownloadRequest(sha256="0" * 64)
    error = refusal(lambda: list(stub.Download(request, metadata=metadata(served.ticket("up")))))
    assert error.code() == Code.PERMISSION_DENIED


def test_certificates_without_the_clients_role_or_revoked_are_refused(served, run):
    issued = served.authority.issue("site-0", "client")
    served.revoked.add(issued.serial)
    cases = {
        "revoked": served.authority.channel_credentials(issued),
        "'operator'": served.credentials("site-0", "operator"),
        "'server'": served.credentials("site-0", "server"),
    }
    for why, credentials in cases.items():
        stub = served.stub(credentials)
        error = refusal(lambda s=stub: s.Upload(messages(b"x"), metadata=metadata(served.ticket())))
        assert error.code() == Code.PERMISSION_DENIED
        assert why in error.details()
    assert served.store.received(run, 1, 0) == {}


def test_a_caller_without_a_certificate_of_our_ca_gets_no_connection(served):
    for credentials in (
        served.authority.channel_credentials(),
        grpc.ssl_channel_credentials(
            served.authority.pem,
            (issued := Authority().issue("site-0", "client")).key,
            issued.certificate,
        ),
    ):
        stub = served.stub(credentials)
        request = StatRequest(sha256="0" * 64)
        error = refusal(lambda s=stub, r=request: s.Stat(r, metadata=metadata(served.ticket())))
        assert error.code() == Code.UNAVAILABLE


def given_up(served, credentials, *, port=None, patience_s=0.3) -> str:
    """What a client with these credentials says in the end."""
    address = f"127.0.0.1:{port or served.port}"
    client = ExchangeClient(address, credentials, patience_s=patience_s)
    with pytest.raises(TransferError) as caught:
        client.fetch(served.ticket("down"), "0" * 64)
    client.close()
    assert address in str(caught.value)
    return str(caught.value)


def test_why_there_is_no_connection_is_said(served, tmp_path):
    stranger = Authority()
    own = served.authority.issue("site-0", "client")
    # nothing that time could repair, so the patience is not waited for
    assert "CA" in given_up(served, stranger.channel_credentials(own), patience_s=1e6)
    old = served.authority.issue("site-0", "client", shift=timedelta(days=-3))
    for credentials in (None, served.authority.channel_credentials(old)):
        assert "may not accept this client's certificate" in given_up(served, credentials)
    for days, why in (
        (-3, "has expired; this machine's clock"),
        (3, "not valid yet; this machine"),
    ):
        issued = served.authority.issue("exchange", "server", shift=timedelta(days=days))
        credentials = served.authority.server_credentials(issued, mutual=True)
        folder = tmp_path / str(days)
        folder.mkdir()
        with exchange(folder, authority=served.authority, credentials=credentials) as other:
            assert why in given_up(served, served.credentials(), port=other.port, patience_s=1e6)
    with exchange(tmp_path, mutual=False, credentials=None) as plain:
        assert "talks plain text" in given_up(served, served.credentials(), port=plain.port)


BODIES = {
    "nothing": ([], Code.INVALID_ARGUMENT, "no header"),
    "chunk first": ([UploadMessage(chunk=b"x")], Code.INVALID_ARGUMENT, "not a header"),
    "empty message": ([UploadMessage()], Code.INVALID_ARGUMENT, "not a header"),
    "digest": ([header(b"", sha256="X" * 64)], Code.INVALID_ARGUMENT, "sha256"),
    "path": ([header(b"", sha256="../" * 20)], Code.INVALID_ARGUMENT, "sha256"),
    "too large": ([header(b"", size_bytes=2**63)], Code.PERMISSION_DENIED, "ticket allows"),
    "manifest": ([header(b"", manifest=bytes(65537))], Code.INVALID_ARGUMENT, "65536"),
    "offset": ([header(b"abc", offset_bytes=2)], Code.FAILED_PRECONDITION, "the server has 0"),
    "two headers": ([header(b"abc")] * 2, Code.INVALID_ARGUMENT, "not a chunk"),
    "empty chunk": ([header(b"abc"), UploadMessage()], Code.INVALID_ARGUMENT, "not a chunk"),
    "large chunk": (
        [header(bytes(2 * MIB)), UploadMessage(chunk=bytes(MIB + 1))],
        Code.INVALID_ARGUMENT,
        "limit is 1048576",
    ),
    "more": ([header(b"ab"), UploadMessage(chunk=b"abc")], Code.INVALID_ARGUMENT, "announced"),
    "fewer": ([header(b"abc"), UploadMessage(chunk=b"ab")], Code.INVALID_ARGUMENT, "2 of 3"),
    "others": ([header(b"abc"), UploadMessage(chunk=b"abd")], Code.DATA_LOSS, "SHA-256"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_out_of_bounds_is_refused_and_leaves_no_reply(served, run, case):
    body, code, why = BODIES[case]
    ticket = metadata(served.ticket(run=run))
    error = refusal(lambda: served.stub().Upload(iter(body), metadata=ticket))
    assert (error.code(), why in error.details()) == (code, True), error.details()
    assert served.store.received(run, 1, 0) == {}
    # and is in nobody's way
    assert served.client().send(served.ticket(run=run), b"{}", b"honest") == 6


@pytest.mark.parametrize("raw", [b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x05abc"])
def test_noise_instead_of_a_message_is_refused(served, raw):
    call = served.channel().stream_unary("/fedlora.v1.DeltaExchange/Upload")
    error = refusal(lambda: call(iter([raw]), metadata=metadata(served.ticket())))
    assert error.code() == Code.INVALID_ARGUMENT


def test_a_message_beyond_the_limit_is_refused(served, run):
    body = [header(bytes(5 * MIB)), UploadMessage(chunk=bytes(5 * MIB))]
    ticket = metadata(served.ticket(run=run))
    error = refusal(lambda: served.stub().Upload(iter(body), metadata=ticket))
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert served.store.received(run, 1, 0) == {}


def test_a_first_reply_stands_and_a_late_one_is_told(served, run):
    client, ticket = served.client(), served.ticket(run=run)
    client.send(ticket, b"{}", b"first")
    with pytest.raises(TransferError, match="ALREADY_EXISTS"):
        client.send(ticket, b"{}", b"second")
    error = refusal(lambda: served.stub().Upload(messages(b"second"), metadata=metadata(ticket)))
    assert error.code() == Code.ALREADY_EXISTS
    served.store.forget_round(run, 1)
    with pytest.raises(TransferError, match=r"NOT_FOUND.*the round is over"):
        client.send(ticket, b"{}", b"first")


def test_only_what_the_run_offers_is_served_within_the_ticket(served, run):
    client = served.client()
    offered = served.store.offer(run, b"abc")
    with pytest.raises(TransferError, match="NOT_FOUND"):
        client.fetch(served.ticket("down", run="another"), offered)
    with pytest.raises(TransferError, match="ticket allows 2"):
        client.fetch(served.ticket("down", run=run, max_bytes=2), offered)
    with pytest.raises(TransferError, match="3 bytes at the server, not 4"):
        client.fetch(served.ticket("down", run=run), offered, 4)
    request = DownloadRequest(sha256=offered, offset_bytes=4)
    down = metadata(served.ticket("down", run=run))
    error = refusal(lambda: list(served.stub().Download(request, metadata=down)))
    assert error.code() == Code.FAILED_PRECONDITION


def test_more_than_the_caller_takes_is_refused_before_it_is_kept(served, run):
    """A server that offers too much must not fill its clients' memory."""
    offered = served.store.offer(run, bytes(8 * MIB))
    kept = []

    class TooLarge(Exception):
        pass

    def accept(size_bytes):
        kept.append(size_bytes)
        if size_bytes > limit:
            raise TooLarge

    client, ticket, limit = served.client(), served.ticket("down", run=run), 8 * MIB - 1
    with pytest.raises(TooLarge):
        client.fetch(ticket, offered, accept=accept)
    limit = 8 * MIB
    assert len(client.fetch(ticket, offered, accept=accept)) == limit
    assert kept == [8 * MIB, 8 * MIB]


class Paused:
    """An upload that sends its header and then waits."""

    def __init__(self, served, data: bytes, ticket: str, at_least: int = 1) -> None:
        self._go = threading.Event()
        self.call = served.stub().Upload.future(self._body(data), metadata=metadata(ticket))
        while len(served.server.transfers) < at_least:
            # the call is refused when there is no place for it
            if self.call.done():
                break
            time.sleep(0.001)

    def _body(self, data):
        first, *rest = messages(data)
        yield first
        self._go.wait()
        yield from rest

    def go_on(self) -> None:
        self._go.set()


def test_a_transfer_without_a_place_is_tried_again_until_there_is_one(tmp_path):
    with exchange(tmp_path, max_transfers=1) as served:
        paused = Paused(served, b"abc", served.ticket(client="site-0"))
        waits = []

        def wait(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                paused.go_on()
                paused.call.result()

        client = served.client("b", wait=wait)
        client.send(served.ticket(client="b"), b"{}", b"xyz")
        assert waits[:3] == [0.1, 0.2, 0.4]
        assert set(served.store.received("run", 1, 0)) == {"site-0", "b"}


def test_a_transfer_that_stands_still_loses_its_place(tmp_path):
    with exchange(tmp_path, max_transfers=1, stall_s=0.2) as served:
        paused = Paused(served, b"abc", served.ticket())
        assert refusal(paused.call.result).code() == Code.CANCELLED
        paused.go_on()
        served.client("b").send(served.ticket(client="b"), b"{}", b"xyz")
        assert set(served.store.received("run", 1, 0)) == {"b"}
        # nor is a reader spared that does not read
        offered = served.store.offer("run", bytes(64 * MIB))
        request = DownloadRequest(sha256=offered)
        unread = served.stub().Download(request, metadata=metadata(served.ticket("down")))
        assert len(served.client("b").fetch(served.ticket("down", client="b"), offered)) == 64 * MIB
        unread.cancel()


def test_a_client_with_two_transfers_under_way_has_no_third(tmp_path):
    with exchange(tmp_path) as served:
        tickets = [served.ticket(run=f"run-{i}") for i in range(3)]
        paused = [
            Paused(served, b"abc", ticket, at_least=i + 1) for i, ticket in enumerate(tickets)
        ]
        assert refusal(paused[2].call.result).code() == Code.RESOURCE_EXHAUSTED
        served.client("b").send(served.ticket(client="b"), b"{}", b"xyz")
        for one in paused:
            one.go_on()
        assert [one.call.result().size_bytes for one in paused[:2]] == [3, 3]


def test_a_call_without_its_message_is_ended(tmp_path):
    """Also those of other services on the port."""
    with exchange(tmp_path, stall_s=0.2) as served:
        channel, release = served.channel(), threading.Event()

        def silence():
            release.wait()
            yield b""

        for method in ("/fedlora.v1.DeltaExchange/Stat", "/grpc.health.v1.Health/Check"):
            call = channel.stream_unary(method).future(silence())
            assert refusal(call.result).code() == Code.CANCELLED
        empty = channel.stream_unary("/grpc.health.v1.Health/Check")
        assert refusal(lambda: empty(iter([]))).code() == Code.INVALID_ARGUMENT
        release.set()


def test_a_disk_that_is_full_for_a_while_only_delays(tmp_path):
    data = bytes(3 * MIB)
    with exchange(tmp_path) as served, ExitStack() as full:
        full.enter_context(largest_file(2 * MIB))
        client = served.client(wait=lambda seconds: full.close())
        client.send(served.ticket(), b"{}", data)
        [receipt] = served.store.received("run", 1, 0).values()
        assert served.store.payload("run", 1, 0, receipt) == data


def test_a_draining_server_lets_uploads_end_and_takes_no_new_ones(tmp_path):
    with exchange(tmp_path) as served:
        paused = Paused(served, b"abc", served.ticket())
        draining = threading.Thread(target=served.server.drain, args=(30.0,))
        draining.start()
        while served.server.is_serving:
            time.sleep(0.001)
        error = refusal(lambda: served.stub().Stat(StatRequest(), metadata=()))
        assert error.code() == Code.UNAVAILABLE
        paused.go_on()
        assert paused.call.result().size_bytes == 3
        draining.join()
        assert set(served.store.received("run", 1, 0)) == {"site-0"}


def test_a_restarted_server_goes_on_where_the_upload_was_cut(tmp_path):
    authority = Authority()
    data = bytes(8 * MIB)
    with exchange(tmp_path, authority=authority) as first:
        ticket = first.ticket()
        with first.store.begin_upload(
            # as the server does it, then the process ends
            decoded(ticket),
            digest(data),
            len(data),
            0,
            b"{}",
        ) as upload:
            upload.append(data[: 5 * MIB])
    with exchange(tmp_path, authority=authority) as second:
        assert second.client().send(ticket, b"{}", data) == 3 * MIB


def decoded(ticket: str):
    from fedlora.tickets import check
    from tests.exchange_cases import KEY

    return check(KEY, ticket, time.time())


def write_run(served, name, *events):
    folder = served.folder / "runs" / name
    folder.mkdir(exist_ok=True)
    (folder / "job.toml").touch()
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_operators_watch_a_run_to_its_end_and_others_do_not(served, run):
    write_run(served, run, {"event": "start"})
    stub = served.stub(served.credentials("olga", "operator"))
    watch = stub.Watch(WatchRequest(run=run))
    first = next(watch)
    assert (first.number, first.run, json.loads(first.json)) == (0, run, {"event": "start"})
    write_run(served, run, {"event": "end"})
    assert [event.number for event in watch] == [1]
    assert [event.number for event in stub.Watch(WatchRequest(run=run, skip=1))] == [1]
    assert refusal(lambda: next(stub.Watch(WatchRequest(run="none")))).code() == Code.NOT_FOUND
    error = refusal(lambda: next(served.stub().Watch(WatchRequest(run=run))))
    assert error.code() == Code.PERMISSION_DENIED


def test_a_watch_ends_with_its_caller_and_with_the_server(tmp_path):
    with exchange(tmp_path) as served:
        write_run(served, "run", {"event": "start"})
        stub = served.stub(served.credentials("olga", "operator"))
        # more than the server keeps open, so each must have ended
        for _ in range(40):
            watch = stub.Watch(WatchRequest(run="run"))
            next(watch)
            watch.cancel()
            while served.server.watches:
                time.sleep(0.001)
        watch = stub.Watch(WatchRequest(run="run"))
        next(watch)
        served.server.drain(30.0)
        assert refusal(lambda: next(watch)).code() in (Code.UNAVAILABLE, Code.CANCELLED)


def test_health_reflection_and_further_services_are_on_the_port(tmp_path):
    def echo(server):
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
        handlers = grpc.method_handlers_generic_handler("some.Echo", {"Say": handler})
        server.add_generic_rpc_handlers((handlers,))

    with exchange(tmp_path, services={"some.Echo": echo}) as served:
        channel = served.channel()
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "fedlora.v1.DeltaExchange", "some.Echo"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(
                file_containing_symbol="fedlora.v1.DeltaExchange"
            ),
        ]
        listed, found = reflection.ServerReflectionInfo(iter(asked))
        names = {service.name for service in listed.list_services_response.service}
        assert {"fedlora.v1.DeltaExchange", "some.Echo", "grpc.health.v1.Health"} <= names
        [file] = found.file_descriptor_response.file_descriptor_proto
        assert b"UploadHeader" in file
        assert channel.unary_unary("/some.Echo/Say")(b"hello") == b"hello"


class Idle:
    """Streams of one caller that say nothing, over as many connections as they need."""

    def __init__(self, served, count, method="/grpc.reflection.v1alpha.ServerReflection/"):
        self._release = threading.Event()
        self.calls = []
        for start in range(0, count, 32):
            channel = served.channel()
            stream = channel.stream_stream(method + "ServerReflectionInfo")
            self.calls += [stream(self._silence()) for _ in range(min(32, count - start))]

    def _silence(self):
        self._release.wait()
        yield from ()

    def end(self):
        for call in self.calls:
            call.cancel()
        self._release.set()


def test_one_caller_does_not_take_the_threads_of_all(tmp_path):
    """Six connections of 32 idle streams each are more than the server has threads."""
    with exchange(tmp_path) as served:
        idle = Idle(served, 6 * 32)
        # as many as one may have stay; the others were refused, so all have arrived
        ends = time.monotonic() + 20
        while sum(call.is_active() for call in idle.calls) > MAX_CALLS:
            assert time.monotonic() < ends
            time.sleep(0.01)
        ticket = served.ticket(client="b")
        served.client("b", wait=lambda seconds: pytest.fail("was refused")).send(ticket, b"", b"x")
        idle.end()


def test_an_idle_reflection_ends(tmp_path):
    with exchange(tmp_path, stall_s=0.2) as served:
        idle = Idle(served, 1)
        assert refusal(lambda: next(idle.calls[0])).code() == Code.CANCELLED
        idle.end()


def test_health_and_reflection_are_not_for_the_revoked_and_never_for_long(tmp_path):
    with exchange(tmp_path) as served:
        issued = served.authority.issue("eve", "client")
        channel = served.channel(served.authority.channel_credentials(issued))
        health = health_pb2_grpc.HealthStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = health_pb2.HealthCheckRequest()
        error = refusal(lambda: next(health.Watch(request)))
        assert error.code() == Code.UNIMPLEMENTED
        served.revoked.add(issued.serial)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (
            lambda: health.Check(request),
            lambda: next(reflection.ServerReflectionInfo(iter([asked]))),
        ):
            error = refusal(call)
            assert error.code() == Code.PERMISSION_DENIED
            assert "is revoked" in error.details()


def test_plain_text_is_served_only_without_identities_and_on_request(tmp_path):
    with pytest.raises(ConfigError, match="TLS"):
        Exchange(tmp_path, credentials=None)
    with exchange(tmp_path, mutual=False, credentials=None) as served:
        client = ExchangeClient(f"127.0.0.1:{served.port}", None, patience_s=20)
        assert client.send(served.ticket(), b"{}", b"abc") == 3
        client.close()


def test_a_taken_address_is_named(served, tmp_path):
    with pytest.raises(ConfigError, match=f"127.0.0.1:{served.port} cannot be bound"):
        Exchange(tmp_path, address=f"127.0.0.1:{served.port}")
