"""What quantization costs in answers: a model beside the same one unquantized, forced through one text.

The unquantized model predicts first, and all its logits go to a file, whole: so the two models are never on
the device together, and divergences are over the full vocabulary, exact but for the rounding of fp64. Both
are computed by the same backend, as it serves them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backbench.engine.calibration.samples import Sample, sample_of
from backbench.engine.calibration.wanda import calibrated
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.perplexity import predictions
from backbench.errors import HarnessError
from backbench.harness.memory import give_back
from backbench.reports.metrics.accuracy import SUMS, summarised

if TYPE_CHECKING:
    from backbench.backends.interface import Device
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.decoder import Decoder

TOKENS = 2048
"""Of a run's sample: a second or two of the bundled model on a CPU."""
LENGTH = 128
"""Of a sequence: sixteen of them show how much they differ."""
FEWEST_SEQUENCES = 4
CPU_FLOPS = 2e11
"""What one pass over the sample may cost on a CPU, some seconds; larger models get fewer sequences."""


@dataclass(frozen=True)
class Setting:
    """How both models are computed."""

    backend: str
    device: Device
    dtype: torch.dtype
    overrides: Mapping[str, str]
    length: int
    """Tokens of the longest sequence."""

    def open(self, source: ModelSource, **own: Any) -> Engine:
        """The model, without a KV pool to speak of; `own`: the engine's settings that change it."""
        config = EngineConfig(
            max_seqs=1, max_len=self.length, max_step_tokens=self.length, num_blocks=1, graphs=False, **own
        )
        return Engine.open(
            calibrated(source, config, self.device),
            backend=self.backend,
            device=self.device,
            dtype=self.dtype,
            config=config,
            overrides=self.overrides,
        )


class Unquantized:
    """What the unquantized model predicts of a sample: a file of logits, gone when this is closed."""

    def __init__(self, decoder: Decoder, sample: Sample, name: str = "") -> None:
        """Forces `decoder` through the sample; nothing of it is held afterwards. `name`: the model's."""
        self.name = name
        self.sample = sample
        self.weights_bytes = decoder.weights.num_bytes
        self._logits = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        try:
            for ids in sample.sequences:
                for logits, _ in predictions(decoder, ids):
                    self._logits.write(logits.cpu().numpy().data)
        except OSError as error:
            self.close()
            raise HarnessError(
                f"The unquantized model's logits do not fit {tempfile.gettempdir()}: {error.strerror}; free "
                "some space there, name another folder in TMPDIR, or ask for fewer tokens."
            ) from error

    def compare(self, decoder: Decoder) -> dict[str, list[float]]:
        """`SUMS` of each sequence, `decoder` being the quantized model."""
        self._logits.seek(0)
        found: dict[str, list[float]] = {name: [] for name in SUMS}
        for ids in self.sample.sequences:
            total = torch.zeros(len(SUMS), dtype=torch.float64)
            for logits, following in predictions(decoder, ids):
                was = self._next(*logits.shape).to(logits.device)
                total += sums(was, logits, following).cpu()
            for name, value in zip(SUMS, total.tolist(), strict=True):
                found[name].append(value)
        counts = ("tokens", "top1_agreements")
        return found | {name: [int(each) for each in found[name]] for name in counts}

    def close(self) -> None:
        self._logits.close()

    def __enter__(self) -> Unquantized:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, rows: int, vocabulary: int) -> Tensor:
        read = np.empty((rows, vocabulary), np.float32)
        self._logits.readinto(read.data)
        return torch.from_numpy(read)


@torch.inference_mode()
def sums(was: Tensor, now: Tensor, following: Tensor) -> Tensor:
    """`SUMS` f64 of logits [rows, vocabulary] of the unquantized model and of the quantized one, and of the
    tokens i64[rows] that they predict.

    KL(P || Q) = sum of P log(P / Q), P being the unquantized model's distribution (Kullback & Leibler 1951).
    """
    unquantized, quantized = was.double().log_softmax(-1), now.double().log_softmax(-1)
    return torch.stack(
        (
            torch.tensor(len(following), dtype=torch.float64, device=now.device),
            functional.nll_loss(quantized, following, reduction="sum"),
            functional.nll_loss(unquantized, following, reduction="sum"),
            functional.kl_div(quantized, unquantized, reduction="sum", log_target=True),
            (was.argmax(-1) == now.argmax(-1)).sum().double(),
        )
    )


def require_alike(source: ModelSource, original: ModelSource) -> None:
    """Raises HarnessError unless `original` can be what `source` was before it was quantized."""
    if (kept := original.config.quantization) is not None:
        raise HarnessError(f"--against {original.name} is quantized itself ({kept}); name a dense model.")
    for what in ("vocab_size", "hidden_size", "num_layers"):
        have, other = getattr(source.config, what), getattr(original.config, what)
        if have != other:
            raise HarnessError(
                f"--against {original.name} has a {what} of {other}, and {source.name} one of {have}; it is "
                "not the same model."
            )


def too_large(original: ModelSource, setting: Setting) -> str | None:
    """Why the device cannot hold the unquantized model; None where it can."""
    needed, has = original.config.num_parameters * setting.dtype.itemsize, setting.device.memory_bytes
    if needed <= has:
        return None
    return f"{original.name} takes {needed / 2**30:.1f} GiB unquantized, and the device has {has / 2**30:.1f}"


def predicted(original: ModelSource, setting: Setting, text: str | None, tokens: int) -> Unquantized:
    """Load the unquantized model, have it predict about `tokens` tokens, and let go of it.

    text: as for `sample_of`; None = "topics", or "sampled" where the model has no tokenizer.
    """
    device = setting.device
    engine = setting.open(original)
    if text is None:
        text = "topics" if original.has_tokenizer else "sampled"
    limit = max(1, tokens // setting.length)
    sample = sample_of(original, engine.weights, device, text, length=setting.length, limit=limit)
    found = Unquantized(engine.decoder, sample, original.name)
    del engine
    free(device)
    return found


def affordable(original: ModelSource, on_cpu: bool, length: int) -> int:
    """Tokens of a run's sample: `TOKENS`, and on a CPU no more than take some seconds."""
    if not on_cpu:
        return TOKENS
    tokens = int(CPU_FLOPS / original.config.flops_per_token(length // 2))
    return min(TOKENS, max(FEWEST_SEQUENCES * length, tokens))


def free(device: Device) -> None:
    """Give what nobody holds any more back to the device and the system."""
    give_back()
    if device.torch_device.type != "cpu":
        torch.cuda.empty_cache()


def section(unquantized: Unquantized, decoder: Decoder) -> dict[str, Any]:
    """The record's `accuracy` section of the quantized model that `decoder` computes."""
    sample = unquantized.sample
    sequences = unquantized.compare(decoder)
    return {
        "corpus": sample.source,
        "corpus_sha256": sample.sha256,
        "against": unquantized.name,
        "sequences": sequences,
    } | summarised(sequences)
