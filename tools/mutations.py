# ruff: noqa: E501  (a table: one fault a line, its text as it stands)
"""The faults that `tools/plant.py` plants: what is changed, and which tests have to notice.

A mutation's text must stand exactly once in the files it names; where code moves or is rewritten, mend the
entry here. A survivor is either a hole in the tests or changes nothing, and then says why in `survives`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One planted fault."""

    area: str
    fault: str
    """What the product does wrong with it, in a few words."""
    where: str
    """The files it may stand in, as a pattern from the repository's root."""
    text: str
    """Found exactly once in all of them."""
    planted: str
    """What replaces it."""
    tests: tuple[str, ...]
    """The mirrored test files (patterns); each must exist."""
    survives: str = ""
    """Why no test can notice it, where none can."""


SCHEDULER = "engine/scheduling/scheduler.py"
BLOCKS = "engine/scheduling/blocks.py"
STEP = "engine/execution/step_*.py"
RUNNER = "engine/execution/runner.py"
METRICS = "reports/metrics/*.py"
TRITON = "backends/triton/*.py"

SCHEDULER_TESTS = ("tests/engine/scheduling/test_scheduler*.py",)
BLOCKS_TESTS = ("tests/engine/scheduling/test_blocks.py",)
STEP_TESTS = ("tests/engine/execution/test_step_*.py",)
ENGINE_TESTS = ("tests/engine/test_engine_equality.py",)
TORCH_TESTS = ("tests/backends/torch/test_torch_*.py",)
COMPUTE_TESTS = ("tests/reports/metrics/test_compute.py",)
STATISTICS_TESTS = ("tests/reports/metrics/test_statistics.py",)
REPLAY_TESTS = ("tests/harness/test_replay.py",)
ARRIVALS_TESTS = ("tests/workloads/test_arrivals.py",)
READER_TESTS = ("tests/workloads/readers/*.py",)
SAMPLING_TESTS = ("tests/backends/triton/test_triton_sampling.py",)
OPERATIONS_TESTS = ("tests/backends/triton/test_triton_operations.py",)
ATTENTION_TESTS = (
    "tests/backends/triton/test_triton_attention.py",
    "tests/backends/triton/test_triton_configs.py",
)
LINEAR_TESTS = ("tests/backends/triton/test_triton_linear.py",)


def _mutations(area: str, where: str, tests: tuple[str, ...], *faults: tuple[str, ...]) -> list[Mutation]:
    """(fault, text, planted[, why it survives]) of one area."""
    return [Mutation(area, fault, where, text, planted, tests, *why) for fault, text, planted, *why in faults]


