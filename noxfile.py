"""Developer sessions: `nox --list` names them, `nox -s tests` runs one."""

import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint", "types", "imports"]
nox.options.default_venv_backend = "venv"

CONSTRAINTS = ("-c", "constraints.txt")


def install(session: nox.Session) -> None:
    """The project with its test extra, editable, at the pinned versions."""
    session.install(*CONSTRAINTS, "-e", ".[test]")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole CPU test suite."""
    install(session)
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    install(session)
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The import contract: arrows point one way."""
    install(session)
    session.run("lint-imports")


@nox.session
def browser(session: nox.Session) -> None:
    """The report in headless Chromium."""
    install(session)
    session.run("pytest", "-m", "browser", *session.posargs)


@nox.session
def interp(session: nox.Session) -> None:
    """Triton kernels in the interpreter, against the torch reference."""
    install(session)
    session.run("pytest", "tests/backends/triton", *session.posargs)


@nox.session
def aot(session: nox.Session) -> None:
    """Every Triton kernel for every target, against the committed baseline."""
    install(session)
    session.run("bench", "portability", *session.posargs)


@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """Tests that need a GPU; uses the machine's own torch."""
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel, install it into a clean environment and use it from another directory."""
    session.install(*CONSTRAINTS, "build")
    wheels = Path(session.create_tmp()) / "dist"
    for old in wheels.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(wheels), silent=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (names,) = (name for name in archive.namelist() if name.endswith("/top_level.txt"))
        if archive.read(names).split() != [b"backbench"]:
            session.error("the wheel installs other import names than backbench")
    session.install(*CONSTRAINTS, f"{wheel}[engine]")
    with session.chdir(session.create_tmp()):
        session.run("bench", "models")
        out = Path("run").resolve()
        session.run("rm", "-rf", str(out), external=True)
        session.run(
            "bench",
            "run",
            "--workload",
            "synthetic",
            "--backend",
            "torch",
            "--num-requests",
            "4",
            "--out",
            str(out),
        )
        session.run("bench", "verify", str(out))
