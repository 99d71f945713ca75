"""What one case showed: its error, what that may be, and everything else that was wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbench.backends.conformance.matrix import CheckRow, Status
from backbench.backends.conformance.tolerance import Deviation, complaint, deviation


@dataclass(frozen=True)
class Finding:
    """The outcome of one case."""

    error: float | None = None
    limit: float | None = None
    complaints: tuple[str, ...] = ()
    note: str = ""
    refused: str = ""

    @staticmethod
    def measure(actual: Tensor, oracle: Tensor, allowed: Deviation, what: str = "") -> Finding:
        """Compare with the oracle; `what` names the value in the complaint."""
        found = deviation(actual, oracle)
        wrong = complaint(found, allowed)
        text = f"{what}: {wrong}" if what and wrong else wrong
        return Finding(found.largest, allowed.largest, (text,) if text else ())

    def also(self, complaints: list[str]) -> Finding:
        """This finding with more complaints."""
        return replace(self, complaints=self.complaints + tuple(complaints))

    def merged(self, other: Finding) -> Finding:
        """Both findings as one; the error kept is the one nearest its limit."""
        worse = max(self, other, key=Finding._share)
        return Finding(worse.error, worse.limit, self.complaints + other.complaints, self.note or other.note)

    def _share(self) -> float:
        return self.error / self.limit if self.error is not None and self.limit else 0.0

    def row(self, operation: str, case: str, dtype: str) -> CheckRow:
        """The matrix row of this finding."""
        if self.refused:
            return CheckRow(operation, case, dtype, Status.REFUSED, self.refused)
        status = Status.WRONG if self.complaints else Status.PASS
        detail = "; ".join(self.complaints) or self.note
        return CheckRow(operation, case, dtype, status, detail, self.error, self.limit)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in shape, dtype and every bit (so that NaN equals itself)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