# fmt: off
MUTATIONS = [
    *_mutations(
        "scheduler", SCHEDULER, SCHEDULER_TESTS,
        ("preempts the oldest", "victim = self.running[-1]", "victim = self.running[0]"),
        ("forgets copies of shared blocks in what it reserves", "needed += self.pool.is_shared(block)", "needed += 0"),
        ("admits in a step that preempted", ":\n            self._admit(plan, prefills, decodes, budget)", " or True:\n            self._admit(plan, prefills, decodes, budget)"),
        ("admits over the number of sequences", "budget and len(self.running) <", "budget and len(self.running) <="),
        ("lets a running prompt pass the budget", "- sequence.num_computed, budget,", "- sequence.num_computed,"),
        ("lets a new prompt pass the budget", "num_tokens - computed, budget,", "num_tokens - computed,"),
        ("frees blocks that a step in flight reads", "        if sequence.in_flight:\n            self._releasing += 1", "        if False:\n            self._releasing += 1"),
        ("keeps a preempted sequence's count", "        victim.num_computed = 0\n", ""),
        ("sends a preempted sequence to the end of the line", "self._return(victim)", "self.waiting.append(victim)"),
        ("writes into shared blocks", "        if sequence.forked:\n            self._copy_shared(", "        if False:\n            self._copy_shared("),
        ("forgets to count hits in the plan", "plan.prefix_hit_tokens += computed", "plan.prefix_hit_tokens += 0"),
        ("puts prompts before decodes", "plan.slices = decodes + prefills", "plan.slices = prefills + decodes"),
        ("publishes a block that is not full", "// size\n        while sequence.num_published < full", "// size + 1\n        while sequence.num_published < full"),
        ("forgets to publish", "                self._publish(sequence)\n        return counts", "                pass\n        return counts"),
        ("loses the queue's order on a new start", "self.running[position - 1].order > sequence.order", "False"),
    ),
    *_mutations(
        "blocks", BLOCKS, BLOCKS_TESTS,
        ("a hit may cover the whole prompt", "range((len(token_ids) - max(1, self.lookahead)) // size)", "range((len(token_ids) - self.lookahead) // size)"),
        ("a block's hash forgets its parent", "parent = digests[-1] if digests else ROOT", "parent = ROOT"),
        ("the extra key does not separate", "    hasher.update(extra)\n", ""),
        ("a published block counts as private", "return self._readers[block] > 1 or self._digests[block] is not None", "return self._readers[block] > 1"),
        ("a reused block can still be found", "        self._forget(block)\n", ""),
        ("evicts the most recently used", "self._free.popitem(last=False)", "self._free.popitem(last=True)"),
        ("frees a prefix before its continuation", "for block in reversed(list(blocks)):", "for block in list(blocks):"),
        ("a hit's block stays on the free list", "                del self._free[block]\n", "                pass\n"),
    ),
    *_mutations(
        "step buffers", STEP, STEP_TESTS,
        ("a decode is one token shorter", "[:count] + 1\n", "[:count]\n"),
        ("padding writes to slot 0", "[tokens] = -1", "[tokens] = 0"),
        ("a prompt's slots lie one block off", "[sequence.row, position // size]", "[sequence.row, (position + 1) // size]"),
        ("a token in flight is taken from the next row", "last_tokens[(-1 - ids).clamp_min_(0)]", "last_tokens[(0 - ids).clamp_min_(0)]"),
        ("a prompt samples from its first token", "[1:][seqs] - 1", "[:-1][seqs]"),
        ("every draw has the same noise", "noise_key(sequence.seed, part.draw)", "noise_key(sequence.seed, 0)"),
        ("a shape without room counts as fitting", "and live.prompt_tokens <= self.prompt_tokens\n", ""),
    ),
    *_mutations(
        "step buffers", "engine/request.py", STEP_TESTS,
        ("min-p alone filters nothing", " or self.min_p > 0", ""),
    ),
    *_mutations(
        "sampling", "backends/torch/operations.py", TORCH_TESTS,
        ("min-p alone filters nothing", "(top_k > 0) | (top_p < 1) | (min_p > 0)", "(top_k > 0) | (top_p < 1)"),
        ("top-k keeps one more", "vocab_size).long() - 1", "vocab_size).long().clamp(max=vocab_size - 1)"),
        ("top-p drops the token that crosses p", "before = probability.cumsum(-1) - probability", "before = probability.cumsum(-1)"),
        ("top-p ignores what top-k left", "    ordered = ordered.masked_fill(ordered < threshold, -torch.inf)\n", ""),
        ("min-p without its logarithm", "min_p[:, None].log()", "min_p[:, None]"),
        ("temperature multiplies", "logits[rows].float() / temperature[:, None]", "logits[rows].float() * temperature[:, None]"),
        ("greedy rows are drawn", "drawn = sampling.temperature > 0", "drawn = sampling.temperature >= 0"),
        ("eps is dropped from the norm", "keepdim=True) + eps)", "keepdim=True))"),
        ("the rotation turns backwards", "(first * cos - second * sin, second * cos + first * sin)", "(first * cos + second * sin, second * cos - first * sin)"),
    ),
    *_mutations(
        "sampling", "backends/noise.py", ("tests/backends/test_noise.py",),
        ("a draw does not change the key", "mix(draw & MASK)", "mix(0)"),
        ("only 32 bits of the seed count", "(seed >> 32 & MASK)", "0"),
        ("a token's noise is its neighbour's", "torch.arange(vocab_size,", "1 + torch.arange(vocab_size,"),
    ),
    *_mutations(
        "torch attention", "backends/torch/attention.py", TORCH_TESTS,
        ("the window is one key late", "hidden |= key <= query - self.spec.window", "hidden |= key < query - self.spec.window"),
        ("the window's first block is one too far", "max(0, context - self.spec.window + 1)", "max(0, context - self.spec.window + 1 + self.spec.block_size)"),
        ("a query sees the key after it", "hidden = key > query", "hidden = key > query + 1"),
        ("the last key is not seen", "visible = live - (end - stop)", "visible = live - (end - stop) - (live > 1)"),
        ("keys and values are swapped", "            cache.keys[slots] = self._stored(k)\n            cache.values[slots] = self._stored(v)\n", "            cache.keys[slots] = self._stored(v)\n            cache.values[slots] = self._stored(k)\n"),
        ("a block is copied backwards", "blocks[dst] = blocks[src]", "blocks[src] = blocks[dst]"),
        ("softcap is left out", "if spec.softcap is not None:\n            scores", "if False:\n            scores"),
    ),
    *_mutations(
        "models", "engine/models/**/*.py", ("tests/engine/models/test_rope.py",),
        ("yarn's upper clamp is gone", "min(high, rotary_dim - 1)", "high"),
        ("yarn's lower clamp is gone", "max(low, 0)", "low"),
        ("yarn's attention factor is left out", "0.1 * mscale * math.log(rope.factor) + 1.0", "1.0"),
    ),
    *_mutations(
        "models", "engine/models/**/*.py", ("tests/engine/models/test_checkpoint.py",),
        ("the fingerprint skips the file's tail", "stream.seek(max(0, size - EDGE_BYTES))", "stream.seek(0)"),
    ),
    *_mutations(
        "replay", "harness/replay.py", REPLAY_TESTS,
        ("a slot is free at the poll's time", "self._free.append(end_ns)", "self._free.append(self.clock())"),
        ("a warm-up without its gap", "-(offset + gap) for offset", "-offset for offset"),
        ("a request is intended when it is sent", "        trace.intended_ns = intended_ns\n", "        trace.intended_ns = self.clock()\n"),
        ("a failure keeps its slot", "if trace.end_ns is not None:\n                del", "if trace.finished:\n                del"),
        ("a burst does not wait for its warm-up", "run.schedule(begin_ns, trace)\n            run.go_on(interrupt)\n", "run.schedule(begin_ns, trace)\n        run.go_on(interrupt)\n"),
        ("one more request is in flight", "deque([self.clock()] * slots)", "deque([self.clock()] * (slots + 1))"),
        ("a warm-up has its workload's prompts", "(token + shift) % vocab_size", "token"),
        ("progress counts the warm-up", "self.done += each.request.id >= 0", "self.done += 1"),
    ),
    *_mutations(
        "replay", "harness/sessions.py", REPLAY_TESTS,
        ("an empty chunk counts as a token", "if event.error is None and event.count != 0:", "if event.error is None:"),
    ),
    *_mutations(
        "metrics", METRICS, COMPUTE_TESTS,
        ("an interrupted run leaves out due requests", '["intended_ns"] < context.end_ns)', '["intended_ns"] < -1)'),
        ("ITL is divided by the wrong counts", "np.repeat(np.diff(times) / counts[1:], counts[1:]", "np.repeat(np.diff(times) / counts[:-1], counts[1:]"),
        ("a chunk's gap counts once", "counts[1:].astype(int)) / 1e9", "1) / 1e9"),
        ("total tokens count prompts that gave no token", "rows.prompt_tokens[window.holds(rows.first_ns)].sum()", "rows.prompt_tokens.sum()"),
        ("an SLO applies to failed requests", "within & rows.completed, ~", "within, ~"),
        ("a failed request may reach the goodput", "met = rows.completed.copy()", "met = np.ones(len(rows), bool)"),
        ("`ttft_s` and `ttft_sent_s` without failures", "never = int((~seen & ~rows.completed).sum())", "never = 0"),
        ("`e2e_s` and `tpot_s` without failures", "int((~done).sum())", "0"),
        ("TTFT from the sending", "_first(run, run.rows.intended_ns)", "_first(run, run.rows.sent_ns)"),
        ("TPOT over n", "np.where(enough, rows.output_tokens - 1, np.nan)", "np.where(enough, rows.output_tokens, np.nan)"),
        ("a failure has no speed", ", speeds))", ", speeds))[-len(speeds) :]"),
        ("steady state ends one request late", "last = sent - size - 1", "last = sent - size"),
        ("steady state begins one token early", "float(firsts[size - 1])", "float(firsts[size - 2])"),
        ("tokens at a window's start count", "(times_ns > self.start_ns)", "(times_ns >= self.start_ns)"),
        ("the warm-up's hits count", 'self.steps[self.steps["end_ns"] > 0]', 'self.steps'),
    ),
    *_mutations(
        "statistics", METRICS, STATISTICS_TESTS,
        ("a tail gets all of the error", "tail = (1 - confidence) / 2\n    # The mass", "tail = 1 - confidence\n    # The mass"),
        ("the interval's upper rank is one low", "float(ordered[ranks[1] - 1])", "float(ordered[ranks[1] - 2])"),
        ("failures enter as zero", "np.full(failures, np.inf)", "np.zeros(failures)"),
        ("the quantile is the nearest below", "ordered[below] + fraction * (ordered[below + 1] - ordered[below])", "ordered[below]"),
        ("the deviation is the population's", "measured.std(ddof=1)", "measured.std()"),
    ),
    *_mutations(
        "statistics", METRICS, ("tests/reports/metrics/test_schedule.py",),
        ("dispersion counts the last, partial window", "places < windows", "places <= windows"),
        ("dispersion by the population's variance", "counts.var(ddof=1)", "counts.var()"),
        ("a rate over n arrivals", "return (len(times_ns) - 1) / span_s", "return len(times_ns) / span_s"),
    ),
    *_mutations(
        "statistics", METRICS, ("tests/reports/metrics/test_energy.py",),
        ("a trapezoid is a rectangle", "(w[1:] + w[:-1]) / 2", "w[1:]"),
        ("the counter is trusted on short stretches", "elif window.seconds < MIN_COUNTER_S:", "elif False:"),
    ),
    *_mutations(
        "arrivals", "workloads/arrivals.py", ARRIVALS_TESTS,
        ("constant gaps are random", "return np.ones(count)", "return generator.standard_exponential(count)"),
        ("gamma's CV is its shape", "shape = self.cv**-2", "shape = self.cv"),
        ("weibull's mean is not 1", " / math.gamma(1 + 1 / shape)", ""),
        ("a ramp rises at once", "start * inside + (end - start) * inside**2 / (2 * seconds)", "start * inside + (end - start) * inside"),
        ("a burst's silence is left out", "np.divmod(t, on_s + off_s)", "np.divmod(t, on_s)"),
        ("a sine turns at half its period", "angular = 2 * math.pi / period_s", "angular = 4 * math.pi / period_s"),
        ("times that overflow are sent", "if not in_time:", "if False:"),
    ),
    *_mutations(
        "traces", "workloads/readers/*.py", READER_TESTS,
        ("half of an emoji reaches the tokenizer", "            text.encode()\n", "            pass\n"),
        ("a number of 400 digits is a stack trace", "except (TypeError, ValueError, OverflowError):", "except (TypeError, ValueError):"),
        ("times may go back", "if arrival_ns < self.last_ns:", "if False:"),
        ("text after the array is overlooked", "if awaited in _MISSING:", 'if awaited in _MISSING and awaited != "end":'),
        ("Azure's seventh digit is lost", '.ljust(9, "0")', '[:6].ljust(9, "0")'),
        ("a tie of formats goes to the first", "if len(found) > 1:", "if False:"),
    ),
    *_mutations(
        "kernels", TRITON, OPERATIONS_TESTS,
        ("eps is dropped from the norm", "tl.sqrt_rn(mean_square + eps)) * gain", "tl.sqrt_rn(mean_square)) * gain"),
        ("the sum does not replace the residual", "    tl.store(residual + place, total, mask=inside)\n", ""),
        ("slot 0 is never written", "written = slot >= 0", "written = slot > 0"),
        ("an inert token writes to slot 0", "written = slot >= 0", "written = slot >= -1"),
        ("gate and up are swapped", "column, (silu(gate) * up)", "column, (silu(up) * gate)"),
        ("the partner's sign is lost", "sine = tl.where(d < half, -sine, sine)", "sine = tl.where(d < half, sine, sine)"),
    ),
    *_mutations(
        "kernels", TRITON, SAMPLING_TESTS,
        ("candidate overflow is not checked", "complete = (count <= CANDIDATES) & ", "complete = "),
        ("min-p is left out of the candidates", "limit = top + tl.log(least)", "limit = top - 1e30"),
        ("the greedy tie goes to the last", "tl.min(tl.where(best == top, best_at, LAST_TOKEN), axis=0)", "tl.max(tl.where(best == top, best_at, 0), axis=0)"),
        ("another mixer's noise", "x = x * 0x85EBCA6B", "x = x * 0x85EBCA6D"),
    ),
    *_mutations(
        "kernels", TRITON, ATTENTION_TESTS,
        ("the last key is not seen", "live = key < length\n        start = widened(block, WIDE) * block_stride", "live = key < length - 1\n        start = widened(block, WIDE) * block_stride"),
        ("the last key of a cache of bytes is not seen", "live = key < length\n        start = widened(block, WIDE) * (block", "live = key < length - 1\n        start = widened(block, WIDE) * (block"),
        ("the decode window is one key late", "live = live & (key >= length - WINDOW)", "live = live & (key > length - WINDOW)"),
        ("a draft sees the key after it", "shown = live[None, :] & (key[None, :] <= position[:, None])", "shown = live[None, :] & (key[None, :] <= position[:, None] + 1)"),
        ("a draft's window is one key late", "shown & (key[None, :] + WINDOW > position[:, None])", "shown & (key[None, :] + WINDOW > position[:, None] + 1)"),
        ("drafts reach no further back than the last", "M // GROUP - 1 if DRAFTED", "0 if DRAFTED"),
        ("a row that has seen no key spoils its sum", "maximum = tl.where(maximum == float(\"-inf\"), 0.0, maximum)", "maximum += 0.0"),
        ("merging drafts forgets the later maximum", "weight = tl.exp2(highest - origin)", "weight = tl.exp2(maximum - maximum)"),
        ("a third of the drafts' programs fits beside two", 'found["STAGES"] = config["STAGES"] + 1', 'found["STAGES"] = config["STAGES"]'),
        ("the prefill window is one key late", "(key[None, :] > position[:, None] - WINDOW)", "(key[None, :] >= position[:, None] - WINDOW)"),
        ("a query sees the key after it", "seen = key[None, :] <= position[:, None]", "seen = key[None, :] <= position[:, None] + 1"),
        ("a write skips slot 0", "if slot >= 0:", "if slot > 0:"),
        ("merging forgets the later maximum", "weight = tl.exp2(maxima - pivot[None, :])", "weight = tl.exp2(maxima - maxima)"),
    ),
    *_mutations(
        "kernels", TRITON, LINEAR_TESTS,
        ("the bias is left out of the skinny product", "total += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)[None, :]", "total += 0.0"),
        ("the last columns of the depth are read twice", "inside = present if EVEN else present & (k < depth)[None, :]", "inside = present"),
    ),
]
# fmt: on
