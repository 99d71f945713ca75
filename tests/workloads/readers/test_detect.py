"""Formats declare themselves: one new file is a new format, and a line that two know is refused."""

import importlib
import sys
import textwrap

import pytest

from backbench.errors import WorkloadError
from backbench.workloads import readers
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.detect import detect, formats

# The whole of a new format: nothing else in the project names it.
NEW_FORMAT = '''
"""Made-up traces: CSV when,asked,said, milliseconds."""

from backbench.workloads.readers.format import has_columns, trace_format
from backbench.workloads.readers.text import Clock, read_csv
from backbench.workloads.trace import TraceRow

COLUMNS = ("when", "asked", "said")


def read_made_up(path, bad):
    clock = Clock("when")
    for place, row in read_csv(path, COLUMNS, bad):
        with bad.row():
            yield TraceRow(
                input_tokens=place.whole("asked", row["asked"], 1),
                output_tokens=place.whole("said", row["said"], 1),
                arrival_ns=clock.check(place, place.seconds_ns("when", row["when"], 1_000_000)),
            )


FORMAT = trace_format("made-up", has_columns(COLUMNS), read_made_up)
'''


@pytest.fixture
def add_format(tmp_path, monkeypatch):
    """Puts a module beside the readers, as a new file in their folder would be."""
    folder = tmp_path / "beside the readers"
    folder.mkdir()
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(folder)])
    added = []

    def add(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        added.append(f"{readers.__name__}.{name}")
        importlib.invalidate_caches()

    yield add
    for name in added:
        sys.modules.pop(name, None)
        vars(readers).pop(name.rpartition(".")[2], None)


def test_a_new_format_is_one_file(add_format, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("when,asked,said\n0,10,20\n1500,30,40\n")
    with pytest.raises(WorkloadError, match="is no trace known here"):
        detect(path)
    add_format("made_up", NEW_FORMAT)
    made = make(str(path), WorkloadOptions(time_scale=0.5, max_len=4096))
    assert [(r.arrival_ns, len(r.prompt), r.output_tokens) for r in made.requests] == [
        (0, 10, 20),
        (750_000_000, 30, 40),
    ]
    assert made.parameters["source"] == {"kind": "made-up", "data": "trace.csv"}
    with pytest.raises(WorkloadError, match="takes no --tick"):
        make(str(path), WorkloadOptions(tick="literal"))
    path.write_text("when,asked,said\n0,10,none\n")
    with pytest.raises(WorkloadError, match="line 2, field said: 'none' is no whole number"):
        make(str(path))
    path.write_text("a,b\n")
    with pytest.raises(WorkloadError, match=r"formats: aibrix, .*made-up"):
        detect(path)


def test_the_format_that_knows_more_of_the_names_wins_and_a_tie_is_an_error(add_format, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens,adapter\n")
    vidur = 'has_columns(("arrived_at", "num_prefill_tokens", "num_decode_tokens"))'
    imports = "from backbench.workloads.readers.format import has_columns, trace_format\n"
    longer = vidur.replace('num_decode_tokens"', 'num_decode_tokens", "adapter"')
    add_format("longer", f'{imports}FORMAT = trace_format("longer", {longer}, iter)')
    assert detect(path).name == "longer"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n")
    assert detect(path).name == "vidur"
    add_format("twin", f'{imports}FORMAT = trace_format("twin", {vidur}, iter)')
    with pytest.raises(WorkloadError, match="may be twin or vidur"):
        detect(path)


def test_the_formats_are_those_of_the_readers():
    names = [each.name for each in formats()]
    assert names == [
        "aibrix",
        "aiperf",
        "azure",
        "burstgpt",
        "llmservingsim",
        "lmbenchmark",
        "mooncake",
        "openai",
        "qwen-bailian",
        "ragpulse",
        "servegen",
        "sharegpt",
        "tracelab",
        "vidur",
        "weka",
    ]
    modules = {name.replace("-", "_") for name in names}
    assert all(hasattr(importlib.import_module(f"{readers.__name__}.{name}"), "FORMAT") for name in modules)
