"""Reading quantized checkpoints: what their formats share, from the config's settings to whole weights."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight, join
from backbench.backends.interface.weight import PACKED
from backbench.backends.quantization import FP8, packed, unpacked
from backbench.engine.models.fields import shown
from backbench.engine.models.formats import settings_of
from backbench.engine.models.formats.dense import DTYPES, SafetensorsFiles, SafetensorsFormat
from backbench.engine.models.layers import WHOLE, ModelSpec, Product, Shard
from backbench.engine.models.weights import Weights, build
from backbench.errors import BackendError, EngineError

ROWS_AT_ONCE = 256
"""Of a weight that is unpacked or looked through while it is read, so that little of it is held twice."""
WRITING = (
    "desc_act static_groups act_group_aware hyb_act true_sequential damp_percent damp_auto_increment mse "
    "meta dataset tokenizer batch_size pad_token_id max_input_length model_seqlen cache_block_outputs "
    "block_name_to_quantize module_name_preceding_first_block model_name_or_path model_file_base_name "
    "backend use_cuda_fp16 use_exllama use_exllama_v2 disable_exllama exllama_config quantizer"
)
"""Settings of GPTQ's and AWQ's writers that say how a checkpoint was made or is run elsewhere. What desc_act
and static_groups led to, `g_idx` itself says."""
NAN_CODE = 127
"""Of float8_e4m3fn, without its sign."""
NAN_EXPONENT = 255
"""Of e8m0."""


@dataclass
class StoredLinear:
    """One linear of a checkpoint while it is read: its tensors by what follows its name."""

    files: SafetensorsFiles
    name: str
    scheme: Scheme
    """As the checkpoint keeps it."""
    n: int
    k: int
    settings: Mapping[str, Any]
    """The config's `quantization_config`."""
    unread: set[str] = field(default_factory=set)
    """What the checkpoint holds of it and no one has asked for."""

    @property
    def groups(self) -> int:
        """Scales along K."""
        return -(-self.k // (self.scheme.group or self.k))

    @property
    def scale_shape(self) -> tuple[int, int]:
        """[R, G], as `Weight.scale`."""
        return -(-self.n // self.scheme.group_n), self.groups

    def size(self, suffix: str) -> int:
        """Elements of tensor `suffix`; only headers are read."""
        return torch.Size(self.files.shape(f"{self.name}.{suffix}")).numel()

    def take(self, suffix: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Tensor `suffix` of the linear, mapped from its file; raises EngineError where it is another."""
        name = f"{self.name}.{suffix}"
        self.files.require(name, shape)
        self.unread.discard(suffix)
        return self.files.read(name, dtypes)

    def take_number(self, suffix: str) -> Tensor:
        """f32 [1]: a tensor of one positive number."""
        name = f"{self.name}.{suffix}"
        self.unread.discard(suffix)
        number = self.files.read(name, DTYPES).float().flatten()
        if number.numel() != 1 or not 0 < number.item() < float("inf"):
            raise EngineError(f"Tensor {name} must be one positive number; the checkpoint is damaged.")
        return number

    def take_zeros(self, *suffixes: str) -> None:
        """Tensors that old writers store although they say nothing; raises EngineError where they do."""
        for suffix in self.unread.intersection(suffixes):
            tensor = self.files.read(f"{self.name}.{suffix}", None)
            if tensor.float().any():
                raise EngineError(
                    f"Tensor {self.name}.{suffix} is not zero, though the config says nothing of it; "
                    "the two do not belong together."
                )
            self.unread.discard(suffix)


class QuantizedFormat(SafetensorsFormat):
    """A way to keep quantized linears; whatever else a checkpoint holds is kept as in dense ones."""

    @abstractmethod
    def read(self, linear: StoredLinear) -> Weight:
        """The linear in the canonical layout, its tensors on the CPU and mapped where they can be.

        Raises:
            EngineError: a tensor is missing, of another shape or dtype, or contradicts the config.
        """

    def load(
        self,
        folder: Path,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
    ) -> Weights:
        settings = settings_of(folder)
        schemes = self.schemes(settings)
        with SafetensorsFiles(folder) as files:
            stored = _by_linear(files.file_of)
            for tensor in spec.tensors():
                if not isinstance(tensor, Product) or tensor.scheme.dense:
                    files.require_all(tensor)
            known = {name for tensor in spec.tensors() for name, _ in tensor.sources}

            def part(name: str, rows: int, columns: int) -> Weight:
                scheme = schemes.of(name)
                linear = StoredLinear(files, name, scheme, rows, columns, settings, set(stored[name]))
                weight = self.read(linear)
                if f"{name}.bias" in known:
                    linear.unread.discard("bias")
                linear.take_zeros("bias")
                if linear.unread:
                    raise EngineError(
                        f"The checkpoint holds {name}.{min(linear.unread)}, which is unknown here and may "
                        "change what the weight means."
                    )
                _check_numbers(weight, name)
                return weight

            def product(wanted: Product) -> Weight:
                parts = [part(_linear(name), rows, wanted.k) for name, rows in wanted.sources]
                if wanted.scheme.group_n == 1:
                    parts = [with_own_rows(each) for each in parts]
                try:
                    whole = join(parts)
                except BackendError as error:
                    names = " and ".join(_linear(name) for name, _ in wanted.sources)
                    raise EngineError(f"{names}: {error}") from error
                return _owned(whole, device, copy_all=len(parts) == 1)

            return build(spec, device, dtype, files.fill, product, shard)


def check_known(settings: Mapping[str, Any], known: str, where: str) -> None:
    """Raises EngineError naming a setting that is none of the `known`, which spaces part."""
    if unknown := sorted(set(map(str, settings)) - set(known.split())):
        raise EngineError(
            f"The checkpoint's {where} has {shown(unknown[0])}, which may change what the weights mean and "
            "is unknown here."
        )


def names_in(settings: Mapping[str, Any], key: str) -> list[str]:
    """The names under `key`, none where it is absent; raises EngineError where they are no list of names."""
    names = settings.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EngineError(f"The quantization_config's {key} must be a list of names; it is {shown(names)}.")
    return names


def order_of(group_of: Tensor, linear: StoredLinear) -> Tensor | None:
    """i64 [K]: the features in order of their groups, of act-order's group of each; None = they are.

    Raises EngineError where a group does not have the config's size.
    """
    size = linear.scheme.group or linear.k
    wanted = torch.arange(linear.k) // size
    if torch.equal(group_of.long(), wanted):
        return None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of.long()[order], wanted):
        raise EngineError(
            f"{linear.name}'s groups of input features are not {linear.groups} groups of {size}, as the "
            "config says."
        )
    return order


def in_order(q: Tensor, order: Tensor | None, kind: str) -> Tensor:
    """Canonical codes [N, K] (or two a byte) with their columns in this order."""
    if order is None:
        return q
    out = torch.empty_like(q)
    for codes, part in zip(q.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
        part.copy_(packed(unpacked(codes)[:, order]) if kind in PACKED else codes[:, order])
    return out


def as_codes(words: Tensor, bits: int) -> Tensor:
    """Integers in 32-bit words [N, W], the lowest bits first, as canonical codes.

    Four bits: uint8 [N, 4 W], two a byte. Eight: int8 [N, 4 W], of codes that are around 128.
    """
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 4 else (octets ^ 128).view(torch.int8)


def zero_codes(words: Tensor, bits: int) -> Tensor:
    """Zero points [A, B] in 32-bit words along B, as canonical ones: uint8, or int8 of eight bits."""
    codes = as_codes(words, bits)
    return unpacked(codes) if bits == 4 else codes


def _by_linear(names: Iterable[str]) -> Mapping[str, set[str]]:
    """Linear -> what follows its name in the checkpoint's tensors."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        linear, _, suffix = name.rpartition(".")
        found[linear].add(suffix)
    return found


def _linear(source: str) -> str:
    return source.removesuffix(".weight")


def with_own_rows(weight: Weight) -> Weight:
    """The same numbers, a scale a row."""
    size, scale = weight.scheme.group_n, weight.scale
    if size == 1 or scale is None:
        return weight
    scheme = replace(weight.scheme, group_n=1)
    return replace(weight, scheme=scheme, scale=scale.repeat_interleave(size, 0)[: weight.n])


def _owned(weight: Weight, device: torch.device, *, copy_all: bool) -> Weight:
    """The weight on `device`, with no tensor left that is mapped from a file.

    copy_all: False = what was joined of several parts is no file's any more.
    """

    def own(tensor: Tensor, *, shared: bool = copy_all) -> Tensor:
        return tensor.to(device, copy=shared).contiguous()

    def own_if_any(tensor: Tensor | None, *, shared: bool = copy_all) -> Tensor | None:
        return None if tensor is None else own(tensor, shared=shared)

    return Weight(
        weight.scheme,
        own(weight.q),
        own_if_any(weight.scale),
        own_if_any(weight.zero),
        own_if_any(weight.row_scale),
        own_if_any(weight.order, shared=True),
        own_if_any(weight.input_scale, shared=True),
    )


def _check_numbers(weight: Weight, name: str) -> None:
    """Raises EngineError where a code or a scale is NaN or infinite."""
    for codes in _float_codes(weight):
        if codes.dtype == FP8:
            damaged = bool(((codes.view(torch.uint8) & 127) == NAN_CODE).any())
        elif codes.dtype == torch.uint8:
            damaged = bool((codes == NAN_EXPONENT).any())
        else:
            damaged = not bool(torch.stack(codes.aminmax()).isfinite().all())
        if damaged:
            raise EngineError(f"{name} has a weight or scale that is NaN or infinite; it is damaged.")


def _float_codes(weight: Weight) -> Iterator[Tensor]:
    if weight.q.dtype == FP8:
        yield from weight.q.split(ROWS_AT_ONCE)
    if weight.scale is not None:
        yield weight.scale
    if weight.row_scale is not None:
        yield weight.row_scale
