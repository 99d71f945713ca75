"""How many tokens to draft: as many as pay for themselves by measured times, down to none.

A sequence with k drafted tokens gains 1 + r1 + r1 r2 + ... tokens in a step (r: the chance of each to be
accepted where those before it were), one without gains one. Steps with drafts take longer: drafting,
verifying, and a host that must see every token before it can launch the next. Both sides are measured: rates
over all sequences, times by how many sequences a step holds, for a busy device verifies at another price
than an idle one. What is chosen here changes no token, only how fast they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

RATE_MEMORY = 64
"""Drafts over which a running rate is taken."""
TIME_MEMORY = 8
"""Steps whose median time counts."""
PLAIN_STEPS = 3
"""Plain steps that are measured before the first drafts."""
REFRESH = 32
"""Steps with drafts after which a plain one is measured again: contexts grow, and a first measurement that
another process disturbed would stand for a whole answer. Each time that it confirms that drafts pay, twice as
many: a plain step in between costs twice its time, for neither it nor the next can be launched ahead. Where
it denies it, the next is plain, too."""
LONGEST_REFRESH = 256
PROBE = 128
"""Plain steps after which drafts are tried again; each time that they do not pay, twice as many."""
LONGEST_PROBE = 4096
TRIAL = 2
"""Steps with drafts in such a try."""
PRIOR_RATE = 0.6
"""What counts, like one draft, for a rate of which nothing is known yet."""
MARGIN = 1.01
"""What drafts must gain at least: times are not measured any better."""
DEAR = 1.02
"""A step that asked for drafts in vain and took so much longer than a plain one was not free: with no other
step in flight, a GPU waits for its host."""


class _Running:
    """A running mean that begins as a plain one."""

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._seen = 1

    def add(self, sample: float) -> None:
        self._seen = min(self._seen + 1, RATE_MEMORY)
        self.value += (sample - self.value) / self._seen

    def loosen(self) -> None:
        """Let the next samples count for more: what was seen is old."""
        self._seen = min(self._seen, TRIAL)


class _Times:
    """Measured steps of about so many sequences."""

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=TIME_MEMORY)
        self.drafted: dict[int, deque[float]] = {}
        """By tokens asked for; 0 = drafts were asked for and none came."""
        self.plain_run = 0
        """Plain steps since the last with drafts, and the other way round."""
        self.drafted_run = 0
        self.refresh = REFRESH
        self.probe = PROBE
        self.trial = 0
        """Steps with drafts that are left of a try."""
        self.best: int | None = None
        """The length that pays most; None = not known since the last measurement."""

    def time_s(self, tokens: int) -> float:
        """Of a step that drafts so many tokens, between those measured where none was of just so many."""
        plain = median(self.plain)
        if tokens == 0:
            return plain
        if tokens in self.drafted:
            return median(self.drafted[tokens])
        nearest = min((each for each in self.drafted if each), key=lambda each: abs(each - tokens))
        return plain + (median(self.drafted[nearest]) - plain) * tokens / nearest


class AdaptiveLength:
    """Chooses how many tokens to draft in a step, at most `tokens`."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.rates = [_Running(PRIOR_RATE) for _ in range(self.tokens)]
        """Of each place in a draft: the chance to be accepted where those before it were."""
        self.found = _Running(1.0)
        """Of the steps that asked for drafts, how many got any."""
        self.share = _Running(1.0)
        """Of the sequences in those, how many had one."""
        self._times: dict[int, _Times] = {}

    def choose(self, num_seqs: int) -> int:
        """Tokens to draft for each of `num_seqs` sequences in the next step; 0 = a plain step."""
        times = self._at(num_seqs)
        if len(times.plain) < PLAIN_STEPS:
            return 0
        if times.trial or not times.drafted:
            return self.tokens
        if times.best is None:
            times.best = self._best(times)
        if times.best == 0:
            return self.tokens if times.plain_run >= times.probe else 0
        return 0 if times.drafted_run >= times.refresh else times.best

    def goes_on(self, num_seqs: int, tokens: int) -> bool:
        """Whether `choose` will most likely say `tokens` again after the step for which it just said so."""
        times = self._at(num_seqs)
        return times.best == tokens and times.trial == 0 and times.drafted_run + 1 < times.refresh

    def observe_plain(self, num_seqs: int, seconds: float) -> None:
        """A step of decodes alone that asked for no drafts."""
        times = self._at(num_seqs)
        times.plain.append(seconds)
        times.plain_run += 1
        if times.drafted_run >= times.refresh:
            confirmed = self._best(times, plain_s=seconds) > 0
            times.refresh = min(max(2 * times.refresh, REFRESH), LONGEST_REFRESH) if confirmed else 0
        times.drafted_run = 0
        if times.best or times.plain_run % TIME_MEMORY == 0:
            times.best = None

    def observe_drafted(self, num_seqs: int, tokens: int, seconds: float) -> None:
        """A step of decodes alone that asked for `tokens`; 0 = and got none."""
        times = self._at(num_seqs)
        times.drafted.setdefault(tokens, deque(maxlen=TIME_MEMORY)).append(seconds)
        times.drafted_run += 1
        times.refresh = max(times.refresh, REFRESH)
        if times.drafted_run % TIME_MEMORY == 0 or times.trial or len(times.drafted[tokens]) == 1:
            times.best = None
        if times.trial:
            times.trial -= 1
        elif times.plain_run >= times.probe:
            times.trial = TRIAL - 1
            for rate in self.rates:
                rate.loosen()
        if times.trial == 0 and times.plain_run >= times.probe:
            times.probe = PROBE if self._best(times) else min(2 * times.probe, LONGEST_PROBE)
        if times.trial == 0:
            if times.plain_run:
                times.best = None
            times.plain_run = 0

    def observe_acceptance(self, num_seqs: int, drafts: Iterable[tuple[int, int]]) -> None:
        """What came of the drafts that a step asked for: (tokens drafted, accepted) of each."""
        count = 0
        for drafted, accepted in drafts:
            count += 1
            for place in range(min(drafted, accepted + 1)):
                self.rates[place].add(place < accepted)
        self.found.add(count > 0)
        if count:
            self.share.add(count / num_seqs)

    def _best(self, times: _Times, plain_s: float | None = None) -> int:
        """The length with most tokens a second; 0 where none is worth it. plain_s: None = as measured."""
        plain = times.time_s(0) if plain_s is None else plain_s
        missed = times.drafted.get(0)
        missed_s = median(missed) if missed else plain
        if not any(times.drafted):
            return self.tokens if missed_s < DEAR * plain else 0
        # Where asking in vain costs nothing, only what a found draft is worth matters.
        found = 1.0 if missed_s < DEAR * plain else self.found.value
        gained, reached = 0.0, 1.0
        best, best_rate = 0, MARGIN / plain
        for tokens, rate in enumerate(self.rates, start=1):
            reached *= rate.value
            gained += reached
            seconds = found * times.time_s(tokens) + (1 - found) * missed_s
            tokens_per_s = (1 + found * self.share.value * gained) / seconds
            if tokens_per_s > best_rate:
                best, best_rate = tokens, tokens_per_s
        return best

    def _at(self, num_seqs: int) -> _Times:
        """The times of steps with as many sequences, to a factor of two."""
        return self._times.setdefault(num_seqs.bit_length(), _Times())
