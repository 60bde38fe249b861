"""Whether the Hugging Face hub can be reached from here, asked once and quickly."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 10.0


@functools.cache
def reachable() -> bool:
    """The hub (HF_ENDPOINT) answers within `PATIENCE_S`, whatever it says.

    The answer is remembered, so that a process without network waits only once.
    """
    from huggingface_hub import constants, get_session

    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE_S).status_code)
        except Exception:  # name service, proxy, TLS: each has errors of its own
            return

    # in a thread, because nothing else bounds how long the name service may take
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return bool(answers)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, the hub's libraries read from their cache alone if the hub cannot be reached.

    On their own they would try every file again for half a minute first.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or reachable():
        yield
        return
    # the libraries read the environment only when they are imported
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
