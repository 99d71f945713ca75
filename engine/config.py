"""Every setting of the engine, in one frozen object that goes into the record."""

from __future__ import annotations

import re
from dataclasses import dataclass

from backbench.engine.speculation.asked import Speculation, parse_speculation
from backbench.errors import EngineError
from backbench.options import option, settle

MOST_TOKENS = 2**24
"""Bound on a context and on the blocks of a pool: far above any model, and its products fit 64 bits."""
MOST_STEP_TOKENS = 2**20
MOST_STAGES = 8
"""Of a pipeline: as many steps are under way at once."""


SCHEMES = ("none", "int8", "int8-w8a8", "fp8", "fp8-block", "int4-g128", "int4-g32", "nvfp4", "mxfp4")
"""What `--quantize` takes: "none", and the names of `backends.quantization.SCHEMES`, which imports torch."""


def parse_sparsity(given: object) -> str:
    """Read "2:4" or "unstructured:0.7"; raises EngineError where it is neither."""
    name, _, share = str(given).partition(":")
    if given == "2:4" or (name == "unstructured" and _SHARE.fullmatch(share)):
        return str(given)
    raise EngineError(f"--sparsity takes 2:4 or unstructured:SHARE, such as unstructured:0.7; not {given!r}.")


_SHARE = re.compile(r"0?\.[0-9]{0,6}[1-9]")


def _checked_speculation(given: object) -> str:
    """The text as given; raises EngineError where `parse_speculation` does."""
    parse_speculation(given)
    return str(given)


