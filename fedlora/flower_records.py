"""The records in which Flower carries our messages: names and keys, without Flower itself.

Server to client, ConfigRecord "fedlora": `job` (TOML), `manifest` (bytes), `exchange`
(HOST:PORT; without a host, where the client reaches Flower), `download_ticket`,
`upload_ticket`, `acknowledged` (digests of manifests whose updates have been taken in), `base`
(fingerprint of the base model; may be missing). Client to server: `manifest`, `error` and
`code`, `bytes_down`, `bytes_up`, `seconds_to_first_step`, `kept`. A query is answered by
`name`, `version`, `rank`.

Without an exchange, parts ride in ArrayRecord "parts", one array of bytes for each digest, and
the update's payload in ArrayRecord "payload".
"""

from collections.abc import Mapping
from typing import Any

CONFIG = "fedlora"
PARTS = "parts"
PAYLOAD = "payload"

TRAIN = "train"
QUERY = "query"

# "safetensors": what the arrays are, which Flower carries without looking into them
STYPE = "safetensors"

MAX_TEXT = 600

# of a SuperNode's node config
NAME = "name"
WORKER_SOCKET = "worker-socket"
SERVER_HOST = "server-host"
RANK = "rank"
PARTITION = "partition-id"


def text(fields: Mapping[str, Any], key: str) -> str:
    """A text of a record that a peer sent; empty when there is none.

    It ends up in logs and on terminals: it is cut, and what does not print is escaped.
    """
    value = fields.get(key, "")
    if not isinstance(value, str):
        return ""
    cut = value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def data(fields: Mapping[str, Any], key: str) -> bytes:
    """Bytes of a record that a peer sent; empty when there are none."""
    value = fields.get(key, b"")
    return value if isinstance(value, bytes) else b""


def texts(fields: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts of a record that a peer sent; what is no text is left out."""
    value = fields.get(key, [])
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
