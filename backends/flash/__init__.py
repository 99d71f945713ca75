"""The FlashAttention family behind one name: FA4, FA3, FA2 and AMD's builds, whichever fits."""

from backbench.backends.flash.attention import LIBRARIES, FlashAttention
from backbench.backends.interface import Backend

BACKEND = Backend(
    name="flash",
    summary="FlashAttention 4, 3 or 2 (NVIDIA) or flash-attn (AMD), by architecture and what is installed.",
    attention=FlashAttention(LIBRARIES),
    variants={library.key: FlashAttention((library,), pinned=True) for library in LIBRARIES},
)
