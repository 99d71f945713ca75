"""Lengths that adapt, on a device whose times are known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from backbench.engine.speculation.adaptive import LONGEST_REFRESH, PROBE, REFRESH, AdaptiveLength


class Device:
    """Steps take what they take; each drafted token is accepted with one chance."""

    def __init__(
        self, rate: float, verify_s: Callable[[int], float], found: float = 1.0, seqs: int = 8
    ) -> None:
        self.rate = rate
        self.verify_s = verify_s
        self.found = found
        self.seqs = seqs
        self.length = AdaptiveLength(4)
        self.random = random.Random(0)
        self.seconds = self.tokens = 0.0

    def step(self) -> int:
        asked = self.length.choose(self.seqs)
        drafts, hit = [], self.random.random() < self.found
        if asked and hit:
            for _ in range(self.seqs):
                accepted = 0
                while accepted < asked and self.random.random() < self.rate:
                    accepted += 1
                drafts.append((asked, accepted))
        seconds = (self.verify_s(asked) if drafts else 1.0) * self.random.uniform(0.99, 1.01)
        if asked:
            self.length.observe_acceptance(self.seqs, drafts)
            self.length.observe_drafted(self.seqs, asked if drafts else 0, seconds)
        else:
            self.length.observe_plain(self.seqs, seconds)
        self.seconds += seconds
        self.tokens += self.seqs + sum(accepted for _, accepted in drafts)
        return asked

    def run(self, steps: int) -> list[int]:
        return [self.step() for _ in range(steps)]

    @property
    def speed_up(self) -> float:
        return self.tokens / self.seqs / self.seconds


def test_cheap_and_right_drafts_are_as_long_as_they_may_be() -> None:
    device = Device(0.9, lambda tokens: 1 + 0.02 * tokens)
    assert set(device.run(200)[-50:]) <= {4, 0}
    assert device.speed_up > 3


def test_plain_steps_are_measured_again_the_less_often_the_longer_drafts_pay() -> None:
    chosen = Device(0.9, lambda tokens: 1 + 0.02 * tokens).run(1500)
    plain = [step for step, asked in enumerate(chosen) if asked == 0]
    between = [later - earlier - 1 for earlier, later in itertools.pairwise(plain)]
    assert [each for each in between if each][:6] == [32, 64, 128, 256, 256, 256]
    assert (REFRESH, LONGEST_REFRESH) == (32, 256)


def test_a_first_plain_step_that_was_disturbed_is_soon_forgotten() -> None:
    """Drafts do not pay, and look as if they did: the plain steps measured first took three times as long."""
    device = Device(0.1, lambda tokens: 1 + 0.2 * tokens)
    for _ in range(3):
        device.length.observe_plain(device.seqs, 3.0)
    chosen = device.run(400)
    assert chosen[:20].count(0) == 0, "it was taken in"
    assert chosen[-100:].count(0) > 90


def test_dear_drafts_are_short() -> None:
    """One token is worth 1.6 / 1.3, four 2.3 / 2.2."""
    device = Device(0.6, lambda tokens: 1 + 0.3 * tokens)
    chosen = device.run(300)[-50:]
    assert max(set(chosen), key=chosen.count) == 1


@pytest.mark.parametrize(("seqs", "rate", "cost"), [(1, 0.2, 0.25), (64, 0.4, 0.5), (256, 0.4, 0.5)])
def test_what_does_not_pay_is_switched_off(seqs: int, rate: float, cost: float) -> None:
    """Within 2 % of plain decoding over 250 steps, trials included."""
    device = Device(rate, lambda tokens: 1 + cost * tokens, seqs=seqs)
    chosen = device.run(250)
    assert chosen.count(0) > 240
    assert device.speed_up > 0.98


def test_it_comes_back_when_drafts_turn_right() -> None:
    device = Device(0.0, lambda tokens: 1 + 0.1 * tokens)
    assert device.run(100)[-20:] == [0] * 20
    device.rate = 0.95
    assert device.run(2 * PROBE)[-20:].count(0) < 5


def test_rare_drafts_are_worth_asking_for_where_asking_is_free() -> None:
    device = Device(0.9, lambda tokens: 1 + 0.1 * tokens, found=0.05, seqs=1)
    assert sum(asked > 0 for asked in device.run(1000)) > 700
    assert device.speed_up > 1.05


def test_it_tells_before_whether_the_next_step_will_be_alike() -> None:
    device, chosen, told = Device(0.9, lambda tokens: 1 + 0.02 * tokens), list[int](), list[bool]()
    choose = device.length.choose

    def choosing(seqs: int) -> int:
        chosen.append(choose(seqs))
        told.append(chosen[-1] > 0 and device.length.goes_on(seqs, chosen[-1]))
        return chosen[-1]

    device.length.choose = choosing  # type: ignore[method-assign]
    device.run(400)
    after = list(zip(told, chosen, chosen[1:], strict=False))
    assert all(now == then for said, now, then in after if said), "plain steps in between are foreseen, too"
    alike = [said for said, now, then in after if now == then > 0]
    assert sum(alike) > 0.9 * len(alike) > 200
