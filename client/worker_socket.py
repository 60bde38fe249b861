"""The unix socket of a worker: who may call it, and that it is nobody else's."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from fedlora.client.worker import Worker
from fedlora.errors import ConfigError
from fedlora.protos.worker_pb2_grpc import add_WorkerServicer_to_server

MOST_WAITING = 8
# callers that wait, one that is served, and some that ask for the status
MOST_CALLS = MOST_WAITING + 8
# of sockaddr_un, without the last NUL
LONGEST_PATH = 107
OPTIONS = (
    # otherwise a second worker could share the socket
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),
)


def listen(worker: Worker, path: Path) -> grpc.Server:
    """A running server on the socket `path`, which only this user can call.

    Raises:
        ConfigError: the path is too long, the folder is open to others, or a worker that is
            alive listens there.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(
            f"--socket {path} has {len(os.fsencode(path))} bytes; a unix socket's path has at most "
            f"{LONGEST_PATH}: choose a shorter one"
        )
    _claim(path)
    server = grpc.server(
        ThreadPoolExecutor(MOST_CALLS), options=OPTIONS, maximum_concurrent_rpcs=MOST_CALLS
    )
    add_WorkerServicer_to_server(worker, server)
    # the socket is closed to others from its first moment
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as e:
        raise ConfigError(f"--socket {path} cannot be opened: {e}") from e
    finally:
        os.umask(before)
    server.start()
    return server


def _claim(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.parent.stat()
    except OSError as e:
        raise ConfigError(f"--socket {path}: its folder cannot be used: {e.strerror}") from e
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"--socket {path}: others can write to its folder, and could put a socket of their own "
            "there; choose a folder of this user's alone"
        )
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            # its worker is dead, or there never was one
            path.unlink(missing_ok=True)
        except OSError as e:
            raise ConfigError(f"--socket {path} cannot be used: {e.strerror}") from e
        else:
            raise ConfigError(
                f"--socket {path}: a worker is alive there; stop it, or choose another socket"
            )
