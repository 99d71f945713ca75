"""Writing a quantized checkpoint in compressed-tensors, layer by layer, beside its place and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backbench.backends.interface import Device, Scheme, Weight
from backbench.engine.calibration.awq import best_scale, fold_into_norm, rescale_layer
from backbench.engine.calibration.inputs import InputStatistics, LayerByLayer
from backbench.engine.calibration.recipe import Recipe, whole
from backbench.engine.models.checkpoint import HUB_FILES, DirectorySource
from backbench.engine.models.formats import INDEX, SINGLE
from backbench.engine.models.formats.compressed_tensors import settings_for, stored
from backbench.engine.models.formats.dense import SafetensorsFiles
from backbench.engine.models.layers import LayerSpec, ModelSpec, Product, TensorSpec
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.weights import LayerWeights, filled
from backbench.errors import EngineError

SHARD_BYTES = 4 * 2**30
"""Of tensors that are gathered before a file of them is written."""
MADE = "quantize.json"
"""How the checkpoint was made."""
KEPT = (*HUB_FILES, "*.jinja", "LICENSE*")
"""Of the dense checkpoint's files, what is copied beside the weights."""
WRITTEN = ("config.json", INDEX, MADE)
Progress = Callable[[str], None]


@dataclass
class Shards:
    """Tensors on their way into the weight files of a directory."""

    folder: Path
    limit: int = SHARD_BYTES
    waiting: dict[str, Tensor] = field(default_factory=dict)
    file_of: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    """Of all tensors added."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Have `tensor` in a file; it is copied to the CPU."""
        self.waiting[name] = tensor.detach().to("cpu").contiguous().clone()
        self.num_bytes += tensor.nbytes
        if sum(each.nbytes for each in self.waiting.values()) >= self.limit:
            self._write()

    def finish(self) -> None:
        """Write what waits, and name the files by their number as transformers does."""
        self._write()
        count = max(self.file_of.values()) + 1
        names = (
            [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        for index, name in enumerate(names):
            self._file(index).rename(self.folder / name)
        if count > 1:
            weight_map = {name: names[index] for name, index in self.file_of.items()}
            index_json = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index_json, indent=2) + "\n")

    def _write(self) -> None:
        if self.waiting:
            index = max(self.file_of.values(), default=-1) + 1
            save_file(self.waiting, self._file(index), metadata={"format": "pt"})
            shutil.copymode(self.folder, self._file(index))  # the library's own is for its owner alone
            self._file(index).chmod(self._file(index).stat().st_mode & ~0o111)
            self.file_of |= dict.fromkeys(self.waiting, index)
            self.waiting = {}

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index}"


@dataclass
class Writer:
    """One checkpoint while it is made of another."""

    source: DirectorySource
    recipe: Recipe
    device: Device
    files: SafetensorsFiles
    shards: Shards
    spec: ModelSpec
    """The dense model with its products in the recipe's scheme."""

    @property
    def dtype(self) -> torch.dtype:
        """What is not quantized is stored in, and scales that are floats."""
        return self.source.config.dtype

    def write(self, sequences: Sequence[Sequence[int]], progress: Progress) -> None:
        """Every tensor. sequences: token ids to calibrate on; none = nothing is calibrated."""
        embedding = self._read(self.spec.embedding)
        walk = None
        if sequences:
            walk = LayerByLayer(self.source.config, self.device, embedding, sequences)
        self._keep(self.spec.embedding, embedding)
        for index, layer in enumerate(self.spec.layers):
            self._layer(index, layer, walk)
            progress(f"layer {index + 1} of {len(self.spec.layers)}")
        self._head(embedding, walk)
        self.shards.finish()

    def _layer(self, index: int, spec: LayerSpec, walk: LayerByLayer | None) -> None:
        layer = LayerWeights(**{each.role: self._dense(each) for each in spec.tensors})
        found: Mapping[str, InputStatistics] = walk.observe(index, layer) if walk else {}
        for product in spec.products:
            dense = getattr(layer, product.role).q
            pruned = self.recipe.prune_weight(dense, found.get(product.role))
            setattr(layer, product.role, Weight(Scheme(), pruned))
        if self.recipe.method == "awq":
            rounds = {product.role: self._nearest(product) for product in spec.products}
            rescale_layer(layer, found, spec.attention, rounds, self.dtype)
        for tensor in spec.tensors:
            held = getattr(layer, tensor.role)
            if isinstance(tensor, Product):
                setattr(layer, tensor.role, self._product(tensor, held.q, found.get(tensor.role)))
            else:
                self._keep(tensor, held)
        if walk:
            walk.advance(index, layer)

    def _head(self, embedding: Tensor, walk: LayerByLayer | None) -> None:
        head, norm = self.spec.head, self._read(self.spec.final_norm)
        if not self.recipe.head:
            self._keep(self.spec.final_norm, norm)
            if not self.spec.tied:
                self._keep(head, self._read(head))
            return
        statistics = walk.observe_head(norm) if walk else None
        dense = embedding.clone() if self.spec.tied else self._read(head)
        dense = self.recipe.prune_weight(dense, statistics)
        if self.recipe.method == "awq":
            assert statistics is not None
            scale = best_scale(dense, statistics.mean_magnitude, statistics.gram, self._nearest(head))
            norm = fold_into_norm(norm, dense, scale, self.dtype)
        self._keep(self.spec.final_norm, norm)
        self._product(head, dense, statistics)

    def _product(self, product: Product, dense: Tensor, statistics: InputStatistics | None) -> Weight:
        """Write a product; what it is in its scheme."""
        if not product.scheme.quantized:
            rounded = dense.to(self.dtype)
            self._keep(product, rounded)
            return Weight(Scheme(), rounded.float())
        parts = self.recipe.round(product, dense, self.dtype, statistics)
        for (name, _), part in zip(product.sources, parts, strict=True):
            for suffix, tensor in stored(part).items():
                self.shards.add(f"{name.removesuffix('weight')}{suffix}", tensor)
        return whole(parts)

    def _nearest(self, product: Product) -> Callable[[Tensor], Weight]:
        return partial(self._rounded, product)

    def _rounded(self, product: Product, dense: Tensor) -> Weight:
        return whole(self.recipe.round_to_nearest(product, dense, self.dtype))

    def _read(self, wanted: TensorSpec) -> Tensor:
        return filled(wanted, self.device.torch_device, torch.float32, self.files.fill)

    def _dense(self, wanted: TensorSpec) -> Any:
        tensor = self._read(wanted)
        return Weight(Scheme(), tensor) if isinstance(wanted, Product) else tensor

    def _keep(self, wanted: TensorSpec, tensor: Tensor) -> None:
        """Store a tensor unquantized, under the names of its sources."""
        rows = [size for _, size in wanted.sources]
        for (name, _), part in zip(wanted.sources, tensor.split(rows), strict=True):
            self.shards.add(name, part.to(self.dtype))


