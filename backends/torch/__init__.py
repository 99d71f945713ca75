"""The plain torch backend: readable, runs everywhere, and the specification for every other one."""

from backends.interface import Backend
from backends.torch.attention import TorchAttention
from backends.torch.linear import TorchLinear
from backends.torch.operations import TorchOperations

BACKEND = Backend(
    name="torch",
    summary="Plain PyTorch on any device; the reference for all others.",
    attention=TorchAttention(),
    linear=TorchLinear(),
    operations=TorchOperations(),
    base=None,
)
