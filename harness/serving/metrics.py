"""Counters and histograms of a server, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from backbench.engine.async_engine import StepReport
from backbench.engine.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OWN, VLLM = "backbench", "vllm"
"""Prefixes of names. vLLM's is for dashboards and clients that look for its names."""
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Upper bounds of the buckets that times fall in."""
TOKENS = tuple(float(2**power) for power in range(15))
"""Upper bounds of the buckets that tokens of a step fall in."""


class Counter:
    """A total that only grows, apart by one label where it has one."""

    kind = "counter"

    def __init__(self, name: str, help: str, label: str = "", values: Sequence[str] = ("",)) -> None:
        """values: those of the label that are shown before they occur."""
        self.name = f"{name}_total"
        self.help = help
        self._label = label
        self._totals = dict.fromkeys(values, 0)

    def add(self, amount: int = 1, value: str = "") -> None:
        """Count `amount` more."""
        self._totals[value] = self._totals.get(value, 0) + amount

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """(name's end, labels, value) of each line."""
        for value, total in self._totals.items():
            yield "", ({self._label: value} if self._label else {}), total


class Gauge:
    """What holds at the moment of asking."""

    kind = "gauge"

    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.name = name
        self.help = help
        self._read = read

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """(name's end, labels, value) of each line."""
        yield "", {}, self._read()


class Histogram:
    """How often values lay below each bound."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name = name
        self.help = help
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """(name's end, labels, value) of each line."""
        below = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            yield "_bucket", {"le": bound}, below
        yield "_sum", {}, self._sum
        yield "_count", {}, below


class DraftCounters:
    """What became of drafts, under the names that vLLM has for it."""

    def __init__(self, most: int) -> None:
        """most: tokens of a draft."""
        self._drafts = Counter("spec_decode_num_drafts", "Drafts that were verified.")
        self._drafted = Counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = Counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self._accepted_at = Counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place in the draft.",
            "position",
            [str(place) for place in range(most)],
        )
        self.all = (self._drafts, self._drafted, self._accepted, self._accepted_at)

    def observe(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens was verified."""
        self._drafts.add()
        self._drafted.add(drafted)
        self._accepted.add(accepted)
        for place in range(accepted):
            self._accepted_at.add(value=str(place))


@dataclass
class _Live:
    """A request that is being served. Times are `time.perf_counter_ns`."""

    arrived_ns: int
    prompt_len: int
    unfinished: int
    """Sequences that have not ended."""
    started_ns: int | None = None
    first_ns: dict[int, int] = field(default_factory=dict)
    """By sequence: when its first token could be sent."""
    last_ns: dict[int, int] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)


class ServingMetrics:
    """What a server has done; all calls come from its event loop."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._model_name = model_name
        self._live: dict[str, _Live] = {}
        pool, scheduler = engine.pool, engine.scheduler
        reasons = ("stop", "length", "abort")
        self._prompt_tokens = Counter("prompt_tokens", "Prompt tokens of requests that started.")
        self._generation_tokens = Counter("generation_tokens", "Output tokens.")
        self._success = Counter("request_success", "Requests that ended.", "finished_reason", reasons)
        self._refused = Counter("request_refused", "Requests answered 429: the queue was full.")
        self._preemptions = Counter("num_preemptions", "Sequences that gave up their blocks for others.")
        self._queries = Counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.")
        self._hits = Counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._ttft = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token being sent."
        )
        self._itl = Histogram("inter_token_latency_seconds", "Between two tokens of a sequence.")
        self._tpot = Histogram(
            "request_time_per_output_token_seconds", "Of a sequence: from its first token to its last, a gap."
        )
        self._e2e = Histogram("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._queued = Histogram("request_queue_time_seconds", "From a request's arrival to its first step.")
        self._prefill = Histogram("request_prefill_time_seconds", "From its first step to its first token.")
        self._decode = Histogram("request_decode_time_seconds", "From its first token to its last.")
        self._iteration = Histogram("iteration_tokens_total", "Tokens computed in a step.", TOKENS)
        self._drafts = DraftCounters(engine.limits.draft_tokens)
        self.all: tuple[Counter | Gauge | Histogram, ...] = (
            Gauge("num_requests_running", "Sequences in the batch.", lambda: len(scheduler.running)),
            Gauge("num_requests_waiting", "Sequences that wait for a place.", lambda: len(scheduler.waiting)),
            Gauge(
                "kv_cache_usage_perc",
                "Used share of KV blocks, 0 to 1.",
                lambda: pool.num_used / pool.num_blocks,
            ),
            *(each for each in vars(self).values() if isinstance(each, Counter | Histogram)),
            *(self._drafts.all if engine.speculator is not None else ()),
        )

    def refused(self) -> None:
        """A request came when the queue was full."""
        self._refused.add()

    def arrived(self, request_id: str, prompt_len: int, n: int, arrived_ns: int) -> None:
        """A request of n sequences was taken that came then."""
        self._live[request_id] = _Live(arrived_ns, prompt_len, n)

    def left(self, request_id: str) -> None:
        """Nobody waits for the request any more; unless it has ended, it is aborted."""
        if self._live.pop(request_id, None) is not None:
            self._success.add(value="abort")

    def observe(self, report: StepReport, now_ns: int) -> None:
        """The engine advanced by one step, whose tokens can be sent now."""
        for stats in report.stats:
            self._hits.add(stats.prefix_hit_tokens)
            self._preemptions.add(stats.preemptions)
            self._iteration.observe(stats.num_tokens)
            for drafted, accepted in zip(stats.draft_lengths, stats.accepted_lengths, strict=True):
                self._drafts.observe(drafted, accepted)
        for request_id in report.started:
            live = self._live.get(request_id)
            if live is not None:
                live.started_ns = report.stats[0].start_ns if report.stats else report.seen_ns
                self._prompt_tokens.add(live.prompt_len)
                self._queries.add(live.prompt_len)
                self._queued.observe(max(0, live.started_ns - live.arrived_ns) / 1e9)
        self._generation_tokens.add(len(report.tokens))
        together = Counts((token.request_id, token.sequence) for token in report.tokens)
        for (request_id, sequence), num_tokens in together.items():
            live = self._live.get(request_id)
            if live is not None:
                self._count(live, sequence, num_tokens, now_ns)
        for token in report.tokens:
            live = self._live.get(token.request_id)
            if live is not None and token.finish_reason is not None:
                self._end(token.request_id, live, token.sequence, token.finish_reason)

    def _count(self, live: _Live, sequence: int, num_tokens: int, now_ns: int) -> None:
        """A sequence's next tokens, which share the gap before them."""
        before_ns = live.last_ns.get(sequence)
        if before_ns is not None:
            for _ in range(num_tokens):
                self._itl.observe((now_ns - before_ns) / num_tokens / 1e9)
        else:
            if not live.first_ns:
                self._ttft.observe((now_ns - live.arrived_ns) / 1e9)
                if live.started_ns is not None:
                    self._prefill.observe((now_ns - live.started_ns) / 1e9)
            live.first_ns[sequence] = now_ns
        live.last_ns[sequence] = now_ns
        live.num_tokens[sequence] = live.num_tokens.get(sequence, 0) + num_tokens

    def _end(self, request_id: str, live: _Live, sequence: int, reason: str) -> None:
        """A sequence's last token; and the request's, where it is the last sequence."""
        last_ns = live.last_ns[sequence]
        gaps = live.num_tokens[sequence] - 1
        if gaps:
            self._tpot.observe((last_ns - live.first_ns[sequence]) / gaps / 1e9)
        live.unfinished -= 1
        if live.unfinished == 0:
            self._e2e.observe((last_ns - live.arrived_ns) / 1e9)
            self._decode.observe((last_ns - min(live.first_ns.values())) / 1e9)
            self._success.add(value=reason)
            del self._live[request_id]

    def text(self, prefixes: Sequence[str] = (OWN,)) -> str:
        """Every metric under each prefix."""
        model = self._model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines = []
        for prefix in prefixes:
            for metric in self.all:
                name = f"{prefix}:{metric.name}"
                lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
                for end, labels, value in metric.samples():
                    pairs = "".join(f',{label}="{held}"' for label, held in labels.items())
                    lines.append(f'{name}{end}{{model_name="{model}"{pairs}}} {value}')
        return "\n".join(lines) + "\n"
