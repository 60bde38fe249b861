"""The records in which Flower carries our messages: names and keys, without Flower itself.

Server to client, ConfigRecord "fedlora": `job` (TOML), `manifest` (bytes), `exchange`
(HOST:PORT), `download_ticket`, `upload_ticket`, `acknowledged` (digests of manifests whose
updates have been taken in). Client to server: `manifest`, `error` and `code`, `bytes_down`,
`bytes_up`, `seconds_to_first_step`, `kept`. A query is answered by `name`, `version`, `rank`.

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


def text(fields: Mapping[str, Any], key: str) -> str:
    """A text of a record that a peer sent; empty when there is none."""
    value = fields.get(key, "")
    return value if isinstance(value, str) else ""
