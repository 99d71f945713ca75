"""Named random streams: every draw of a workload comes from the seed and a name, on any machine.

A stream depends on (seed, name, index) alone, so lengths do not move when the arrival process changes,
and request 7 has the same prompt whoever makes it, in whatever order, in however many processes.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """The generator called `name` (and, where one is needed per request or block, its `index` >= 0).

    The name enters as SHA-256, never as Python's `hash()`, which differs in every process.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(key, index))
    return np.random.Generator(np.random.PCG64(sequence))
