"""A picture of a report: tools/screenshot.py RUN.html OUT.png [--width 1280] [--height N] [--dark]."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """The path in $CHROMIUM, else an installed Chromium or Chrome."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def screenshot(page: Path, out: Path, width: int, height: int | None, dark: bool, scale: float) -> None:
    """Draw `page` headless; without `height` the picture is as tall as the page."""
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("No Chromium found; install one or set CHROMIUM to its path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        tab = browser.new_page(
            viewport={"width": width, "height": height or 900},
            color_scheme="dark" if dark else "light",
            device_scale_factor=scale,
        )
        tab.goto(page.resolve().as_uri())
        tab.wait_for_timeout(300)
        tab.screenshot(path=out, full_page=height is None)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    screenshot(options.page, options.out, options.width, options.height, options.dark, options.scale)


if __name__ == "__main__":
    main()
