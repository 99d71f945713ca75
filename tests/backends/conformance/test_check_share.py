"""Dividing the cases of a check among processes."""

from __future__ import annotations

import pytest
import torch

from backbench.backends import registry
from backbench.backends.conformance import check_backend
from backbench.backends.interface import Backend
from backbench.backends.interface.device import cpu


@pytest.mark.parametrize("shares", [1, 3])
def test_shares_make_up_the_whole(shares: int) -> None:
    operations = Backend("operations alone", "", operations=registry.load("torch").operations)
    whole = check_backend(operations, cpu(), dtypes=[torch.float32])
    parts = [
        check_backend(operations, cpu(), dtypes=[torch.float32], share=(i, shares)) for i in range(shares)
    ]
    assert sum(len(part.rows) for part in parts) == len(whole.rows) > shares
    assert [parts[i % shares].rows[i // shares].case for i in range(len(whole.rows))] == [
        row.case for row in whole.rows
    ]
