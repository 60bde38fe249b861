"""Flower's SuperNode that runs no code it is sent.

What Flower calls an app bundle may hold Python files, which would be run at every client; ours
hold none, because the app is the fedlora that a site has installed. So a bundle with anything
but its own description is refused, and a server that was taken over cannot send code.

Used like flower-supernode: `python -m fedlora.client.supernode --superlink HOST:PORT ...`.
"""

import io
import logging
import tomllib
import zipfile
from collections.abc import Callable
from functools import wraps
from typing import Any

log = logging.getLogger(__name__)

CLIENT_APP = "fedlora.client.flower:app"
# the description, and Flower's list of what is in the bundle
FILES = {"pyproject.toml", ".info/CONTENT"}
MAX_DESCRIPTION_BYTES = 2**20
# the function of Flower's that reads a bundle's description
READ_CONFIG = "get_fused_config_from_fab"


def problem(bundle: bytes) -> str:
    """Why a bundle is refused; empty when it only names the app that is installed."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as files:
            if unknown := sorted(set(files.namelist()) - FILES):
                return f"it holds {unknown[0][:80]!r}; a bundle must hold no files but {FILES}"
            if files.getinfo("pyproject.toml").file_size > MAX_DESCRIPTION_BYTES:
                return f"its pyproject.toml has more than {MAX_DESCRIPTION_BYTES} bytes"
            tree = tomllib.loads(files.read("pyproject.toml").decode())
        named = tree["tool"]["flwr"]["app"]["components"]["clientapp"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError) as e:
        return f"it cannot be read ({type(e).__name__}: {e})"
    return "" if named == CLIENT_APP else f"its ClientApp is {str(named)[:80]!r}, not {CLIENT_APP}"


def _checked(read_config: Callable[..., Any]) -> Callable[..., Any]:
    from flwr.supercore.run import RunNotRunningException

    @wraps(read_config)
    def read(bundle: bytes, *arguments: Any) -> Any:
        if why := problem(bundle):
            log.error("the bundle of a run is refused: %s", why)
            # Flower then drops the message, and goes on
            raise RunNotRunningException
        return read_config(bundle, *arguments)

    return read


def main() -> None:
    """Runs the SuperNode; takes the options of flower-supernode."""
    import flwr.supernode.start_client_internal as node
    from flwr.supernode.cli.flower_supernode import flower_supernode

    from fedlora.logs import configure_from_environment

    configure_from_environment()
    # where every bundle is first looked into, before anything of it is installed
    setattr(node, READ_CONFIG, _checked(getattr(node, READ_CONFIG)))
    flower_supernode()


if __name__ == "__main__":
    main()
