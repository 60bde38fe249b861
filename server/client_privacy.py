"""A run that protects its clients: terms before round 1, and rounds against their budget."""

import hashlib

from fedlora.config.job import Job
from fedlora.errors import ConfigError, LedgerError
from fedlora.privacy.client_level import Terms, check_client_level, make_terms
from fedlora.privacy.ledger import Ledger
from fedlora.server.central_record import CentralRecord
from fedlora.server.private_rounds import PrivateRounds
from fedlora.server.rounds import run_rounds
from fedlora.server.run_parts import RunParts
from fedlora.strategies.base import Conditions, Strategy, StrategyState

# in the run's folder; what it holds is charged to this run alone
LEDGER = "privacy"


def client_terms(job: Job, strategy: Strategy, given: Conditions) -> Terms | None:
    """What the job promises to its clients; None if it does not protect clients.

    Args:
        strategy: as it will merge.
        given: what it was checked against.

    Raises:
        ConfigError: with what does not go together.
        BudgetExhausted: no noise is large enough for the budget.
    """
    privacy = job.privacy
    if privacy is None or privacy.unit != "client":
        return None
    check_client_level(strategy, given)
    known = len(given.ranks)
    if privacy.population is None and job.run.engine == "flower":
        raise ConfigError(
            'privacy.unit = "client" needs privacy.population: how many clients are enrolled, '
            "whether they are connected or not"
        )
    population = privacy.population or known
    if known > population:
        raise ConfigError(
            f"privacy.population = {population}, but there are {known} clients; count them all"
        )
    federation = job.federation
    return make_terms(privacy, population, federation.clients_per_round, federation.rounds)


def run_private(
    run: RunParts, record: CentralRecord, state: StrategyState, until: int | None
) -> StrategyState:
    """Runs rounds up to `until` (by default all) and returns the last state.

    Args:
        record: the run's own, `run.privacy`.

    Raises:
        BudgetExhausted: the next round does not fit into the budget; committed rounds stand.
        RunFailed: see `PrivateRounds.round`.
        LedgerError: the ledger is missing, damaged, or knows of fewer rounds than the run.
    """
    terms = record.terms
    folder, key = run.store.folder / LEDGER, hashlib.sha256(run.run.encode()).hexdigest()
    with Ledger.open(
        folder, key, unit="client", epsilon=terms.epsilon, delta=terms.delta
    ) as ledger:
        paid = sum(event.steps for event in ledger.charged())
        if paid < state.round:
            raise LedgerError(
                f"privacy ledger {folder} has {paid} rounds, but {state.round} are committed: it "
                "was lost or replaced, and what was spent cannot be told; restore it, or start a "
                "new run"
            )
        return run_rounds(run, state, until, PrivateRounds(run, record, ledger).round)
