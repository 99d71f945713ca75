"""How a run looks in a figure: its vendor's hue, and a shade, dash and shape that need no colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backbench.reports.record import RunRecord

# (light theme, dark theme) shades; neighbours differ in lightness, so they stay apart without the hue.
SHADES: dict[str, tuple[tuple[str, str], ...]] = {
    "nvidia": (
        ("#2b5d00", "#86c232"),
        ("#6f9a00", "#d4ec8f"),
        ("#0d5c3f", "#3fa67a"),
        ("#5b6b2f", "#a9b97c"),
    ),
    "amd": (("#c4122f", "#ff6b6b"), ("#e0623f", "#ffc2a8"), ("#7a1030", "#d9486e"), ("#a3553f", "#c98a76")),
    "cpu": (("#1f5fa8", "#6cb0f5"), ("#7d93ab", "#bccbdb"), ("#0c3358", "#3f86d1"), ("#2f8fb5", "#9fdcf2")),
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "M-4-4h8v8h-8z",
    "M0-5.5L5 4h-10z",
    "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "M-5-2.8L-2.8-5L0-2.2L2.8-5L5-2.8L2.2 0L5 2.8L2.8 5L0 2.2L-2.8 5L-5 2.8L-2.2 0z",
    "M0 5.5L5-4h-10z",
    "M0-6L1.5-1.9L5.7-1.9L2.4 .7L3.6 4.9L0 2.4L-3.6 4.9L-2.4 .7L-5.7-1.9L-1.5-1.9z",
)
"""Circle, diamond, square, triangle, plus, cross, triangle down, star: SVG paths around (0, 0), in pixels."""


@dataclass(frozen=True)
class RunStyle:
    """One run's look in every figure and table."""

    label: str
    variable: str
    """The CSS variable that holds the colour of the theme in use, e.g. "--run-0"."""
    light: str
    dark: str
    dash: str
    shape: int
    """Which of `SHAPES`."""

    @property
    def color(self) -> str:
        """As a style sheet names it."""
        return f"var({self.variable})"


def vendor(record: RunRecord) -> str:
    """ "nvidia", "amd" or "cpu": the maker of the device the engine ran on, as the record names it."""
    device = record.system.get("device")
    named = device.get("vendor") if isinstance(device, dict) else None
    return named if named in SHADES else "cpu"


def run_styles(records: Sequence[RunRecord], names: Sequence[str]) -> list[RunStyle]:
    """One style a run. Shades follow each vendor's own count, dashes and shapes the overall one."""
    seen: dict[str, int] = {}
    styles = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        maker = vendor(record)
        shades = SHADES[maker]
        light, dark = shades[seen.setdefault(maker, 0) % len(shades)]
        seen[maker] += 1
        dash, shape = DASHES[place % len(DASHES)], place % len(SHAPES)
        styles.append(RunStyle(name, f"--run-{place}", light, dark, dash, shape))
    return styles
