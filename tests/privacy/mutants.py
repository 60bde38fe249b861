"""Private training with one fault each, and the oracle that must notice it.

None is a mock: each trains, and most look right from outside.
"""

from tests.privacy import mutants_of_chance, mutants_of_charges, mutants_of_sums
from tests.privacy.mutant import MUTANTS

FILES = (mutants_of_chance, mutants_of_sums, mutants_of_charges)
__all__ = ["FILES", "MUTANTS"]
