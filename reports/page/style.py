"""How a run looks in a figure: its vendor's hue, and a shade, dash and marker that need no colour."""

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
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "triangle-down", "star")
GLYPHS = ("●", "◆", "■", "▲", "✚", "✖", "▼", "★")
"""What `SYMBOLS` look like in text."""


@dataclass(frozen=True)
class RunStyle:
    """One run's look in every figure and table."""

    label: str
    variable: str
    """The CSS variable that holds the colour of the theme in use, e.g. "--run-0"."""
    light: str
    dark: str
    dash: str
    symbol: str
    glyph: str
    marked: bool
    """Lines carry markers: there are other runs to tell it from."""

    @property
    def color(self) -> str:
        """What figures say; the page resolves it when it draws."""
        return f"var({self.variable})"

    @property
    def hover_label(self) -> str:
        """The label as text inside a hover template, which has its own markup."""
        return self.label.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def vendor(record: RunRecord) -> str:
    """ "nvidia", "amd" or "cpu": the maker of the device the engine ran on, as the record names it."""
    device = record.system.get("device")
    named = device.get("vendor") if isinstance(device, dict) else None
    return named if named in SHADES else "cpu"


def run_styles(records: Sequence[RunRecord], names: Sequence[str]) -> list[RunStyle]:
    """One style a run. Shades follow each vendor's own count, dashes and markers the overall one."""
    seen: dict[str, int] = {}
    several = len(records) > 1
    styles = []
    for place, (record, name) in enumerate(zip(records, names, strict=True)):
        maker = vendor(record)
        shades = SHADES[maker]
        light, dark = shades[seen.setdefault(maker, 0) % len(shades)]
        seen[maker] += 1
        glyph = place % len(SYMBOLS)
        dash = DASHES[place % len(DASHES)]
        styles.append(
            RunStyle(name, f"--run-{place}", light, dark, dash, SYMBOLS[glyph], GLYPHS[glyph], several)
        )
    return styles
