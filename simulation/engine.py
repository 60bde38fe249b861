"""What run.engine needs beyond this process, checked before minutes of loading."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedlora.client.state import ClientState
from fedlora.config.job import Job
from fedlora.errors import ConfigError
from fedlora.simulation.clients import SimulatedClients
from fedlora.simulation.virtual import VirtualLink

if TYPE_CHECKING:
    from fedlora.simulation.ray_pool import Pool


def check_engine(job: Job) -> None:
    """Refuses an engine that is not installed, or that is no simulation.

    Raises:
        ConfigError: run.engine = "ray" without Ray or with secure aggregation, or "flower".
    """
    if job.run.engine == "flower":
        raise ConfigError(
            'run.engine = "flower" trains with real clients; start it with: fedlora run, or set '
            'run.engine = "local" for a simulation'
        )
    if job.run.engine == "ray" and job.federation.secure_aggregation:
        raise ConfigError(
            'federation.secure_aggregation = true runs with run.engine = "local" only so far; '
            "choose that, or set federation.secure_aggregation = false"
        )
    if job.run.engine == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "run.engine = \"ray\" needs Ray, which is not installed; pip install 'fedlora[ray]', "
            'or set run.engine = "local"'
        )


def ray_link(
    clients: SimulatedClients,
    state: Callable[[str], ClientState],
    progress: Callable[[str], None] | None,
    differs: Callable[[str], None],
    pool: "Pool | None" = None,
) -> VirtualLink:
    """The link of run.engine = "ray"; only here is Ray imported."""
    from fedlora.simulation.ray_link import RayLink

    return RayLink(clients, state, progress, differs, pool)
