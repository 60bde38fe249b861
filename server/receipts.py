"""Receipt: what the exchange has of one client's reply; whoever finds it finds the payload."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from urllib.parse import quote

from fedlora.errors import StorageError
from fedlora.storage import sealed, unsealed

DIGEST = re.compile(r"[0-9a-f]{64}")
# a name of 255 bytes is the most that common file systems take
MAX_STEM = 180


@dataclass(frozen=True)
class Receipt:
    """One whole, digest-checked reply.

    Attributes:
        client, node: of the ticket it was sent with.
        sha256, size_bytes: of the payload.
        manifest: as the client sent it, not yet believed.
        bytes_down: what the client says it fetched.
    """

    client: str
    node: int
    sha256: str
    size_bytes: int
    manifest: bytes
    bytes_down: int = 0


def encode_receipt(receipt: Receipt) -> bytes:
    """The receipt as canonical JSON, under its digest."""
    value = {**vars(receipt), "manifest": base64.b64encode(receipt.manifest).decode()}
    return sealed(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def decode_receipt(data: bytes) -> Receipt:
    """The receipt in `data`.

    Raises:
        StorageError: these bytes are not a receipt.
    """
    try:
        value = json.loads(unsealed(data))
        value["manifest"] = base64.b64decode(value["manifest"], validate=True)
        receipt = Receipt(**value)
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise StorageError(f"not a receipt of an upload: {e}") from e
    counts = (receipt.node, receipt.size_bytes, receipt.bytes_down)
    if (
        not isinstance(receipt.client, str)
        or any(type(count) is not int or count < 0 for count in counts)
        or not isinstance(receipt.sha256, str)
        or not DIGEST.fullmatch(receipt.sha256)
    ):
        raise StorageError("not a receipt of an upload: a field is not what it should be")
    return receipt


def file_stem(client: str) -> str:
    """A file name for `client`, without dots: percent-quoted, or a digest where that is long.

    Different clients have different stems.
    """
    stem = quote(client, safe="").replace(".", "%2E").replace("~", "%7E")
    return stem if len(stem) <= MAX_STEM else "~" + hashlib.sha256(client.encode()).hexdigest()
