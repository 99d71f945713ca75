"""The backend interface: what an attention, linear or elementwise implementation must offer.

The plain torch backend (`backends.torch`) is the specification; every other backend is checked
against it. Tensors named below live on one device; shapes use S = sequences in the batch,
T = tokens in the batch, B = blocks per sequence, H = hidden size, V = vocabulary size.
"""

from backbench.backends.interface.attention import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Batch,
    GraphSupport,
    Rotary,
    Rotation,
    kv_bytes_per_token,
)
from backbench.backends.interface.backend import Backend, Selection
from backbench.backends.interface.collectives import Collectives, Communicator, Peers, Single, Way
from backbench.backends.interface.device import Device
from backbench.backends.interface.kernels import KernelCase, KernelLaunch, Kernels
from backbench.backends.interface.linear import Crossover, Linear, PackedWeight, RoundedRows
from backbench.backends.interface.operations import Operations, SamplingBatch
from backbench.backends.interface.tuner import Config, Problem, Tuner
from backbench.backends.interface.weight import Scheme, Weight, WeightSpec, join

__all__ = [
    "Attention",
    "AttentionRunner",
    "AttentionSpec",
    "Backend",
    "Batch",
    "Collectives",
    "Communicator",
    "Config",
    "Crossover",
    "Device",
    "GraphSupport",
    "KernelCase",
    "KernelLaunch",
    "Kernels",
    "Linear",
    "Operations",
    "PackedWeight",
    "Peers",
    "Problem",
    "Rotary",
    "Rotation",
    "RoundedRows",
    "SamplingBatch",
    "Scheme",
    "Selection",
    "Single",
    "Tuner",
    "Way",
    "Weight",
    "WeightSpec",
    "join",
    "kv_bytes_per_token",
]
