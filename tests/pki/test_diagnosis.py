"""What is said about each way in which a real server cannot be reached."""

import dataclasses
import socket
import ssl
from concurrent import futures
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.diagnosis import diagnose
from fedlora.pki import Authority, Subject
from tests.pki.conftest import HOSTS, hand_out
from tests.pki.servers import http1, http2, secured, server, silent

# OpenSSL looks at the machine's own clock
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@dataclasses.dataclass
class World:
    """Certificates of one consortium, and of a stranger's."""

    mine: object
    theirs: object
    old: object
    early: object
    elsewhere: object
    stranger: object
    outdated: object


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    ours = Authority.create(folder / "ca", "hospitals", now=NOW - 30 * DAY)
    foreign = Authority.create(folder / "foreign", "hospitals", now=NOW - 30 * DAY)

    def make(place, subject, authority=ours, now=NOW, lifetime=365 * DAY):
        return hand_out(authority, folder / place, subject, now=now, lifetime=lifetime)

    main, site = Subject("main", "server", HOSTS), Subject("site-0", "client")
    return World(
        mine=make("site", site),
        theirs=make("server", main),
        old=make("old", main, now=NOW - 10 * DAY, lifetime=9 * DAY),
        early=make("early", main, now=NOW + DAY),
        elsewhere=make("elsewhere", Subject("main", "server", ("else.org", "10.9.8.7"))),
        stranger=make("stranger", main, foreign),
        outdated=make("outdated", site, now=NOW - 10 * DAY, lifetime=9 * DAY),
    )


def found(serve, tls, host="localhost", timeout_s=5.0):
    with server(serve) as port:
        text = diagnose(host, port, tls, timeout_s=timeout_s).text
    assert "\n" not in text
    return text


def of(files, clients=None, *inner, **options):
    return secured(files.certificate, files.key, clients, *inner, **options)


def test_all_is_well(world):
    text = found(of(world.theirs, world.mine.ca), world.mine)
    assert "takes our certificate and speaks HTTP/2" in text
    assert "takes our certificate" in found(of(world.theirs), world.mine, "127.0.0.1")


def test_nothing_listens(world):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "refuses connections: nothing listens" in diagnose("127.0.0.1", port, world.mine).text


def test_the_name_does_not_resolve(world):
    assert "does not resolve" in diagnose("no-such-host.invalid", 1, world.mine).text


def test_wrong_ca(world):
    text = found(of(world.stranger), world.mine)
    assert "wrong CA" in text
    assert str(world.mine.ca) in text


def test_the_server_certificate_has_expired(world):
    text = found(of(world.old), world.mine)
    assert f"expired at {NOW - DAY:%Y-%m-%d}" in text
    assert "this machine's clock says" in text


def test_the_server_certificate_is_not_yet_valid(world):
    text = found(of(world.early), world.mine)
    assert f"is not valid before {NOW + DAY - timedelta(minutes=5):%Y-%m-%d}" in text
    assert "set the clock" in text


@pytest.mark.parametrize("host", HOSTS)
def test_the_certificate_is_for_another_host(world, host):
    text = found(of(world.elsewhere), world.mine, host)
    assert f"not for {host!r} but for 10.9.8.7, else.org" in text


def test_not_a_server_at_all(world):
    assert "not that of a server" in found(of(world.mine), world.mine)


def test_the_server_speaks_plain_text(world):
    assert "speaks plain text, without TLS" in found(http2, world.mine)


def test_the_server_speaks_another_protocol(world):
    assert "does not speak TLS" in found(http1, world.mine)
    assert "speaks TLS but not HTTP/2" in found(of(world.theirs, alpn="http/1.1"), world.mine)


def test_the_server_hangs(world):
    assert "did not answer within 0.2 s" in found(silent, world.mine, timeout_s=0.2)
    text = found(of(world.theirs, None, silent), world.mine, timeout_s=1.0)
    assert "is silent" in text


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_our_certificate_is_foreign(world, version):
    foreign = world.stranger.ca
    text = found(of(world.theirs, foreign, version=version), world.mine)
    assert "does not accept our certificate" in text
    assert "trusts another authority" in text


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_our_certificate_has_expired(world, version):
    text = found(of(world.theirs, world.mine.ca, version=version), world.outdated)
    assert "expired by the server's clock" in text


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_our_own_files_are_damaged(world, tmp_path, field):
    mess = tmp_path / "mess.pem"
    mess.write_text("nothing")
    for path in (mess, tmp_path / "gone.pem"):
        text = found(of(world.theirs), dataclasses.replace(world.mine, **{field: path}))
        assert "our own files" in text
        assert str(path) in text


def test_without_tls(world):
    assert "connection and protocol are well" in found(http2, None)
    assert "speaks TLS, and the call was in plain text" in found(of(world.theirs), None)
    assert "is no HTTP/2 server" in found(http1, None)


@pytest.fixture
def grpc_server(world):
    """Starts a gRPC server with the health service."""
    running = []

    def start(files, clients):
        one = grpc.server(futures.ThreadPoolExecutor(1))
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), one)
        if files is None:
            port = one.add_insecure_port("127.0.0.1:0")
        else:
            pair = files.key.read_bytes(), files.certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([pair], clients.read_bytes(), True)
            port = one.add_secure_port("127.0.0.1:0", credentials)
        one.start()
        running.append(one)
        return port

    yield start
    for one in running:
        one.stop(None).wait()


def test_a_grpc_call_goes_through_with_these_files(world, grpc_server):
    port = grpc_server(world.theirs, world.mine.ca)
    mine = world.mine.load("client")
    credentials = grpc.ssl_channel_credentials(mine.ca, mine.key, mine.certificate)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_grpc_servers_are_diagnosed_like_any_other(world, grpc_server):
    """gRPC has a TLS of its own, whose alerts are not those of OpenSSL."""
    port = grpc_server(world.theirs, world.mine.ca)
    assert "takes our certificate" in diagnose("localhost", port, world.mine).text
    for tls, why in (
        (world.outdated, "expired at"),
        (dataclasses.replace(world.stranger, ca=world.mine.ca), "not by the authority in"),
        (world.theirs, "that of a server, which cannot call"),
    ):
        text = diagnose("localhost", port, tls).text
        assert "does not take the certificate" in text
        assert why in text
    port = grpc_server(world.theirs, world.stranger.ca)
    assert "the server trusts another authority" in diagnose("localhost", port, world.mine).text
    port = grpc_server(world.stranger, world.mine.ca)
    assert "wrong CA" in diagnose("localhost", port, world.mine).text
    port = grpc_server(None, None)
    assert "speaks plain text" in diagnose("localhost", port, world.mine).text