@dataclass(frozen=True)
class EngineConfig:
    """Limits and switches of one engine. None = decided from the model and the device at start."""

    quantize: str | None = option(
        None,
        "How a dense model's weights are rounded while they are loaded.",
        choices={each: each for each in SCHEMES},
    )
    quantize_head: bool = option(
        False,
        "Round or prune the output head, too; a tied one gets a copy of its own.",
        group="subject",
    )
    sparsity: str | None = option(
        None,
        "Zeros among a dense model's weights: two of each four, kept compressed unless they are rounded, "
        "or a share of every row.",
        group="subject",
        metavar="2:4|unstructured:P",
        read=parse_sparsity,
    )
    sparsity_method: str | None = option(
        None,
        "Which weights become zeros: the smallest, or the smallest times the norm of their inputs (Wanda).",
        group="subject",
        unset="magnitude",
        metavar="magnitude|wanda",
        choices={"magnitude": "magnitude", "wanda": "wanda"},
    )
    calibrate: str | None = option(
        None,
        "Text that Wanda measures inputs on: drawn from the model itself, `topics` (English prose in "
        "every CPython) or a UTF-8 file.",
        group="subject",
        unset="self",
        metavar="self|topics|FILE",
    )

    kv_dtype: str | None = option(
        None,
        "Of the KV cache: fp8 rounds keys and values in their own scale, int8 with a scale for each token "
        "and KV head.",
        group="subject",
        unset="that of weights and activations",
        metavar="fp8|int8",
        choices={"fp8": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn", "int8": "int8"},
    )
    block_size: int | None = option(
        None,
        "Tokens a KV block holds. It does not depend on the backend: kernels are compared on one KV layout.",
        group="engine",
        unset="64 on a GPU, where kernels read longer runs, 16 on a CPU",
        minimum=1,
        maximum=4096,
    )
    num_blocks: int | None = option(
        None,
        "KV blocks in the pool.",
        group="engine",
        unset="what the device's memory holds",
        minimum=1,
        maximum=MOST_TOKENS,
    )
    kv_memory_fraction: float = option(
        0.9,
        "Share of the device's memory the engine may take.",
        group="engine",
        metavar="P",
        minimum=0.01,
        maximum=1,
    )
    max_seqs: int = option(256, "Sequences that may run at once.", group="engine", minimum=1, maximum=2**16)
    max_step_tokens: int = option(
        8192,
        "Prompt tokens of one step, at most. Decodes, a token each, come on top: no prompt makes them wait.",
        group="engine",
        unset="2048 on a CPU, 8192 on a GPU",
        also=("max_num_batched_tokens",),
        minimum=1,
        maximum=MOST_STEP_TOKENS,
    )
    max_len: int | None = option(
        None,
        "Longest prompt + output, in tokens.",
        group="engine",
        unset="the model's context",
        minimum=2,
        maximum=MOST_TOKENS,
    )
    prefill_chunk: int | None = option(
        None,
        "Most prompt tokens of one request in one step.",
        group="engine",
        unset="the step's budget",
        minimum=1,
        maximum=MOST_STEP_TOKENS,
    )
    prefix_cache: bool = option(True, "Reuse the KV blocks of prompts that start alike.", group="engine")
    graphs: bool = option(
        True,
        "Capture decodes, and steps with few prompt tokens, in device graphs where the backend allows it.",
        group="engine",
    )
    tp: int = option(
        1,
        "Devices that divide every layer among them (tensor parallel), from the chosen one on.",
        group="engine",
        metavar="N",
        also=("tensor_parallel_size",),
        minimum=1,
        maximum=64,
    )
    pp: int = option(
        1,
        "Devices that divide the layers among them (pipeline parallel), from the chosen one on; as many "
        "steps, each of a share of the running sequences, are under way at once.",
        group="engine",
        metavar="N",
        also=("pipeline_parallel_size",),
        minimum=1,
        maximum=MOST_STAGES,
    )
    overlap: bool = option(
        True, "Schedule and launch step N + 1 before reading step N's tokens.", group="engine"
    )

    speculate: str | None = option(
        None,
        "Draft up to K tokens of each sequence and verify them in one step: by looking its last tokens up in "
        "itself, by a smaller model, by an EAGLE-3 head over the model's hidden states, or with acceptance "
        "drawn at a mean LENGTH (speed alone, no accuracy).",
        group="engine",
        unset="no",
        metavar="ngram:K|draft:MODEL:K|eagle3:HEAD:K|synthetic:LENGTH:K",
        read=_checked_speculation,
    )
    adaptive_drafts: bool = option(
        True,
        "Draft fewer tokens, down to none, where measured times and acceptance say that more do not pay.",
        group="engine",
    )
    speculation_sampling: str = option(
        "exact",
        "How drafts are accepted: exact keeps the tokens of plain decoding, rejection their distribution.",
        group="engine",
        choices={"exact": "exact", "rejection": "rejection"},
    )

    def __post_init__(self) -> None:
        settle(self, EngineError)
        if self.pp > 1 and self.tp > 1:
            raise EngineError("--tp and --pp divide a model in two ways; give one of them.")
        if self.pp > 1 and self.speculate is not None:
            raise EngineError("--speculate and --pp do not go together; give one of them.")

    @property
    def num_devices(self) -> int:
        """How many share the model."""
        return self.tp * self.pp

    @property
    def speculation(self) -> Speculation | None:
        """What `speculate` asks for; None = nothing. Raises EngineError where the sampling needs more."""
        asked = None if self.speculate is None else parse_speculation(self.speculate)
        if self.speculation_sampling == "rejection" and (asked is None or not asked.accurate):
            raise EngineError(
                "--speculation-sampling rejection needs drafts; add --speculate ngram:K, draft:MODEL:K or "
                "eagle3:HEAD:K."
            )
        if self.tp > 1 and asked is not None and asked.proposer == "eagle3":
            raise EngineError(
                "A head drafts from hidden states, which lie on every device with --tp; use --speculate "
                "ngram:K or draft:MODEL:K there."
            )
        if self.tp > 1 and self.speculation_sampling == "rejection":
            raise EngineError(
                "Over several devices every rank draws all tokens from the same noise: with --tp leave out "
                "--speculation-sampling rejection."
            )
        return asked
