"""The report in headless Chromium: no console error, no request, the record's numbers, phone and keyboard."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backbench.reports.page.export import write_report
from backbench.reports.quantities import Reading, format_interval, format_value
from backbench.reports.record import RunDirectory, sign

pytestmark = pytest.mark.browser
PAGES = ("one", "three", "by_setting", "by_machine", "hostile")


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which `npm install --no-save axe-core` puts beside the tree; or of $AXE."""
    path = Path(os.environ.get("AXE") or Path(__file__).parents[3] / "node_modules/axe-core/axe.min.js")
    if not path.is_file():
        pytest.skip("No axe-core (npm install --no-save axe-core, or set AXE to its axe.min.js).")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def one(cpu_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "report.html"
    write_report([cpu_run.path], out)
    return out


BACKENDS = ("torch", "sdpa", "triton")


@pytest.fixture(scope="module")
def settings(make_run: Callable[..., RunDirectory]) -> list[RunDirectory]:
    """Three backends, each under two settings, on one machine."""
    runs = []
    for place, backend in enumerate(BACKENDS):
        for setting in (16, 64):
            run = make_run("NVIDIA", backend, seed=10 * place + setting)
            record = run.read_record()
            asked = {"workload": "sharegpt", "backend": backend, "max_seqs": setting}
            engine = record.engine | {"max_seqs": setting}
            run.write_record(sign(run, replace(record, engine=engine, run=record.run | {"asked": asked})))
            runs.append(run)
    return runs


@pytest.fixture(scope="module")
def machines(make_run: Callable[..., RunDirectory]) -> list[RunDirectory]:
    """Three backends, each on two vendors' cards: made by a model, as the page says itself."""
    return [
        make_run(machine, backend, seed=seed)
        for seed, machine in enumerate(("NVIDIA", "AMD"))
        for backend in BACKENDS
    ]


def written(runs: list[RunDirectory], folder: Path) -> Path:
    out = folder / "report.html"
    write_report([run.path for run in runs], out)
    return out


@pytest.fixture(scope="module")
def by_setting(settings: list[RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(settings, tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def by_machine(machines: list[RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(machines, tmp_path_factory.mktemp("machines"))


@pytest.fixture(scope="module")
def hostile(make_run: Callable[..., RunDirectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names that try to leave their place, of 10 kB, and from right to left."""
    names = ("</script><script>console.log('out')</script>", "\"'><img src=x onerror=console.log(1)>")
    names = (*names, "x" * 10_000, "\u202eمرحبا שלום")
    runs = []
    for seed, name in enumerate(names):
        run = make_run("NVIDIA", "triton", seed=seed)
        record = run.read_record()
        device = record.system["device"] | {"name": name}
        changed = {
            "model": record.model | {"quantization": name},
            "system": record.system | {"device": device},
        }
        changed |= {"workload": record.workload | {"name": name}, "validity": [name]}
        backend = record.backend | {"asked": name, "used": {name: name}}
        run.write_record(sign(run, replace(record, backend=backend, **changed)))
        runs.append(run)
    return written(runs, tmp_path_factory.mktemp("hostile"))


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
        opened.append(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert messages == []
    # data: and blob: never leave the page.
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_drawn_quietly(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str, scheme: str
) -> None:
    page = open_page(request.getfixturevalue(name), scheme=scheme)
    for figure in page.locator("figure[id]").all():
        if not figure.is_visible():  # another choice of axes
            continue
        for chart in figure.locator(".chart").all():
            box = chart.bounding_box()
            assert box["width"] > 200
            assert box["height"] > 80
    ink = page.locator("#figure-ttft .axes text").first.evaluate("e => getComputedStyle(e).fill")
    line = page.locator("#figure-ttft .line").first.evaluate("e => getComputedStyle(e).stroke")
    paper = page.locator("#figure-ttft").evaluate("e => getComputedStyle(e).backgroundColor")
    assert len({ink, line, paper}) == 3


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


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_scrolls_in_one_direction_only(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str, width: int
) -> None:
    page = open_page(request.getfixturevalue(name), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("one", "dark"),
        pytest.param("by_setting", "light", marks=pytest.mark.slow),
        pytest.param("by_machine", "dark", marks=pytest.mark.slow),
        pytest.param("hostile", "light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, axe: str, name: str, scheme: str
) -> None:
    page = open_page(request.getfixturevalue(name), scheme=scheme)
    # The tables under figures are made alike, and each run's provenance: one of them stands for all.
    opened = "section:not(#provenance) details:not(.numbers), #figure-ttft .numbers, "
    opened += "#provenance .card:first-of-type details"
    page.evaluate(f"document.querySelectorAll('{opened}').forEach(each => each.open = true)")
    page.evaluate(axe)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    said = [(each["id"], each["nodes"][0]["html"][:200], len(each["nodes"])) for each in found["violations"]]
    assert said == []


@pytest.mark.parametrize("name", ["by_setting", "by_machine"])
def test_six_runs_are_ranked_with_the_records_numbers(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str
) -> None:
    runs = request.getfixturevalue("settings" if name == "by_setting" else "machines")
    page = open_page(request.getfixturevalue(name))
    records = [run.read_record() for run in runs]
    medians = sorted(record.metrics["tpot_s"]["p50"]["value"] for record in records)
    ranked = page.locator("#figure-ranking .row-value").all_text_contents()
    assert [each.split(" (")[0] for each in ranked] == [format_value(each, "s") for each in medians]
    notes = page.locator("#figure-ranking .row-note").all_text_contents()
    assert not any(word in note for note in notes for word in ("better", "worse"))  # one run each
    assert page.locator(".better, .worse").count() == 0
    cells = page.locator("#scorecard tbody tr").all_inner_texts()
    for record, text in zip(records, cells, strict=True):
        for key in ("ttft_s", "tpot_s", "e2e_s"):
            p50 = record.metrics[key]["p50"]
            assert format_value(p50["value"], "s") in text
            assert format_interval(Reading(**p50), "s") in text
    points = page.locator("#figure-front .point").evaluate_all("all => all.map(each => each.dataset.tip)")
    for record in records:
        rate = record.metrics["output_tokens_per_s_per_gpu"]["steady_state"]
        assert any(f"{rate:.0f} output tok/s/GPU" in tip for tip in points)
    assert page.locator(".synthetic").is_visible()
    names = page.locator("#figure-ranking .row-name").all_text_contents()
    wanted = "max_seqs" if name == "by_setting" else "AMD Instinct MI300X"
    assert sum(wanted in each for each in names) == (6 if name == "by_setting" else 3)


def test_points_and_lines_are_drawn_where_their_values_are(
    open_page: Callable[..., Any], by_machine: Path, machines: list[RunDirectory]
) -> None:
    """Measured in pixels: neither a style nor a size moves a mark or makes a line a hair."""
    page = open_page(by_machine)
    chart = page.locator("#figure-front .chart")
    frame = chart.bounding_box()
    across, upward = json.loads(chart.get_attribute("data-axes"))
    rows = page.locator("#figure-front .point .shape").all()
    assert len(rows) == 6
    for run, mark in zip(machines, rows, strict=True):
        metrics = run.read_record().metrics
        values = (
            metrics["interactivity_tokens_per_s"]["p50"],
            metrics["output_tokens_per_s_per_gpu"]["steady_state"],
        )
        x, y = (
            (value - low) / (high - low)
            for value, (low, high, *_) in zip(values, (across, upward), strict=True)
        )
        box = mark.bounding_box()
        assert box["x"] + box["width"] / 2 == pytest.approx(frame["x"] + x * frame["width"], abs=1.5)
        assert box["y"] + box["height"] / 2 == pytest.approx(frame["y"] + (1 - y) * frame["height"], abs=1.5)
    # What a copy of a shared path looks like, only its pixels say.
    panel = page.locator("#figure-itl .chart").first
    ink = panel.locator(".line").evaluate("e => getComputedStyle(e).stroke")
    panel.scroll_into_view_if_needed()
    assert page.locator("defs path[id^=itl-]").first.get_attribute("vector-effect") == "non-scaling-stroke"
    assert ink != panel.evaluate("e => getComputedStyle(e.querySelector('.ghost')).stroke")


def test_hostile_names_stay_text(open_page: Callable[..., Any], hostile: Path) -> None:
    page = open_page(hostile)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("document.querySelector('h1').offsetHeight") < 200
    assert page.evaluate("document.querySelector('#what').offsetHeight") < 1500
    page.locator("#differences thead button").first.click()
    page.locator("#figure-ttft .frame").first.hover()


@pytest.mark.slow
def test_two_hundred_runs_open_at_once(
    open_page: Callable[..., Any], machines: list[RunDirectory], tmp_path: Path
) -> None:
    runs = []
    for number in range(200):
        path = shutil.copytree(machines[number % 6].path, tmp_path / f"{number:03}")
        run = RunDirectory.open(path)
        record = run.read_record()
        tpot = record.metrics["tpot_s"]
        slower = {key: value * (1 + number / 1000) for key, value in tpot["p50"].items()}
        metrics = record.metrics | {"tpot_s": tpot | {"p50": slower}}
        asked = {"backend": record.backend["asked"], "max_seqs": number}
        run.write_record(sign(run, replace(record, metrics=metrics, run=record.run | {"asked": asked})))
        runs.append(run)
    out = written(runs, tmp_path)
    assert out.stat().st_size < 15_000_000
    start = time.perf_counter()
    page = open_page(out)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert time.perf_counter() - start < 5
    assert page.locator("#scorecard tbody tr").count() == 200
    assert page.locator("#figure-ttft .chart").count() == 24
    assert page.get_by_text("24 of the 200 runs").is_visible()


def test_the_keyboard_reaches_everything(open_page: Callable[..., Any], by_setting: Path) -> None:
    page = open_page(by_setting)
    seen = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        here = page.evaluate("(e => e.id || e.className || e.name || e.localName)(document.activeElement)")
        if here == "body":
            break
        seen.add(here)
    assert {"skip", "brand", "front", "scroll", "download-json", "download-csv", "summary"} <= seen
    page.locator("input[value=front]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#figure-front-ttft").is_visible()
    assert not page.locator("#figure-front").is_visible()
    page.locator("#figure-ttft summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#numbers-ttft").is_visible()


def test_a_tooltip_reads_the_line_under_the_pointer(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one)
    chart = page.locator("#figure-ttft .chart").first
    chart.scroll_into_view_if_needed()
    table = page.locator("#numbers-ttft tbody tr")
    row = table.nth(4)  # the middle one of nine places
    x, y = (float(row.locator("td").nth(place).get_attribute("data-sort")) for place in (1, 3))
    low, high = json.loads(chart.get_attribute("data-axes"))[0][:2]
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * (x - low) / (high - low), box["y"] + 20)
    first, second = page.locator("#tip").inner_text().splitlines()
    assert first == f"TTFT {x:.3g} ms"
    assert float(second.removeprefix("torch: ").removesuffix(" %")) == pytest.approx(y, abs=1.0)


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
    color = "getComputedStyle(document.querySelector('#figure-ttft .line')).stroke"
    light = page.evaluate(color)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(color) != light


def test_paper_is_light_and_complete(open_page: Callable[..., Any], one: Path) -> None:
    page = open_page(one, scheme="dark")
    color = "getComputedStyle(document.documentElement).getPropertyValue('--card').trim()"
    assert page.evaluate(color) != "#ffffff"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(color) == "#ffffff"
    assert page.locator("details:not([open], .numbers)").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(color) != "#ffffff"
    assert page.locator("details:not([open])").count() > 0


@pytest.mark.parametrize("name", ["one", "by_setting"])
def test_paper_cuts_nothing_off_and_wraps_no_value(
    open_page: Callable[..., Any], request: pytest.FixtureRequest, name: str
) -> None:
    """At the width of A4 less its margins: upright for one run, sideways for several."""
    page = open_page(request.getfixturevalue(name), width=718 if name == "one" else 1030)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= (718 if name == "one" else 1030)
    wrapped = "all => all.filter(each => each.getClientRects().length > 1).map(each => each.textContent)"
    values = "#scorecard .value, #latency .value, .masonry .value, #scorecard .interval, #latency .interval"
    assert page.locator(values).evaluate_all(wrapped) == []
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
