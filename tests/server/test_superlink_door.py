"""What stands before Flower's SuperLink: bounded bodies, inner interfaces for this machine."""

import asyncio

import pytest

from fedlora.server.superlink import MAX_BODY_BYTES, MAX_CONNECTIONS, Door, _bounded


def answer(door, *, path="/v1/fleet/pull", client=("10.0.0.7", 5000), headers=(), body=()):
    """(status, bytes that the app was given) of one request."""
    sent, taken = [], 0

    async def app(scope, receive, send):
        nonlocal taken
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client went away")
            taken += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    chunks = [*body] or [b""]
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)}
        for i, chunk in enumerate(chunks)
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "client": client,
        "headers": [(k.encode(), v.encode()) for k, v in headers],
    }
    asyncio.run(door(app)(scope, receive, send))
    return next(m["status"] for m in sent if m["type"] == "http.response.start"), taken


def test_connections_are_bounded_and_requests_leave_no_line():
    """Whatever Flower asks of its web server."""
    given = []

    def serve(**options):
        given.append(options)

    _bounded(serve)(port=8000, access_log=True)
    assert given == [{"port": 8000, "access_log": False, "limit_concurrency": MAX_CONNECTIONS}]


def test_an_honest_request_passes():
    assert answer(Door, body=[b"a" * 1000, b"b" * 24]) == (200, 1024)


@pytest.mark.parametrize("length", ["8388609", "999999999999", "-1", "many"])
def test_a_body_that_says_it_is_too_large_is_refused_unread(length):
    assert answer(Door, headers=[("content-length", length)], body=[b"a"]) == (413, 0)


def test_a_body_that_grows_too_large_is_cut_off():
    chunk = b"a" * 2**20
    status, taken = answer(Door, body=[chunk] * 20)
    assert status == 413
    assert taken <= MAX_BODY_BYTES


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task"])
@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 1), 200),
        (("::1", 1), 200),
        (("10.0.0.7", 1), 403),
        (None, 403),
        (("not an address", 1), 403),
    ],
)
def test_runs_and_tasks_are_for_this_machine_only(path, client, status):
    assert answer(Door, path=path, client=client)[0] == status
