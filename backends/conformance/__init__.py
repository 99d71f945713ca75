"""Checks that a backend computes what the interface says: `check(NAME, device)` gives a matrix.

Attention, linear and elementwise operations are compared with oracles in fp64 that share no code with
any backend, over head sizes, GQA ratios, windows, block sizes, dtypes, padding, poison and forks.
"""

from backbench.backends.conformance.check import check, check_backend
from backbench.backends.conformance.matrix import CheckRow, ConformanceMatrix, Status

__all__ = ["CheckRow", "ConformanceMatrix", "Status", "check", "check_backend"]
