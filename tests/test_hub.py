"""Without network, names on the hub fail at once; with it, nothing changes."""

import http.server
import socket
import threading

import pytest
from huggingface_hub import constants

from fedlora.config.job import ModelSection
from fedlora.data.hub import read_hub
from fedlora.errors import DataError, ModelError
from fedlora.hub import hub_or_cache, reachable
from fedlora.models.loading import load_processor


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    reachable.cache_clear()
    yield
    reachable.cache_clear()


def test_without_network_the_hub_is_tried_once(monkeypatch):
    asked = []

    def no_name_service(host, *rest, **more):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_service)
    with pytest.raises(ModelError, match=r"'no-owner/no-model' cannot be loaded.*couldn't connect"):
        load_processor(ModelSection(name="no-owner/no-model"))
    with pytest.raises(DataError, match=r'"no-owner/no-set".*offline'):
        read_hub("no-owner/no-set", None, "train")
    assert len(asked) == 1
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_anything_is_used(monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with hub_or_cache():
            assert not constants.HF_HUB_OFFLINE
        assert reachable()
        server.shutdown()
