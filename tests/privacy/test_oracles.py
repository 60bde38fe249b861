"""The oracles pass sound private training of every kind, and notice every fault."""

import dataclasses

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from fedlora.errors import TrainingError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.audit.charge import _whole_orders
from fedlora.privacy.audit.oracles import ORACLES, consult
from fedlora.privacy.per_sample import MODES
from tests.privacy.models import KINDS, make
from tests.privacy.mutants import MUTANTS
from tests.privacy.subjects import subject

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

# of the list that stands in the literature on faulty implementations, none may go missing
NAMED = {
    "no noise",
    "noise without clip norm",
    "noise over root of batch",
    "noise over batch twice",
    "noise reused",
    "seed fixed for every client",
    "noise on one factor only",
    "noise at first step only",
    "one scalar for a tensor",
    "clip of the batch",
    "clip by parameter",
    "largest entry as norm",
    "no clip",
    "mean over the tokens of the batch",
    "denominator of the batch drawn",
    "empty batches skipped",
    "accountant never advanced",
    "accountant reset on restart",
}


@pytest.fixture(scope="module")
def subjects():
    return {kind: subject(kind) for kind in {mutant.kind for mutant in MUTANTS.values()}}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed_by_its_oracle(subjects, name):
    mutant = MUTANTS[name]
    faulty = mutant.make(subjects[mutant.kind])
    [found] = consult(faulty, {mutant.oracle: ORACLES[mutant.oracle]})
    assert not found.passed, found


def test_every_oracle_notices_something_and_no_named_fault_is_missing():
    assert {mutant.oracle for mutant in MUTANTS.values()} == set(ORACLES)
    assert set(MUTANTS) >= NAMED


def alarms(made):
    return [found for found in consult(made) if not found.passed]


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
def test_sound_training_passes(kind):
    assert alarms(subject(kind)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("repeat", range(30))
def test_sixty_times_without_a_false_alarm(mode, repeat):
    assert alarms(subject("llama", per_sample=mode)) == []


def test_training_that_recomputes_activations_passes():
    assert alarms(subject("llama", checkpointing=True)) == []


def test_the_adapter_is_as_before_afterwards():
    made = subject("bert")
    before = made.adapted.state().tensors
    list(consult(made))
    after = made.adapted.state().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.5, 8.0, 5), (0.1, 2.0, 300)])
def test_the_moments_of_the_oracle_bound_the_privacy_loss_distribution(rate, sigma, steps):
    accountant = PLDAccountant()
    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    truth = accountant.compose(step, steps).get_epsilon(1e-5)
    assert _whole_orders(rate, sigma, steps, 1e-5) >= truth
    assert abs(epsilon([Event(rate, sigma, steps)], 1e-5, "prv") - truth) <= 0.05


def test_dropout_is_refused_because_one_example_would_change_the_masks_of_others():
    made = make("llama", dropout=0.1)
    factors = ("A", "B")
    held = dataclasses.replace(subject("llama"), adapted=made.adapted, factors=factors)
    with pytest.raises(TrainingError, match="dropout"):
        held.released([[0]], clip=1.0, noise=1.0, expected=1.0)
