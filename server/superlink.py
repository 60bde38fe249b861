"""Flower's SuperLink behind a door: bounded bodies, and its inner interfaces for this machine.

Flower reads a request's whole body before it asks who sent it, and lets everybody start runs
and take tasks. So requests are cut off at 8 MiB (Flower's own objects are at most 5 MiB) as
they come in, and what starts runs or hands out tasks answers on loopback only. Connections are
counted, and no line is written for each request.

Used like flower-superlink: `python -m fedlora.server.superlink --insecure --port 8000`.
"""

import ipaddress
from collections.abc import Callable
from functools import wraps
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 8 * 2**20

# connections and requests at once; further ones are answered with 503
MAX_CONNECTIONS = 1024

# the Control API starts and stops runs, the Runtime API hands tasks to whoever asks
INNER = ("/v1/control", "/v1/runtime")


class Door:
    """What every request passes first.

    Args:
        app: the SuperLink.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses with 403 or 413, or hands the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(INNER) and not _is_loopback(scope.get("client")):
            await PlainTextResponse("answers on loopback only", 403)(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await _too_large(scope, receive, send)
            return
        passed = 0
        refused = False

        async def counted() -> Message:
            nonlocal passed, refused
            message = await receive()
            passed += len(message.get("body", b""))
            if passed > MAX_BODY_BYTES and not refused:
                refused = True
                await _too_large(scope, receive, send)
            # nothing of what is beyond the bound is kept
            return {"type": "http.disconnect"} if refused else message

        async def answer(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, answer)
        except Exception:
            # the app stumbles over the connection that was cut under it
            if not refused:
                raise


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    text = f"the body is larger than {MAX_BODY_BYTES} bytes"
    await PlainTextResponse(text, 413, headers={"connection": "close"})(scope, receive, send)


def _is_loopback(client: Any) -> bool:
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except (TypeError, ValueError, IndexError):
        return False


def _with_door(create_app: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create_app)
    def created(*args: Any, **kwargs: Any) -> Any:
        app = create_app(*args, **kwargs)
        app.add_middleware(Door)
        return app

    return created


def _bounded(serve: Callable[..., None]) -> Callable[..., None]:
    @wraps(serve)
    def run(*args: Any, **kwargs: Any) -> None:
        bounds = {"limit_concurrency": MAX_CONNECTIONS, "access_log": False}
        serve(*args, **{**kwargs, **bounds})

    return run


def main() -> None:
    """Runs the SuperLink; takes the options of flower-superlink."""
    import flwr.superlink.main as superlink
    import uvicorn
    from flwr.superlink.cli.flower_superlink import flower_superlink

    superlink.create_app = _with_door(superlink.create_app)
    uvicorn.run = _bounded(uvicorn.run)
    flower_superlink()


if __name__ == "__main__":
    main()
