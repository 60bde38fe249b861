"""The laws of the ledger, and what is on disk."""

import pytest

from fedlora.privacy.ledger import Ledger
from tests.privacy.ledger_laws import LAWS


@pytest.mark.parametrize("name", LAWS)
def test_law(name, tmp_path):
    LAWS[name](tmp_path / "privacy", Ledger)
