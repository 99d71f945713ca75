"""The plain torch backend: readable, runs everywhere, and the specification for every other one."""

from backbench.backends.interface import Backend
from backbench.backends.torch.attention import TorchAttention
from backbench.backends.torch.collectives import TorchCollectives
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.torch.operations import TorchOperations

BACKEND = Backend(
    name="torch",
    summary="Plain PyTorch on any device; the reference for all others.",
    attention=TorchAttention(),
    linear=TorchLinear(),
    operations=TorchOperations(),
    collectives=TorchCollectives(),
    base=None,
)
