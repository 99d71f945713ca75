"""The reference engine as a subject, and as a replay's target in the same thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backbench.errors import HarnessError
from backbench.harness import accuracy, correctness, memory, provenance, sections
from backbench.harness.memory import Readings
from backbench.harness.options import RunOptions
from backbench.harness.peaks import measure_peaks
from backbench.harness.replay import Replay
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.present import describe_accelerator, open_sensors
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.subject import Facts, Limits
from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.roofline import ModelShape, Peaks
from backbench.workloads.request import Request, Workload

if TYPE_CHECKING:
    import torch

    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.layers import ModelSpec
    from backbench.engine.models.weights import Weights
    from backbench.engine.request import StepStats


CPU_REQUESTS = 48
"""Default number of requests on a CPU, where a run should take about a minute."""
GPU_REQUESTS = 512
CPU_CONCURRENCY = 16
GPU_CONCURRENCY = 64
CPU_STEP_TOKENS = 2048
"""Default token budget of a step on a CPU, where a larger one only makes decodes wait."""
ON_SEVERAL_DEVICES = "accuracy is measured on one device; run the same without --tp or --pp"
LONGEST_SLEEP_S = 0.05
"""An idle poll returns at least this often, so that Ctrl-C is answered."""


def model_shape(spec: ModelSpec, kv_dtype: torch.dtype, weights: Weights) -> ModelShape:
    """The shape of what a device computes, on `weights` and with a KV cache in `kv_dtype`. Where layers are
    divided, the first device has the last stage, and so the head."""
    from backbench.backends.interface import kv_bytes_per_token

    head, attention = spec.head.parameters, spec.layers[0].attention
    kv_bytes = sum(
        kv_bytes_per_token(each.attention.kv_heads, each.attention.head_dim, kv_dtype) for each in spec.layers
    )
    rounded = dict.fromkeys(held.scheme.activation for _, held in weights.products())
    return ModelShape(
        windows=[each.attention.window for each in spec.layers],
        q_heads=attention.q_heads,
        head_dim=attention.head_dim,
        linear_parameters=spec.linear_parameters - head,
        head_parameters=head,
        weight_bytes_per_step=weights.streamed_bytes,
        kv_bytes_per_token=kv_bytes,
        rounded_rows=", ".join(filter(None, rounded)) or None,
    )


class EngineTarget:
    """`submit` queues a request in the engine; `poll` runs one step and stamps its tokens."""

    def __init__(self, engine: Engine, beams: int = 1, length_penalty: float = 1.0) -> None:
        """beams: width of the beam search that answers each request; 1 = none."""
        self.engine = engine
        self._beams = beams
        self._length_penalty = length_penalty
        self.steps: list[StepStats] = []
        """Statistics of every step so far."""
        self._in_flight: set[int] = set()

    @property
    def running(self) -> int:
        return self.steps[-1].running if self.steps else 0

    @property
    def waiting(self) -> int:
        return self.steps[-1].waiting if self.steps else 0

    def submit(self, request: Request) -> int:
        """Queue the request. Raises EngineError where it can never be served."""
        from backbench.engine.request import SamplingParams

        params = SamplingParams(
            max_tokens=request.output_tokens,
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=True,
            beams=self._beams,
            length_penalty=self._length_penalty,
        )
        self.engine.add_request(str(request.id), request.prompt, params)
        self._in_flight.add(request.id)
        return time.perf_counter_ns()

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        """One engine step; without work, sleep until the deadline (at most 50 ms)."""
        if not self.engine.has_work:
            if deadline_ns is not None:
                time.sleep(min(max(0.0, (deadline_ns - time.perf_counter_ns()) / 1e9), LONGEST_SLEEP_S))
            return []
        try:
            tokens = self.engine.step()
            now_ns = time.perf_counter_ns()
        finally:
            self.steps.extend(self.engine.take_step_stats())
        ids: dict[int, list[int]] = {}
        ended: set[int] = set()
        for token in tokens:
            request_id = int(token.request_id)
            ids.setdefault(request_id, []).append(token.token_id)
            if token.finish_reason is not None:
                ended.add(request_id)
        self._in_flight -= ended
        return [
            TokenEvent(request_id, now_ns, len(seen), tuple(seen), request_id in ended)
            for request_id, seen in ids.items()
        ]

    def abort(self) -> None:
        """Drop everything in flight and what the engine still had to say about it."""
        for request_id in self._in_flight:
            self.engine.abort(str(request_id))
        self._in_flight.clear()
        while self.engine.has_work:
            self.engine.step()
        self.steps.extend(self.engine.take_step_stats())


class EngineSubject:
    """The reference engine in this process, with one backend."""

    def __init__(self, options: RunOptions) -> None:
        """Finds the device, the backends and the model; raises BackbenchError where one is not there."""
        from backbench.backends.interface.device import detect
        from backbench.backends.registry import load
        from backbench.engine.config import EngineConfig
        from backbench.engine.models.checkpoint import find_model
        from backbench.engine.models.on_the_fly import OnTheFly

        if options.interpret:
            # Triton reads this when kernels are decorated, so it is set before any backend is imported.
            os.environ["TRITON_INTERPRET"] = "1"
        self._options = options
        self.device = detect(interpret=options.interpret, prefer=options.device)
        self.on_cpu = self.device.torch_device.type == "cpu"
        self.config = EngineConfig(
            **({"max_step_tokens": CPU_STEP_TOKENS} if self.on_cpu else {})
            | options.engine
            | {"quantize": options.quantize}
        )
        for name in {options.backend, *options.overrides.values()} - {"auto"}:
            load(name)
        self.source = find_model(options.model)
        stored = self.source
        if (change := OnTheFly.asked(self.config)) is not None:
            self.source = self.source.on_the_fly(change)
            _ = self.source.config.spec  # what cannot be rounded is refused now
        self.source.config.spec.divided(self.config.tp)  # nor can everything be divided
        self._unquantized = self._original(stored)
        self._predicted: accuracy.Unquantized | None = None
        self.accelerator: dict[str, Any] = {}
        self.idle_bytes: int | None = None
        self.peaks = Peaks()
        self.warm_up_s = 0.0
        self._untouched = True
        """Nothing of ours is on the device yet."""
        self._engine: Engine | None = None

    def _original(self, stored: ModelSource) -> ModelSource | str:
        """The model as it was before it was quantized; or why it is not known what quantization costs."""
        from backbench.engine.models.checkpoint import find_model
        from backbench.engine.perplexity import file_corpus

        options = self._options
        quantized = self.source.config.quantization is not None
        if not quantized and self.config.kv_dtype is None:
            return "nothing is quantized"
        if self.config.num_devices > 1:
            return ON_SEVERAL_DEVICES
        if options.accuracy == "none" or not options.check:
            return "it was not asked for: --accuracy none, or --no-check"
        if options.accuracy not in (None, "topics", "sampled"):
            file_corpus(Path(options.accuracy))  # a text that cannot be read is refused now
        if options.interpret:
            return "Triton's interpreter is too slow for it"
        if options.against is not None:
            original = find_model(options.against)
            accuracy.require_alike(self.source, original)
            return original
        if stored.config.quantization is None:
            return stored
        return "the checkpoint is quantized already, and no --against names the unquantized model"

    @property
    def clock(self) -> Callable[[], int]:
        return time.perf_counter_ns

    @property
    def engine(self) -> Engine:
        """Opened by `prepare`."""
        assert self._engine is not None
        return self._engine

    def limits(self) -> Limits:
        model = self.source.config
        asked = self.config.max_len
        return Limits(
            vocab_size=model.vocab_size,
            max_len=model.max_len if asked is None else min(asked, model.max_len),
            num_requests=CPU_REQUESTS if self.on_cpu else GPU_REQUESTS,
            concurrency=CPU_CONCURRENCY if self.on_cpu else GPU_CONCURRENCY,
            tokenize=self._tokenize if self.source.has_tokenizer else None,
            tokenize_chat=self._tokenize_chat if self.source.has_tokenizer else None,
        )

    def _tokenize_chat(self, messages: list[dict[str, str]]) -> list[int] | None:
        if not self._tokenizer.chat_template:
            return None
        found = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(found)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    @cached_property
    def _tokenizer(self) -> Any:
        """Built when the first text comes: a workload of lengths needs none."""
        return self.source.tokenizer()

    def prepare(self, workload: Workload, stage: Callable[[str], None]) -> None:
        """What must be seen on an untouched device comes first: idle readings, then the device's peaks.

        The peaks are measured by copying GiBs, which the engine's pool would leave no room for.
        """
        from backbench.engine.engine import Engine

        options, dtype = self._options, self._dtype()
        if self._untouched:
            self._look(dtype, stage)
            self._untouched = False
        stage(f"Loading {options.model}")
        self._engine = Engine.open(
            self.source,
            backend=options.backend,
            device=self.device,
            dtype=dtype,
            config=self.config,
            overrides=options.overrides,
        )
        require_fit(workload, self.engine, options.beams)
        stage("Warming up")
        self.warm_up_s = warm_up(self.engine, workload, options.beams)

    def _look(self, dtype: torch.dtype, stage: Callable[[str], None]) -> None:
        """At the device before it holds a model, and at what the model is to be made of."""
        from backbench.engine.calibration.wanda import calibrated

        self.accelerator = describe_accelerator(self.device)
        self.idle_bytes = memory.idle_device_bytes(self.device, self.accelerator)
        self.peaks = measure_peaks(self.device, dtype)
        if not self.on_cpu and not isinstance(self._unquantized, str):
            stage(f"Predicting with {self._unquantized.name} unquantized")
            self._predict_unquantized(dtype)
        if self.config.sparsity_method == "wanda":
            stage("Calibrating")
            self.source = calibrated(self.source, self.config, self.device)

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    def _predict_unquantized(self, dtype: torch.dtype) -> None:
        """On a GPU before the engine takes its memory; on a CPU after the run, which owns the memory."""
        if isinstance(self._unquantized, str):
            return
        options, original, limits = self._options, self._unquantized, self.limits()
        length = min(accuracy.LENGTH, limits.max_len, self.config.max_step_tokens + self.config.max_seqs)
        setting = accuracy.Setting(options.backend, self.device, dtype, options.overrides, length)
        if (why := accuracy.too_large(original, setting)) is not None:
            self._unquantized = why
            return
        tokens = accuracy.affordable(original, self.on_cpu, length)
        self._predicted = accuracy.predicted(original, setting, options.accuracy, tokens)

    def _dtype(self) -> torch.dtype:
        import torch

        if self._options.dtype is not None:
            return cast("torch.dtype", getattr(torch, self._options.dtype))
        return torch.float32 if self.on_cpu else self.source.config.dtype

    def facts(self) -> Facts:
        engine = self.engine
        dtype = engine.decoder.dtype
        return Facts(
            model=self.source.describe() | {"dtype": str(dtype).removeprefix("torch.")},
            backend=sections.backend_section(self._options, engine),
            system=provenance.system(self.device, self.accelerator),
            warm_up_s=self.warm_up_s,
            batch_limit=engine.config.max_seqs,
            block_size=engine.pool.block_size,
            gpus=0 if self.device.vendor == "cpu" else self.config.num_devices,
            shape=asdict(model_shape(engine.decoder.spec, engine.decoder.kv_dtype, engine.weights)),
            peaks=asdict(self.peaks),
            idle_power_w=self.accelerator.get("idle_power_w"),
        )

    def settings(self) -> dict[str, Any]:
        options = self._options
        searched = {"beams": options.beams, "length_penalty": options.length_penalty}
        return self.engine.describe() | self._division() | (searched if options.beams > 1 else {})

    def _division(self) -> dict[str, Any]:
        """What the record says of how several devices share the model."""
        engine = self.engine
        if engine.ranks is None:
            return {}
        part = engine.ranks.part
        if part.pipe is None:
            return {"collectives": [way._asdict() for way in part.communicator.ways()]}
        stages = engine.model_config.spec.stage_layers(engine.config.pp)
        return {"stage_layers": [len(each) for each in stages], "stages_served_by": part.pipe.served_by}

    def sensors(self) -> tuple[list[Sensor], list[str]]:
        first = self.device.torch_device.index or 0
        sensors, reasons = open_sensors(self.device.vendor, first)
        for index in range(first + 1, first + (1 if self.on_cpu else self.config.num_devices)):
            more, why = open_sensors(self.device.vendor, index)
            sensors += [each for each in more if not isinstance(each, HostSensor)]
            reasons += why
        return sensors, reasons

    def start(self) -> EngineTarget:
        self.engine.reset_prefix_cache()
        self.engine.take_step_stats()
        self.engine.reset_counts()
        memory.reset_peaks(self.device)
        if self.engine.ranks is not None:
            self.engine.ranks.reset_peaks()
        return EngineTarget(self.engine, self._options.beams, self._options.length_penalty)

    def finish(self, done: Replay, stage: Callable[[str], None]) -> dict[str, Any]:
        """The engine stays for the check of results; its steps and settings say the rest."""
        return {}

    def memory(self, reachable: bool = True) -> Readings:
        readings = Readings(
            **self.engine.memory(),
            capacity_bytes=self.device.memory_bytes,
            on_device=not self.on_cpu,
            device_idle_bytes=self.idle_bytes,
            devices=self.engine.memory_by_device() if reachable else [],
        )
        if self.on_cpu or not reachable:
            return readings
        return memory.with_device(readings, self.device, sampled="idle_memory_bytes" in self.accelerator)

    def check(self, workload: Workload) -> dict[str, Any]:
        found = correctness.check(self.engine, self.source, correctness.longest_context(workload))
        if self.engine.ranks is not None:
            self.engine.close()  # as the check has, for the whole model to have its place
            self._engine = None
        return found

    def accuracy(self) -> dict[str, Any]:
        if self.config.num_devices > 1:
            return {"reason": ON_SEVERAL_DEVICES}
        if self.on_cpu:
            self._predict_unquantized(self._dtype())
        if self._predicted is None:
            return {"reason": self._unquantized}
        with self._predicted:
            return accuracy.section(self._predicted, self.engine.decoder)


def warm_up(engine: Engine, workload: Workload, beams: int) -> float:
    """Compile and capture what the workload's kinds of sampling need; returns the seconds it took."""
    from backbench.engine.request import SamplingParams

    kinds = {float(request.temperature > 0) for request in workload.requests}
    return sum(engine.warm_up(SamplingParams(temperature=kind, beams=beams)) for kind in sorted(kinds))


def require_fit(workload: Workload, engine: Engine, beams: int = 1) -> None:
    """HarnessError when a request can never be served: better now than in the middle of a run."""
    config = engine.config
    assert config.max_len is not None and config.num_blocks is not None
    if beams > config.max_seqs:
        raise HarnessError(f"--beams {beams} needs as many sequences; raise --max-seqs {config.max_seqs}.")
    if beams > 1 and engine.speculator is not None:
        raise HarnessError("--beams and --speculate do not go together; give one of them.")
    if beams > 1 and any(request.temperature for request in workload.requests):
        raise HarnessError("--beams follows the most likely tokens; give --temperature 0.")
    for request in workload.requests:
        length = len(request.prompt) + request.output_tokens
        if length > config.max_len:
            raise HarnessError(
                f"Request {request.id} needs {len(request.prompt)} prompt + {request.output_tokens} output "
                f"tokens, more than the context of {config.max_len}; raise --max-len."
            )
        blocks = beams * -(-length // engine.pool.block_size)
        if blocks > config.num_blocks:
            raise HarnessError(
                f"Request {request.id} needs {blocks} KV blocks and the pool has {config.num_blocks}; "
                "raise --num-blocks or choose shorter requests."
            )
