"""A bundle from a stranger: hostile, damaged or changed ones are one line, and nothing of them is used."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_LZMA, ZIP_STORED, ZipFile, ZipInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import INVALID, BackbenchError, ReportError
from backbench.harness.cli import run_command
from backbench.reports.pack import pack
from backbench.reports.record import RunDirectory, bundle
from backbench.reports.record.bundle import expand, is_dir, is_file, read_bytes

OLD = Path(__file__).parents[1] / "fixtures" / "schema-1"

Files = dict[str, bytes]


def bench(*arguments: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return run_command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "good.zip"
    pack([OLD / "torch"], out)
    return out


@pytest.fixture
def files(packed: Path) -> Files:
    with ZipFile(packed) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, files: Files, compression: int = ZIP_STORED) -> Path:
    with ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def refused(path: Path, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that every command says of it."""
    lines = set()
    for arguments in (
        ["show", str(path)],
        ["verify", str(path)],
        ["compare", str(path), str(OLD / "sdpa")],
        ["report", str(path), "-o", str(path.parent / "page.html")],
        ["pack", str(path), "-o", str(path.parent / "again.zip")],
    ):
        capsys.readouterr()
        assert bench(*arguments) == code, arguments
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("error: ") and len(line) < 300 and line.isprintable()
        lines.add(line)
    (line,) = lines
    return line


def test_paths_into_a_bundle_are_paths(packed: Path) -> None:
    assert expand(packed) == [packed / "run-1"]
    assert is_dir(packed) and is_dir(packed / "run-1") and not is_dir(packed / "run-2")
    assert is_file(packed / "run-1" / "run.json") and not is_file(packed / "run-1")
    assert read_bytes(packed / "run-1" / "steps.parquet") == (OLD / "torch" / "steps.parquet").read_bytes()
    with pytest.raises(FileNotFoundError):
        read_bytes(packed / ".." / "good.zip" / "run-9" / "run.json")


def test_a_directory_that_is_called_like_a_bundle_is_one(tmp_path: Path) -> None:
    (tmp_path / "runs.zip").mkdir()
    (tmp_path / "runs.zip" / "run.json").write_text("x")
    assert expand(tmp_path / "runs.zip") == [tmp_path / "runs.zip"]
    assert read_bytes(tmp_path / "runs.zip" / "run.json") == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "../run.json",
        "/etc/passwd",
        "run-1/../../run.json",
        "run-1\\run.json",
        "C:/run.json",
        "run-1/run.json/",
        "run-1/",
        "run-1/report.html",
        "run-1/\x1b[31m",
        "experiment-1/1/2/run.json",
        "run-１/run.json",
        "x" * 5000,
    ],
)
def test_other_names_are_refused(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = write(tmp_path / "b.zip", {**files, name: b"{}"})
    assert "which no run directory has" in refused(path, capsys)
    assert {each.name for each in tmp_path.iterdir()} == {"b.zip"}


def test_a_name_cut_by_a_null_byte_is_refused(tmp_path: Path, files: Files) -> None:
    path = write(tmp_path / "b.zip", {**files, "run-2/run.json~": b"{}"})
    path.write_bytes(path.read_bytes().replace(b"run-2/run.json~", b"run-2/run.json\x00"))
    with pytest.raises(ReportError, match="which no run directory has"):
        expand(path)


def with_link(path: Path, files: Files) -> None:
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = ZipInfo(name)
            mode = stat.S_IFLNK if name.endswith("run.json") else stat.S_IFREG
            info.create_system, info.external_attr = 3, (mode | 0o777) << 16
            archive.writestr(info, content)


def with_duplicate(path: Path, files: Files) -> None:
    with ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name, content in [*files.items(), ("run-1/run.json", b"{}")]:
            archive.writestr(name, content)


def with_encryption(path: Path, files: Files) -> None:
    write(path, files)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (with_link, "is a link or no regular file"),
        (with_duplicate, "holds run-1/run.json twice"),
        (with_encryption, "is encrypted"),
        (lambda path, files: write(path, files, ZIP_LZMA), "compressed in another way"),
        (lambda path, files: write(path, {"run-1/run.json": b"{}"}), "holds no bundle.json"),
        (lambda path, files: write(path, {}), "holds no bundle.json"),
        (lambda path, files: path.write_text("not a zip"), "is no whole zip file"),
        (lambda path, files: path.write_bytes(b""), "is no whole zip file"),
    ],
)
def test_what_no_bundle_is(
    tmp_path: Path,
    files: Files,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Files], object],
    said: str,
) -> None:
    make(tmp_path / "b.zip", files)
    assert said in refused(tmp_path / "b.zip", capsys)


