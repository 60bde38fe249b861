"""What a job must be to be run by real clients."""

import math

from fedlora.config.job import Job, ScenarioSection
from fedlora.errors import ConfigError


def check_deployable(job: Job) -> None:
    """Refuses what only a simulation can do.

    Raises:
        ConfigError: all problems together.
    """
    problems = []
    if job.scenario != ScenarioSection():
        problems.append(
            "[scenario] invents what real clients do; remove it, or use: fedlora simulate"
        )
    if job.evaluation.baselines:
        problems.append(
            "evaluation.baselines needs the data of all clients in one place; set it to [], or "
            "use: fedlora simulate"
        )
    if job.federation.mode == "async":
        problems.append(
            'federation.mode = "async" runs in a simulation only so far; set it to "sync"'
        )
    if job.federation.secure_aggregation:
        problems.append(
            "federation.secure_aggregation = true runs in a simulation only so far; set it to false"
        )
    if not job.federation.clients_per_round and not job.partition.clients:
        problems.append(
            "partition.clients = 0: a deployed run must know for how many clients it waits; set "
            "it, or federation.clients_per_round"
        )
    if problems:
        raise ConfigError(*problems)


def wanted_clients(job: Job) -> tuple[int, int]:
    """Clients to wait for at the start, and the quorum."""
    federation = job.federation
    wanted = job.partition.clients or federation.clients_per_round or 1
    chosen = min(federation.clients_per_round or wanted, wanted)
    return wanted, federation.quorum or max(1, math.ceil(2 * chosen / 3))
