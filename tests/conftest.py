"""Settings every test shares."""

from __future__ import annotations

import os
from pathlib import Path

# Without a GPU, Triton kernels run in its interpreter. Triton reads the variable when a kernel is
# decorated, its own library included, so it is set before anything can import Triton.
if not any(Path(node).exists() for node in ("/dev/nvidia0", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
