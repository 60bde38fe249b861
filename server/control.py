"""FlowerControl: what a server tells its own SuperLink: runs to start, clients' keys to know."""

import hashlib
from pathlib import Path

import httpx
import tomli_w
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora import __version__
from fedlora.errors import RunFailed


class FlowerControl:
    """The Control API of the SuperLink on this machine.

    Args:
        port: of the SuperLink, on loopback.
        ca: certificate that signs the SuperLink's; None without TLS.
    """

    def __init__(self, port: int, ca: Path | None) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=ca is None,
            root_certificates=str(ca) if ca else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def start_run(self, run: str) -> int:
        """Starts a ServerApp for a run of the server's folder; gives Flower's id of it.

        Raises:
            RunFailed: the SuperLink is away or refuses.
        """
        content = bundle({"run": run})
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        try:
            reply = self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab)))
        except httpx.HTTPError as e:
            raise _refused("start a run", e) from e
        return int(reply.run_id)

    def stop_run(self, flower_run: int) -> None:
        """Ends a run in Flower's books; one that has ended already stays so."""
        try:
            self._client.StopRun(StopRunRequest(run_id=flower_run))
        except httpx.HTTPStatusError:
            return
        except httpx.HTTPError as e:
            raise _refused("stop a run", e) from e

    def register(self, name: str, public_key: bytes) -> None:
        """Lets the SuperNode with this key in, in the place of the client's former one.

        Args:
            name: of the client.
            public_key: PEM of a NIST curve's public key that was never registered before.

        Raises:
            RunFailed: the SuperLink is away or refuses.
        """
        try:
            for node in self._client.ListNodes(ListNodesRequest()).nodes_info:
                # Flower lists those of former times, too, and refuses to end them again
                if node.name == name and node.status != NodeStatus.UNREGISTERED:
                    self._unregister(node.node_id)
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except httpx.HTTPError as e:
            raise _refused(f"register client {name!r}", e) from e

    def _unregister(self, node: int) -> None:
        try:
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))
        except httpx.HTTPStatusError as e:
            # another call for the same client was first
            if e.response.status_code != httpx.codes.NOT_FOUND:
                raise

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


def bundle(config: dict[str, str]) -> bytes:
    """A Flower app bundle without code: the app is the fedlora that is installed.

    Args:
        config: of the app.
    """
    project = {
        "project": {
            "name": "fedlora-run",
            "version": __version__,
            "description": "A run of fedlora",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlora",
                    "components": {
                        "serverapp": "fedlora.server.flower:app",
                        "clientapp": "fedlora.client.flower:app",
                    },
                    "config": config,
                }
            }
        },
    }
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})[0]


def _refused(what: str, error: httpx.HTTPError) -> RunFailed:
    reason = error.response.text if isinstance(error, httpx.HTTPStatusError) else str(error)
    return RunFailed(f"Flower's SuperLink did not {what}: {reason[:300]}")
