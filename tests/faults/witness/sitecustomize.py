"""Writes down what a process makes durable: every rename and link of a file that matters.

Python imports this module by itself in every process whose PYTHONPATH holds this folder. It is
the harness's own record: it looks at system calls, and knows nothing of the code that makes them.
Each line stands in the file named by FEDLORA_WITNESS, which is opened for appending, so that lines
of several processes do not mix and a killed process loses none. "begin" comes before the call and
"done" after it; a call that was cut off by a kill may have happened or not.
"""

import base64
import json
import os
import time

LOG = os.environ.get("FEDLORA_WITNESS")
# receipts, manifests and HEAD are far smaller; payloads are not kept
MOST_BYTES = 1 << 17


def _watched(name):
    real = getattr(os, name)

    def call(source, target, *args, **kwargs):
        path = os.fspath(target)
        if not _matters(path):
            return real(source, target, *args, **kwargs)
        data = _content(source)
        _write("begin", path, data)
        result = real(source, target, *args, **kwargs)
        _write("done", path, data)
        return result

    setattr(os, name, call)


def _matters(path):
    return isinstance(path, str) and (
        path.endswith("/HEAD")
        or (path.endswith(".json") and ("/inbox/" in path or "/outbox/" in path))
    )


def _content(source):
    with open(source, "rb") as file:
        return base64.b64encode(file.read(MOST_BYTES)).decode()


def _write(kind, path, data):
    line = {"kind": kind, "path": path, "data": data, "at": time.monotonic(), "pid": os.getpid()}
    descriptor = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


if LOG:
    for call_name in ("rename", "link"):
        _watched(call_name)
