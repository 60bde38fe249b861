"""Conformance: laws that every strategy keeps, for tests and for `fedlora strategy check`."""

from fedlora.strategies.conformance.federation import Federation, admit
from fedlora.strategies.conformance.law import Law
from fedlora.strategies.conformance.suite import LAWS, Finding, federations, findings, try_law

__all__ = ["LAWS", "Federation", "Finding", "Law", "admit", "federations", "findings", "try_law"]
