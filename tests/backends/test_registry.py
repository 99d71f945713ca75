"""Backends are found by name, asked for explicitly, and never swapped silently."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

from backbench.backends import registry
from backbench.backends.interface import AttentionSpec, Backend
from backbench.backends.interface.device import cpu
from backbench.backends.torch import BACKEND as TORCH
from backbench.backends.torch.attention import TorchAttention
from backbench.errors import BackendError

SPEC = AttentionSpec(4, 2, 32, torch.float32, torch.float32, 16, 0.2)


class Refusing(TorchAttention):
    name = "refusing"

    def refusals(self, spec, device):
        return ["it never wants to"]


REFUSING = Backend("refusing", "Serves nothing.", attention=Refusing())


class BorrowedAttention(TorchAttention):
    name = "borrowed"


BORROWED = Backend("borrowed", "Attention only.", attention=BorrowedAttention())


@pytest.fixture
def plugins(monkeypatch):
    """Installed packages that add the backends above, beside torch alone."""
    monkeypatch.setattr(registry, "BUILT_IN", ("torch",))
    points = [
        EntryPoint(name, f"test_registry:{name.upper()}", registry.ENTRY_POINTS)
        for name in ("borrowed", "refusing")
    ]
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    loaded = {"borrowed": BORROWED, "refusing": REFUSING}
    monkeypatch.setattr(EntryPoint, "load", lambda point: loaded[point.name])


def select(name, **changes):
    return registry.select(name, device=cpu(), specs=[SPEC], dtype=torch.float32, **changes)


def test_torch_serves_everything():
    selection = select("torch")
    assert selection.used == {"attention": "torch", "linear": "torch", "operations": "torch"}
    assert selection.asked == "torch"
    assert registry.load("torch") is TORCH


def test_unknown_name_gives_the_nearest():
    with pytest.raises(BackendError, match=r"Unknown backend 'torhc'; did you mean torch\?"):
        registry.load("torhc")


def test_base_fills_what_a_backend_lacks(plugins):
    assert select("borrowed").used == {"attention": "borrowed", "linear": "torch", "operations": "torch"}


def test_a_refusal_names_reasons_and_alternatives(plugins):
    with pytest.raises(BackendError, match=r"refusing attention: it never wants to .*these would: torch"):
        select("refusing")


def test_overrides_replace_one_operation(plugins):
    assert select("torch", overrides={"attention": "borrowed"}).used["attention"] == "borrowed"
    with pytest.raises(BackendError, match="'borrowed' offers no linear"):
        select("torch", overrides={"linear": "borrowed"})
    with pytest.raises(BackendError, match="Unknown operation 'atention'"):
        select("torch", overrides={"atention": "torch"})
    with pytest.raises(BackendError, match="it never wants to"):
        select("torch", overrides={"attention": "refusing"})


def test_auto_records_whom_it_passed_over(plugins, monkeypatch):
    monkeypatch.setattr(registry, "AUTO_ORDER", {"cpu": ("refusing", "torch")})
    selection = select("auto")
    assert selection.asked == "auto" and selection.used["attention"] == "torch"
    assert selection.passed_over == {"refusing": ["refusing attention: it never wants to"]}


def test_auto_without_any_fit_says_why(plugins, monkeypatch):
    monkeypatch.setattr(registry, "AUTO_ORDER", {"cpu": ("refusing",)})
    with pytest.raises(BackendError, match=r"No backend serves .*it never wants to"):
        select("auto")


def test_availability(plugins):
    rows = {name: (ok, reasons) for name, ok, reasons in registry.availability(cpu())}
    assert rows["torch"] == (True, [])
    assert rows["refusing"] == (False, ["refusing attention: it never wants to"])


def test_two_backends_of_one_name_are_an_error(monkeypatch):
    points = [EntryPoint("torch", "elsewhere:BACKEND", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    with pytest.raises(BackendError, match="Two backends are named 'torch'"):
        registry.names()


def test_a_backend_that_cannot_be_imported_is_one_line(monkeypatch):
    points = [EntryPoint("broken", "no_such_module_anywhere:BACKEND", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    with pytest.raises(BackendError, match="'broken' cannot be imported: No module named"):
        registry.load("broken")


def test_a_module_without_a_backend_is_one_line(plugins, monkeypatch):
    monkeypatch.setattr(EntryPoint, "load", lambda point: None)
    with pytest.raises(BackendError, match="'borrowed' does not export a Backend"):
        registry.load("borrowed")


FILE = """from backbench.backends.interface import Backend
from backbench.backends.torch.attention import TorchAttention

BACKEND = Backend("mine", "From a file.", attention=TorchAttention())
"""


def test_a_file_is_a_backend(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    backend = registry.load(str(file))
    assert backend.name == "mine"
    assert registry.load(str(file)) is backend, "its module runs once"
    selection = select(str(file))
    assert selection.asked == str(file)
    assert selection.used == {"attention": "torch", "linear": "torch", "operations": "torch"}
    mixed = registry.load(f"prefill={file},decode=torch")
    assert mixed.attention.sides[0] is backend.attention


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "There is no backend file"),
        ("BACKEND = 3", "'wrong.py' exports no `BACKEND = Backend"),
        ("import nosuchmodule", "'wrong.py' cannot be run: ModuleNotFoundError: No module named"),
        ("def f(:", "'wrong.py' cannot be run: SyntaxError"),
    ],
)
def test_a_file_without_a_backend_is_one_line(tmp_path, text, complaint):
    file = tmp_path / "wrong.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BackendError, match=complaint) as caught:
        registry.load(str(file))
    assert "\n" not in str(caught.value)


def test_kernels_that_serve_are_known_and_say_their_operation():
    from backbench.backends.triton import KERNELS

    assert select("torch").kernels == ()
    device = cpu(interpret=True)
    chosen = registry.select("triton", device=device, specs=[SPEC], dtype=torch.float32)
    assert chosen.kernels == (KERNELS,)
    mixed = registry.load("prefill=triton,decode=torch")
    assert mixed.kernels is KERNELS
    assert registry.kernel_operation("backbench.backends.triton.gemm") == "linear"
    assert registry.kernel_operation("backbench.backends.triton.fused_write") == "attention"
    assert registry.kernel_operation("somebody.elses") is None