def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MOST_BYTES", 2**22)
    path = write(tmp_path / "b.zip", files | {"run-1/steps.parquet": bytes(2**23)}, ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    assert "it unpacks to" in refused(path, capsys)


def test_a_bomb_that_lies_about_its_size_is_cut(tmp_path: Path, files: Files) -> None:
    path = write(tmp_path / "b.zip", files | {"run-1/steps.parquet": bytes(2**23)}, ZIP_DEFLATED)
    said = (2**23).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(said, (1000).to_bytes(4, "little")))
    with pytest.raises(ReportError, match=r"is damaged \(run-1/steps.parquet"):
        expand(path)


def test_too_many_files_are_refused(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MOST_FILES", 4)
    with pytest.raises(ReportError, match="it has 5 files, more than 4"):
        expand(write(tmp_path / "b.zip", files))


def test_files_that_overlap_are_refused(tmp_path: Path, files: Files) -> None:
    """The quine of zip bombs: many names for one stretch of bytes."""
    path = write(tmp_path / "b.zip", files)
    with ZipFile(path, "a") as archive:
        for number in range(2, 40):
            info = archive.getinfo("run-1/steps.parquet")
            copy = ZipInfo(f"run-{number}/steps.parquet")
            for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copy, name, getattr(info, name))
            archive.filelist.append(copy)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ReportError, match="its files overlap"):
        expand(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_bundle_is_one_line(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    content = packed.read_bytes()
    (tmp_path / "b.zip").write_bytes(content[: int(share * len(content))])
    assert "is no whole zip file" in refused(tmp_path / "b.zip", capsys)


def test_a_missing_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no run directory" in refused(tmp_path / "b.zip", capsys)


@pytest.mark.parametrize(
    ("version", "said"),
    [(2, "of a newer Backbench"), (0, "use the version that wrote it"), (None, "schema_version None")],
)
def test_other_versions(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str], version: int | None, said: str
) -> None:
    manifest = json.loads(files["bundle.json"]) | {"schema_version": version}
    path = write(tmp_path / "b.zip", files | {"bundle.json": json.dumps(manifest).encode()})
    assert said in refused(path, capsys)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000, b'{"schema_version": 1}'])
def test_an_odd_manifest_is_one_line(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = write(tmp_path / "b.zip", files | {"bundle.json": content})
    refused(path, capsys, INVALID if content.endswith(b"1}") else 2)


def test_a_changed_file_is_one_line_and_not_valid(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = files["run-1/run.json"].replace(b'"seed": 0', b'"seed": 1')
    path = write(tmp_path / "b.zip", files | {"run-1/run.json": edited})
    assert "run-1/run.json is not the file that was packed" in refused(path, capsys, INVALID)


def test_a_file_more_or_less_is_one_line_and_not_valid(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    less = {name: content for name, content in files.items() if not name.endswith("steps.parquet")}
    for name, given_files in (("less", less), ("more", {**files, "run-2/run.json": b"{}"})):
        path = write(tmp_path / f"{name}.zip", given_files)
        assert "lists other files than are there" in refused(path, capsys, INVALID)


def test_one_who_writes_the_digests_anew_is_found_by_verify(
    tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    record = json.loads(files["run-1/run.json"])
    record["metrics"]["output_tokens_per_s"]["whole_run"] = 9999.0
    files["run-1/run.json"] = json.dumps(record).encode()
    manifest = json.loads(files["bundle.json"])
    manifest["files"]["run-1/run.json"] = hashlib.sha256(files["run-1/run.json"]).hexdigest()
    path = write(tmp_path / "b.zip", files | {"bundle.json": json.dumps(manifest).encode()})
    assert bench("show", str(path)) == 0
    assert f"tampered: {path}/run-1: run.json was edited" in capsys.readouterr().err
    assert bench("verify", str(path)) == INVALID
    assert "metrics.output_tokens_per_s.whole_run is 9999.0" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_byte_is_a_crash_or_goes_unseen(
    data: st.DataObject, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(packed.read_bytes())
    directory = content.index(b"PK\x01\x02")
    headers = data.draw(st.booleans())  # most of the bytes are tables: look at the zip's own more often
    at = data.draw(st.integers(directory if headers else 0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flipped") / "b.zip"
    path.write_bytes(content)
    try:
        entries = expand(path)
    except BackbenchError as error:
        assert "\n" not in str(error)
        return
    assert entries == [path / "run-1"]
    for name in ("run.json", "requests.parquet", "steps.parquet", "telemetry.parquet"):
        assert read_bytes(path / "run-1" / name) == read_bytes(packed / "run-1" / name)
    assert RunDirectory.open(path).read_record() == RunDirectory.open(packed).read_record()


def test_the_limit_that_the_documentation_states() -> None:
    assert bundle.MOST_BYTES == 2**30 and bundle.MOST_FILES == 20_000
