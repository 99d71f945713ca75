"""Reasons why a run should not be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backbench.reports.metrics import disturbance

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.record import RunRecord

INTERPRETED = "kernels ran in Triton's interpreter: the times say nothing about any device"
"""Known to whoever asked for it, so it is no failure of the command."""

DRAWN = "acceptance was drawn (--speculate synthetic): times of such a rate, and no answers"
"""Known to whoever asked for it, too."""

NOT_CHECKED = "correctness was not checked: "
NOT_ASKED_FOR = "not asked for (--no-check)"
"""Why it was not, where that was wanted: no failure of the command either."""
UNCHECKED = NOT_CHECKED + NOT_ASKED_FOR
BLACK_BOX = "a server's weights and kernels are not seen from outside"
"""Why a server's results are not checked: it says nothing against the times that were measured."""

NOT_CALIBRATED = "not asked for (--no-calibrate-client)"
UNCALIBRATED = f"the client's own cost is not known: {NOT_CALIBRATED}"
BEYOND = "the client was beyond its limit: "

FOREIGN = "foreign, unverified: imported from "
"""How the reason begins of a run that another tool measured."""

DISTURBED = "disturbed: "
"""How the reasons begin that are no fault of what was measured: the machine was not its own."""

_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""NVML's clock event reasons that mean trouble. The power cap (0x4) is a card's ordinary limit."""


def of_record(record: RunRecord, telemetry: pd.DataFrame) -> list[str]:
    """The reasons that a record's own sections and its telemetry give."""
    device = record.system.get("device") or {}
    return reasons(
        record.metrics,
        record.schedule,
        record.correctness,
        telemetry,
        device.get("processes"),
        record.run.get("error"),
        bool(device.get("interpreter")),
        record.target.get("client"),
        (record.run.get("imported") or {}).get("tool"),
        drawn=record.speculation.get("synthetic") is not None,
    )


def reasons(
    metrics: dict[str, Any],
    schedule: dict[str, Any],
    correctness: dict[str, Any],
    telemetry: pd.DataFrame,
    foreign_processes: int | None,
    failure: str | None = None,
    interpreted: bool = False,
    client: dict[str, Any] | None = None,
    imported: str | None = None,
    drawn: bool = False,
) -> list[str]:
    """One line each; empty = nothing speaks against the run."""
    counts = metrics["counts"]
    found = []
    if imported is not None:
        found.append(FOREIGN + imported)
    if failure is not None:
        found.append(f"failed: {failure}")
    if interpreted:
        found.append(INTERPRETED)
    if drawn:
        found.append(DRAWN)
    if metrics["context"]["interrupted"]:
        done, due = counts["completed"], counts["intended"]
        cut = "interrupted" if failure is None else "cut short"
        found.append(f"{cut}: {done} of {due} requests that were due had finished")
    if counts["failed"]:
        found.append(f"{counts['failed']} requests failed")
    if counts["wrong_length"]:
        found.append(f"{counts['wrong_length']} requests got another number of tokens than asked for")
    if metrics.get("output_tokens", 0) is None:
        found.append("how many tokens some requests got is not known: the server did not count them")
    if schedule["client_saturated"]:
        found.append(_saturated(schedule.get("late_requests"), counts))
    if correctness.get("passed") is False:
        found.append(
            "wrong results: " + correctness.get("reason", "log-probabilities differ from the torch backend's")
        )
    elif correctness.get("passed") is None and correctness.get("reason") != BLACK_BOX:
        found.append(NOT_CHECKED + correctness.get("reason", "no reason given"))
    found += _client(client or {})
    if foreign_processes:
        found.append(f"{foreign_processes} other processes were using the GPU")
    seen = telemetry.loc[telemetry["time_ns"] >= 0, "throttle_reasons"].dropna()
    bits = 0
    for value in seen.unique():
        bits |= int(value)
    found += [f"the GPU was throttled: {name}" for bit, name in _SLOWDOWNS.items() if bits & bit]
    found += [DISTURBED + reason for reason in disturbance.reasons(metrics.get("disturbance") or {})]
    return found


def _client(client: dict[str, Any]) -> list[str]:
    """What speaks against the client processes of a run that measured a server."""
    found = [BEYOND + str(reason) for reason in client.get("beyond_limit") or ()]
    after = client.get("calibration_after")
    if isinstance(after, dict) and after.get("reason") == NOT_CALIBRATED:
        found.append(UNCALIBRATED)
    return found


def _saturated(late: int | None, counts: dict[str, Any]) -> str:
    if late is None:  # a record of before they were counted
        return "the client was saturated: requests went out slower than they were due"
    return (
        f"the client was saturated: {late:,} of {counts['sent']:,} requests went out more than a step late; "
        "lower --rate, or leave it a CPU of its own"
    )


def disturbed(record: RunRecord) -> list[str]:
    """The reasons why the machine was not this run's own, without their common beginning."""
    return [each.removeprefix(DISTURBED) for each in record.validity if each.startswith(DISTURBED)]


def fails(record: RunRecord) -> bool:
    """Whether something is wrong with what was measured; a busy machine is not, nor what was asked for."""
    wanted = (INTERPRETED, DRAWN, UNCHECKED, UNCALIBRATED)
    return any(each not in wanted and not each.startswith(DISTURBED) for each in record.validity)
