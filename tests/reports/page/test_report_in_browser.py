"""The report in headless Chromium: no console error, no request, the record's numbers, phone and keyboard."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backbench.reports.page.html import write_report
from backbench.reports.quantities import Reading, format_interval, format_value
from backbench.reports.record import RunDirectory

pytestmark = pytest.mark.browser


def load_tool() -> Any:
    """tools/screenshot.py knows where Chromium is and how to start it."""
    path = Path(__file__).parents[3] / "tools" / "screenshot.py"
    spec = importlib.util.spec_from_file_location("screenshot", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    tool = load_tool()
    chromium = tool.find_chromium()
    if chromium is None:
        reason = "No Chromium found (apt-get install chromium, or set CHROMIUM to its path)."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=list(tool.ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def one(cpu_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "report.html"
    write_report([cpu_run.path], out)
    return out


@pytest.fixture(scope="module")
def three(gpu_runs: list[RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three") / "report.html"
    write_report([run.path for run in gpu_runs], out)
    return out


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(path, width=..., scheme=...) gives a page; at the end it must have been quiet."""
    contexts, messages, requests, opened = [], [], [], []

    def open_one(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: messages.append(f"error: {error}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#figure-ttft .main-svg")
        opened.append(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert messages == []
    # data: and blob: never leave the page.
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "three"])
def test_every_figure_is_drawn_quietly(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str, scheme: str
) -> None:
    page = open_page(request.getfixturevalue(name), scheme=scheme)
    assert page.locator("[data-figure]").count() == 4
    assert page.locator("[data-figure] .main-svg .trace").count() >= 4
    style = page.locator("#figure-ttft .xtick text").first.evaluate("e => getComputedStyle(e).fill")
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert style != body


def test_the_records_numbers_are_on_the_page(
    open_page: Callable[..., Any], one: Path, cpu_run: RunDirectory
) -> None:
    text = open_page(one).locator("body").inner_text()
    record = cpu_run.read_record()
    for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        p50 = record.metrics[key]["p50"]
        assert format_value(p50["value"], "s") in text
        assert format_interval(Reading(**p50), "s") in text
    steady = record.metrics["output_tokens_per_s"]["steady_state"]
    assert f"{steady:.0f} output tok/s in steady state" in text
    assert format_value(record.memory["total_bytes"], "bytes") in text
    assert record.run["command"] in text
    assert "sample size (120)" in text


@pytest.mark.parametrize("name", ["one", "three"])
def test_a_phone_scrolls_in_one_direction_only(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str
) -> None:
    page = open_page(request.getfixturevalue(name), width=390)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def column(page: Any, place: int) -> list[str]:
    found: list[str] = page.locator(f"#latency tbody tr > :nth-child({place})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.sort)"
    )
    return found


def test_sorting_by_mouse_and_keyboard(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one)
    header = page.locator("#latency thead th").nth(2)
    header.locator("button").click()
    numbers = [float(each) for each in column(page, 3)]
    assert header.get_attribute("aria-sort") == "ascending"
    assert numbers == sorted(numbers)
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [float(each) for each in column(page, 3)] == sorted(numbers, reverse=True)
    page.locator("#latency thead button").first.click()
    assert header.get_attribute("aria-sort") is None
    assert column(page, 1) == sorted(column(page, 1), key=str.lower)


def test_absent_values_sort_last_both_ways(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one)
    button = page.locator("#latency thead button").nth(5)
    for _ in range(2):
        button.click()
        values = column(page, 6)
        present = [bool(each) for each in values]
        assert present == sorted(present, reverse=True)
        assert not all(present)


def test_the_download_is_the_record(open_page: Callable[..., Any], one: Path, cpu_run: RunDirectory) -> None:
    page = open_page(one)
    with page.expect_download() as download:
        page.locator("#download-json").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["records"] == [json.loads((cpu_run.path / "run.json").read_text())]


def test_figures_follow_the_theme(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one)
    color = "document.querySelector('#figure-ttft .js-line').style.stroke"
    light = page.evaluate(color)
    page.emulate_media(color_scheme="dark")
    for _ in range(50):  # wait_for_function needs eval, which the page forbids
        if page.evaluate(color) != light:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(color) != light


def test_paper_is_light_and_complete(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one, scheme="dark")
    color = "getComputedStyle(document.documentElement).getPropertyValue('--card').trim()"
    assert page.evaluate(color) != "#ffffff"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(color) == "#ffffff"
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(color) != "#ffffff"
    assert page.locator("details:not([open])").count() > 0