def write_quantized(
    source: DirectorySource,
    out: Path,
    recipe: Recipe,
    device: Device,
    *,
    sequences: Sequence[Sequence[int]] = (),
    made: Mapping[str, Any] | None = None,
    progress: Progress = lambda text: None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the model in the recipe's scheme to the directory `out`, which must be new or empty; its bytes.

    At most one layer is held dense, in fp32, beside the embedding and a file's worth of what is written.

    Args:
        sequences: token ids to calibrate on; used only where the recipe is calibrated.
        made: what `quantize.json` says of where the checkpoint came from.

    Raises:
        EngineError: the model is quantized already or does not divide into groups, or `out` is not empty.
    """
    spec = check(source, recipe)
    if recipe.calibrated and not sequences:
        raise EngineError("This recipe is calibrated; give token sequences.")
    with renamed_when_done(out) as folder, SafetensorsFiles(source.path) as files:
        shards = Shards(folder, shard_bytes)
        with torch.inference_mode():
            Writer(source, recipe, device, files, shards, spec).write(
                sequences if recipe.calibrated else (), progress
            )
        _write_config(source, recipe, folder)
        for pattern in KEPT:
            for file in sorted(source.path.glob(pattern)):
                if file.is_file() and file.name not in WRITTEN:
                    shutil.copyfile(file, folder / file.name)
        (folder / MADE).write_text(json.dumps(made or {}, indent=2) + "\n")
    return shards.num_bytes


def check(source: DirectorySource, recipe: Recipe) -> ModelSpec:
    """The model's tensors as the recipe keeps them.

    Raises:
        EngineError: the model is quantized already, or a product does not divide into groups.
    """
    if kept := source.config.quantization:
        raise EngineError(f"{source.name} is quantized already ({kept}); give the dense model.")
    return OnTheFly(recipe.scheme, recipe.head).put_on(source.config.spec)


def require_new(out: Path) -> None:
    """Raises EngineError where `out` is there and is not an empty directory."""
    if out.is_dir():
        if any(out.iterdir()):
            raise EngineError(f"{out} is not empty; give a new directory.")
    elif out.exists() or out.is_symlink():
        raise EngineError(f"{out} is there and is no directory; give a new one.")


@contextmanager
def renamed_when_done(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name at the end; after an error nothing of it is left."""
    require_new(out)
    out = out.absolute()
    folder = out.parent / f".{out.name}.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _write_config(source: DirectorySource, recipe: Recipe, folder: Path) -> None:
    config = dict(source.hf_config)
    # A head of its own scheme is not the embedding any more.
    config["tie_word_embeddings"] = source.config.tied_embeddings and not recipe.head
    if recipe.scheme.quantized:
        config["quantization_config"] = settings_for(recipe.scheme, head=recipe.head)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
