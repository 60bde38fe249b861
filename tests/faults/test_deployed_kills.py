"""kill -9 of every process of a deployed federation: the adapter of a simulation, bit for bit.

Server and clients are the verbs themselves, in processes of their own, with mutual TLS. What was
acknowledged is written down by the harness at the system calls (`witness`), and compared with what
the run left; see `history`.
"""

import random

import pytest

from tests.faults.nemesis import GROUPS, Nemesis

REPETITIONS = 5


def test_a_killed_serverapp_and_a_killed_worker_change_no_bit(tmp_path):
    with Nemesis(tmp_path) as nemesis:
        trial = nemesis.trial(("worker", "ServerApp"), random.Random(0), rounds=(2, 4))
        assert trial.passed, f"{trial}\n{nemesis.deployed.logs()}"
    assert [kill.target for kill in trial.kills] == ["worker", "ServerApp"]


@pytest.fixture(scope="module")
def nemesis(tmp_path_factory):
    with Nemesis(tmp_path_factory.mktemp("nemesis")) as made:
        assert made.undisturbed().passed
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(REPETITIONS))
@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_kills_at_random_times_change_no_bit(nemesis, group, seed):
    """One of the group's targets after the other, each at a uniformly random time."""
    trial = nemesis.trial(group, random.Random(f"{seed} {group}"))
    assert trial.passed, f"{trial}\n{nemesis.deployed.logs()}"
