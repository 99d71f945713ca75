"""docs/what-to-touch.md: its numbers, the files it names, and its example of a trace format as it stands."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backbench.backends.interface import AttentionSpec
from backbench.backends.interface.device import cpu
from backbench.backends.registry import select
from backbench.errors import ReportError, WorkloadError
from backbench.reports import importing
from backbench.reports.importing.format import import_file
from backbench.workloads import readers
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "what-to-touch.md").read_text()
ROW = re.compile(r"^\| (an? [\w ]+) \| (\d).*? \| (.*?) \| (.*?) ?\|$", re.MULTILINE)
ADDITIONS = {name: (int(files), where, proof.strip()) for name, files, where, proof in ROW.findall(PAGE)}
AT_MOST = {
    "a backend": 0,
    "a collective": 0,
    "a trace format": 1,
    "a reader of foreign results": 1,
    "a model family": 1,
    "a metric": 1,
    "a report section": 2,
    "a proposer": 3,
    "a subject": 3,
    "a scheduler change": 1,
}


def test_each_addition_touches_at_most_so_many_files() -> None:
    assert ADDITIONS.keys() == AT_MOST.keys()
    for name, (files, _, _) in ADDITIONS.items():
        assert files <= AT_MOST[name], name


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(r"`((?:workloads|engine|reports|harness|backends|tests)/[\w/.-]*)`", PAGE)
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name


def test_a_proof_is_a_test_that_runs() -> None:
    proofs = {name: proof.strip("`") for name, (_, _, proof) in ADDITIONS.items() if proof}
    assert proofs.keys() == AT_MOST.keys() - {"a scheduler change"}
    for proof in proofs.values():
        assert "\ndef test_" in (ROOT / proof).read_text()


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's example, in a folder beside the readers'."""
    match = re.search(
        r"^```python file=workloads/readers/(\w+)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
    assert match is not None
    folder = tmp_path / "readers"
    folder.mkdir()
    (folder / f"{match[1]}.py").write_text(match[2])
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop(f"{readers.__name__}.{match[1]}", None)
    vars(readers).pop(match[1], None)


def test_the_pages_trace_format_is_one_file(gateway: None, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("received_ms,prompt,completion\n0,10,20\n1500,30,40\n")
    made = make(str(path), WorkloadOptions(time_scale=0.5, max_len=4096))
    assert [(each.arrival_ns, len(each.prompt), each.output_tokens) for each in made.requests] == [
        (0, 10, 20),
        (750_000_000, 30, 40),
    ]
    assert made.parameters["source"]["kind"] == "gateway"
    path.write_text("received_ms,prompt,completion\n0,10,none\n")
    with pytest.raises(WorkloadError, match="line 2, field completion: 'none' is no whole number"):
        make(str(path))


def test_the_example_is_no_format_of_the_product(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("received_ms,prompt,completion\n0,10,20\n")
    with pytest.raises(WorkloadError, match="is no trace known here"):
        make(str(path))


COLLECTIVE = """
from backbench.backends.interface import Backend
from backbench.backends.torch.collectives import TorchCollectives


class Ring(TorchCollectives):
    name = "ring"


BACKEND = Backend(name="ring", summary="sums in a ring", collectives=Ring())
"""


def test_a_collective_is_a_file_outside(tmp_path: Path) -> None:
    path = tmp_path / "ring.py"
    path.write_text(COLLECTIVE)
    spec = AttentionSpec(4, 2, 16, torch.float32, torch.float32, 16, 0.25)
    for name, overrides in (("torch", {"collectives": str(path)}), (str(path), {})):
        found = select(name, device=cpu(), specs=[spec], dtype=torch.float32, overrides=overrides, world=2)
        assert found.used["collectives"] == "ring"


IMPORT = """
from backbench.reports.importing.foreign import Foreign, ForeignRequest
from backbench.reports.importing.format import Import


def read(path, documents):
    rows = tuple(
        ForeignRequest(each["at"], 10, (each["at"] + 0.5, each["at"] + 0.75), (1, 1))
        for each in documents
    )
    return [Foreign("stopwatch", None, None, "by hand", requests=rows)]


IMPORT = Import("stopwatch", "requests timed by hand", lambda first: "at" in first, read)
"""


def test_a_reader_of_foreign_results_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.json"
    results.write_text('[{"at": 1.0}, {"at": 3.0}]')
    with pytest.raises(ReportError, match="of no format that is known here"):
        import_file(results, tmp_path / "none")
    folder = tmp_path / "importing"
    folder.mkdir()
    (folder / "stopwatch.py").write_text(IMPORT)
    monkeypatch.setattr(importing, "__path__", [*importing.__path__, str(folder)])
    importlib.invalidate_caches()
    try:
        ((_, record),) = import_file(results, tmp_path / "run")
    finally:
        sys.modules.pop(f"{importing.__name__}.stopwatch", None)
        vars(importing).pop("stopwatch", None)
    assert record.run["imported"]["tool"] == "stopwatch"
    assert record.metrics["ttft_s"]["mean"] == pytest.approx(0.5)
