"""What the server tells its SuperLink, a real one."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flwr.proto.control_pb2 import ListNodesRequest

from fedlora.client.joining import new_node_key
from fedlora.errors import RunFailed
from fedlora.server.control import FlowerControl
from tests.certificates import Authority
from tests.deployed.federation import LONGEST_S, free_port


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superlink")
    authority = Authority()
    issued = authority.issue("server", "server")
    files = {"ca": authority.pem, "cert": issued.certificate, "key": issued.key}
    for name, data in files.items():
        (folder / f"{name}file").write_bytes(data)
    port = free_port()
    command = [sys.executable, "-m", "fedlora.server.superlink", "--port", str(port)]
    command += ["--ssl-ca-certfile", folder / "cafile", "--ssl-certfile", folder / "certfile"]
    command += ["--ssl-keyfile", folder / "keyfile", "--enable-supernode-auth"]
    command += ["--isolation", "process", "--database", folder / "superlink.db"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT)
    made = FlowerControl(port, folder / "cafile")
    ends = time.monotonic() + LONGEST_S
    while True:
        try:
            made.stop_run(1)
        except RunFailed:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < ends, (folder / "log").read_text()
            time.sleep(0.1)
        else:
            break
    yield made
    made.close()
    process.terminate()
    process.wait()


def live(control, name):
    """Public keys of a client's nodes that may call."""
    nodes = control._client.ListNodes(ListNodesRequest()).nodes_info
    return [n.public_key for n in nodes if n.name == name and n.status != "unregistered"]


def test_a_client_may_come_back_as_often_as_it_likes(control, tmp_path):
    """Each time with a new key, in the place of the node before."""
    for _ in range(5):
        key = new_node_key(tmp_path / "node.key")
        control.register("ann", key)
        control.register("bob", new_node_key(tmp_path / "node.key"))
        assert live(control, "ann") == [key]
        assert len(live(control, "bob")) == 1


def test_calls_for_one_client_at_the_same_time_are_all_answered(control, tmp_path):
    keys = [new_node_key(tmp_path / "node.key") for _ in range(8)]
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda key: control.register("cyd", key), keys))
    assert set(live(control, "cyd")) <= set(keys)
    assert live(control, "cyd")
