"""Health and figures over real HTTP, and what a hostile peer can do to them."""

import json
import socket
import threading
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from fedlora.errors import ConfigError
from fedlora.health import MAX_CONNECTIONS, MAX_REQUEST_BYTES, Health, HealthServer, Part
from fedlora.telemetry.processes import ProcessMetrics

GOOD = Health((Part("exchange", True, 1, 0.5), Part("superlink", True, 3)), is_ready=True)


@pytest.fixture
def serve():
    servers = []

    def start(status=lambda: GOOD, registry=None, **options):
        servers.append(HealthServer("127.0.0.1:0", status, registry, **options))
        return servers[-1].start()

    yield start
    for server in servers:
        server.stop()


def get(port, path):
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.headers["Content-Type"], reply.read()
    except HTTPError as e:
        with e:
            return e.code, e.headers["Content-Type"], e.read()


def talk(port, data):
    """All that is answered to raw bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        try:
            peer.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return read_all(peer)


def read_all(peer):
    """What comes until the other side closes, in whatever way."""
    found = b""
    try:
        while data := peer.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def test_health_and_ready_are_told_apart_and_name_every_part(serve):
    now = [GOOD]
    port = serve(lambda: now[0])
    assert get(port, "/health")[0] == get(port, "/ready")[0] == 200
    status, kind, body = get(port, "/health?verbose=1")
    assert (status, kind) == (200, "application/json")
    assert json.loads(body) == {
        "healthy": True,
        "ready": True,
        "detail": "",
        "parts": [
            {
                "name": "exchange",
                "alive": True,
                "starts": 1,
                "since": "1970-01-01T00:00:00.500Z",
            },
            {"name": "superlink", "alive": True, "starts": 3, "since": None},
        ],
    }
    now[0] = Health((Part("worker", True, 1),), is_ready=False, detail="joining")
    assert get(port, "/health")[0] == 200
    status, _, body = get(port, "/ready")
    assert status == 503
    assert json.loads(body)["detail"] == "joining"
    now[0] = Health((Part("worker", False, 2), Part("node", True, 1)), is_ready=True)
    assert get(port, "/ready")[0] == 200
    status, _, body = get(port, "/health")
    assert status == 503
    assert [part["alive"] for part in json.loads(body)["parts"]] == [False, True]


def test_metrics_are_those_of_the_registry_given(serve):
    registry = CollectorRegistry()
    Counter("fedlora_things", "Things.", registry=registry).inc(3)
    registry.register(ProcessMetrics(lambda: GOOD))
    port = serve(registry=registry)
    status, kind, body = get(port, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    samples = {
        (sample.name, sample.labels.get("process")): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert samples["fedlora_things_total", None] == 3
    assert samples["fedlora_process_up", "exchange"] == 1
    assert samples["fedlora_process_restarts_total", "exchange"] == 0
    assert samples["fedlora_process_restarts_total", "superlink"] == 2


def test_without_a_registry_there_are_no_metrics(serve):
    assert get(serve(), "/metrics")[0] == 404


def test_a_status_that_fails_is_unhealthy_and_the_server_goes_on(serve):
    def status():
        raise RuntimeError("secret path")

    registry = CollectorRegistry()
    Counter("fedlora_things", "Things.", registry=registry)
    port = serve(status, registry)
    for path in ("/health", "/ready"):
        code, _, body = get(port, path)
        assert code == 503
        assert b"secret" not in body
    assert get(port, "/metrics")[0] == 200


@pytest.mark.parametrize(
    ("request_head", "code"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nmore", 200),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 404),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /health HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"HEAD /health HTTP/1.1\r\n\r\n", 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET /" + b"a" * MAX_REQUEST_BYTES, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * MAX_REQUEST_BYTES, 431),
    ],
)
def test_every_request_has_its_status(serve, request_head, code):
    port = serve()
    assert talk(port, request_head).startswith(f"HTTP/1.1 {code} ".encode())
    assert get(port, "/health")[0] == 200


def test_a_body_without_end_is_not_read(serve):
    port = serve()
    talk(port, b"POST /health HTTP/1.1\r\n\r\n" + b"x" * (32 << 20))
    assert get(port, "/health")[0] == 200


def test_a_peer_that_trickles_is_cut_off_after_the_time_of_a_whole_request(serve):
    """It always sends within the time limit of one read, and never ends."""
    port = serve(request_s=0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        ended = threading.Event()

        def trickle():
            try:
                while not ended.wait(0.02):
                    peer.sendall(b"x")
            except OSError:
                return

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            assert read_all(peer) == b""
        finally:
            ended.set()
            sender.join()


def test_when_every_place_is_taken_others_are_closed_unread_until_one_is_free(serve):
    port = serve(request_s=60.0)
    held = [
        socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(MAX_CONNECTIONS)
    ]
    request = b"GET /health HTTP/1.1\r\n\r\n"
    assert talk(port, request) == b""
    for peer in held:
        peer.close()
    # its threads take note of that one after another
    answers = (talk(port, request) for _ in range(10_000))
    assert any(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)


def test_it_listens_on_the_loopback_address_unless_told_otherwise():
    server = HealthServer(":0", lambda: GOOD)
    port = server.start()
    try:
        assert get(port, "/health")[0] == 200
        with socket.socket() as other:
            # another address of this machine is still free
            other.bind(("127.0.0.2", port))
    finally:
        server.stop()


def test_a_port_in_use_is_told_with_its_option(serve):
    port = serve()
    second = HealthServer(f"127.0.0.1:{port}", lambda: GOOD, option="--health")
    with pytest.raises(ConfigError, match=rf"--health: port {port} .*in use.*--health"):
        second.start()
    second.stop()


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", ":x", ":70000", "h:-1", "h:²"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=r"--health .*HOST:PORT"):
        HealthServer(address, lambda: GOOD)


def test_stop_frees_the_port_and_cuts_off_who_waits():
    server = HealthServer("127.0.0.1:0", lambda: GOOD, request_s=60.0)
    port = server.start()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        # an answered request shows that the one before it has been taken
        peer.sendall(b"GET /he")
        assert get(port, "/health")[0] == 200
        server.stop()
        assert peer.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    again = HealthServer(f"127.0.0.1:{port}", lambda: GOOD)
    assert again.start() == port
    again.stop()
    assert "health" not in {thread.name for thread in threading.enumerate()}
