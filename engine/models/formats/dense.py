"""Dense weights in safetensors: one file, or several with an index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbench.engine.models.formats import INDEX, SINGLE, WeightFormat, has_weight_files, method_of
from backbench.engine.models.hf_config import read_json
from backbench.engine.models.layers import WHOLE, ModelSpec, Shard, TensorSpec
from backbench.engine.models.weights import Weights, build
from backbench.errors import EngineError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsFormat(WeightFormat):
    """What every format in safetensors has in common; config.json's `quant_method` tells them apart."""

    def recognises(self, folder: Path) -> bool:
        return has_weight_files(folder) and method_of(folder) == self.method

    def names(self, folder: Path) -> frozenset[str]:
        with SafetensorsFiles(folder) as files:
            return frozenset(files.file_of)

    def differ(self, folder: Path, one: str, other: str) -> bool:
        with SafetensorsFiles(folder) as files:
            return not torch.equal(files.read(one), files.read(other))


class DenseFormat(SafetensorsFormat):
    """Tensors in fp32, bf16 or fp16 under their names in transformers."""

    def load(
        self,
        folder: Path,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard = WHOLE,
    ) -> Weights:
        with SafetensorsFiles(folder) as files:
            for tensor in spec.tensors():
                files.require_all(tensor)
            return build(spec, device, dtype, files.fill, shard=shard)


FORMAT = DenseFormat()


class SafetensorsFiles:
    """A checkpoint's tensors. Files are mapped, so a tensor is read only when it is copied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self.file_of = self._find()
        """Tensor name -> file name."""

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises EngineError where tensor `name` is missing or has another shape; only headers are read."""
        stored = self.shape(name)
        if stored != shape:
            file = self.folder / self.file_of[name]
            raise EngineError(
                f"Tensor {name} in {file} has shape {list(stored)}; the config asks for {list(shape)}."
            )

    def require_all(self, wanted: TensorSpec) -> None:
        """As `require`, of every stored tensor whose rows this one joins."""
        for name, rows in wanted.sources:
            self.require(name, (rows, *wanted.shape[1:]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`, from the header; raises EngineError where it is missing."""
        with self._reading(name) as (handle, _):
            return tuple(handle.get_slice(name).get_shape())

    def read(self, name: str, dtypes: tuple[torch.dtype, ...] | None = DTYPES) -> Tensor:
        """Tensor `name`, mapped from its file; dtypes: those it may have, None = any.

        Raises EngineError where it cannot be read or has another dtype.
        """
        with self._reading(name) as (handle, file):
            tensor: Tensor = handle.get_tensor(name)
        if dtypes is not None and tensor.dtype not in dtypes:
            wanted = "a served float type" if dtypes == DTYPES else " or ".join(map(short, dtypes))
            raise EngineError(f"Tensor {name} in {file} is {tensor.dtype}, not {wanted}.")
        return tensor

    def fill(self, wanted: TensorSpec, name: str, part: Tensor) -> None:
        """Copy tensor `name` into `part` (its shape, any dtype and device).

        Raises EngineError where it cannot be read, or holds NaN or infinity once it is in `part`'s dtype.
        """
        tensor = self.read(name)
        part.copy_(tensor)
        # The ends of the range are NaN where any element is, and take no memory, unlike isfinite's mask.
        if not torch.stack(part.aminmax()).isfinite().all():
            raise EngineError(
                f"Tensor {name} in {self.folder / self.file_of[name]} holds NaN or infinity in "
                f"{short(part.dtype)} (stored in {short(tensor.dtype)}); the checkpoint is damaged, "
                "or needs another --dtype."
            )

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[Any, Path]]:
        """The open file that holds tensor `name`, and its path; its errors become EngineErrors."""
        if name not in self.file_of:
            raise EngineError(
                f"The checkpoint {self.folder} lacks tensor {name}; it is not the model it says."
            )
        file = self.folder / self.file_of[name]
        try:
            yield self._handle(self.file_of[name]), file
        except (OSError, SafetensorError) as error:
            raise EngineError(f"Tensor {name}: {file} is missing, truncated or damaged ({error}).") from error

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            handle = safe_open(self.folder / file, framework="pt", device="cpu")
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]

    def _find(self) -> dict[str, str]:
        """Where each tensor lies, from the index of a sharded checkpoint or the single file's header."""
        if (self.folder / INDEX).exists():
            named = read_index(self.folder)
            if (self.folder / SINGLE).exists() and set(named.values()) != {SINGLE}:
                raise EngineError(
                    f"{self.folder} holds both {SINGLE} and an index of other files; remove one, "
                    "since they may be different weights."
                )
            return named
        try:
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{self.folder / SINGLE} is truncated or damaged ({error}).") from error


def weight_files(folder: Path) -> list[str]:
    """The files a checkpoint's weights are in, going by its index where it has one."""
    return sorted(set(read_index(folder).values())) if (folder / INDEX).exists() else [SINGLE]


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; raises EngineError where a file would lie outside of the folder."""
    index = folder / INDEX
    named = read_json(index, str(folder)).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise EngineError(f"{index} cannot be read: it has no weight_map of tensors to files.")
    for file in set(named.values()):
        path = PurePosixPath(file.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise EngineError(f"{index} names {file[:80]!r}, which is no safetensors file of this directory.")
    return named


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its library's."""
    return str(dtype).removeprefix("torch.")
