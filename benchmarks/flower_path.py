"""Flower's own way of moving a client's arrays to the server, for benchmarks/transfer.py.

The SuperLink's application (its HTTP routes, protobuf translation and in-memory store) serves
from a process of its own, with TLS. Clients push the objects of a reply as a SuperNode does,
with Flower's own functions. Left out, in Flower's favour: the message and its polling, the hop
from ClientApp to SuperNode, and the hop from SuperLink to ServerApp.

    python -m benchmarks.flower_path PORT CERTIFICATE KEY        the server
"""

import sys
from typing import Any

import numpy as np


def serve(port: int, certificate: str, key: str) -> None:
    """Serves until it is killed; prints a line when it can be called."""
    import uvicorn
    from fastapi import Request
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.superlink import main
    from flwr.superlink.servicer.fleet import fleet_handlers

    # the run has no ServerApp, so it never gets beyond "pending"
    fleet_handlers.check_abort = lambda *_: None
    app = main.create_app()
    state = app.state.linkstate_factory.state()
    run = state.create_run(
        None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
    )

    @app.post("/announce")
    async def announce(request: Request) -> dict[str, Any]:
        tree = ObjectTree.FromString(await request.body())
        session = state.start_session(run)
        missing = state.preregister_object_tree(tree, session)
        return {"run": str(run), "session": session, "missing": missing}

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="error",
    )


class FlowerPush:
    """One client's reply, ready to be pushed.

    Args:
        address: of the server.
        authority: the CA's certificate, a file.
        data: its bytes, taken as float32.
    """

    def __init__(self, address: str, authority: str, data: bytes) -> None:
        import requests
        from flwr.app import Array, ArrayRecord
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
        )
        from flwr.supernode.fleet_http_connection import http_request_response

        record = ArrayRecord({"factors": Array(np.frombuffer(data, np.float32))})
        self._objects = get_all_nested_objects(record)
        tree = get_object_tree(record).SerializeToString()
        told = requests.post(f"https://{address}/announce", data=tree, verify=authority, timeout=60)
        told.raise_for_status()
        self._told = told.json()
        with open(authority, "rb") as file:
            self._context = http_request_response(address, False, file.read())
        self._push_object = self._context.__enter__()[6]

    def push(self) -> None:
        """Pushes all objects, two at a time as Flower does."""
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        run, session = int(self._told["run"]), self._told["session"]
        push_objects(
            self._objects,
            lambda name, content: self._push_object(run, session, name, content),
            object_ids_to_push=set(self._told["missing"]),
        )

    def close(self) -> None:
        """Leaves the server."""
        self._context.__exit__(None, None, None)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], sys.argv[3])
