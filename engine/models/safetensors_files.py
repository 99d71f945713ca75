"""Reading tensors by name from a directory of safetensors files, one file or several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbench.errors import EngineError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SafetensorsFiles:
    """A checkpoint's tensors. Files are mapped, so a tensor is read only when it is copied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._file_of = self._read_index()

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def copy_into(self, name: str, target: Tensor) -> None:
        """Copy tensor `name` into `target` (its shape, any dtype and device).

        Raises:
            EngineError: the tensor is missing, has another shape or no float dtype, or cannot be read.
        """
        file = self._file_of.get(name)
        if file is None:
            raise EngineError(
                f"The checkpoint {self.folder} lacks tensor {name}; it is not the model it says."
            )
        try:
            handle = self._handle(file)
            shape = tuple(handle.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise EngineError(
                    f"Tensor {name} in {self.folder / file} has shape {list(shape)}; "
                    f"the config asks for {list(target.shape)}."
                )
            tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"Tensor {name}: {self.folder / file} is missing, truncated or damaged ({error})."
            ) from error
        if tensor.dtype not in DTYPES:
            raise EngineError(
                f"Tensor {name} in {self.folder / file} is {tensor.dtype}, not a served float type."
            )
        target.copy_(tensor)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            handle = safe_open(self.folder / file, framework="pt", device="cpu")
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name, from the index of a sharded checkpoint or the single file's header."""
        index = self.folder / INDEX
        try:
            if index.exists():
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            if (self.folder / SINGLE).exists():
                return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        except SafetensorError as error:
            raise EngineError(f"{self.folder / SINGLE} is truncated or damaged ({error}).") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{index} cannot be read: {error}") from error
        raise EngineError(f"{self.folder} holds no {SINGLE} and no {INDEX}; only safetensors are served.")
