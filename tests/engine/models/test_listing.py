"""The list of models says what loading them would, and imports no torch."""

from __future__ import annotations

import subprocess
import sys

from backbench.engine.models.checkpoint import find_model, model_names
from backbench.engine.models.listing import listed_models


def test_the_list_is_what_the_models_are() -> None:
    found = listed_models()
    assert [each.name for each in found] == model_names()
    for each in found:
        config = find_model(each.name).config
        assert (each.architecture, each.parameters, each.layers, each.context) == (
            config.architecture,
            config.num_parameters,
            config.num_layers,
            config.max_len,
        )
        assert each.weights == ("random" if each.name.startswith("shape:") else "bundled")


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from backbench.harness.cli import run_command\n"
        "run_command(['models']); run_command(['models', '--json'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout
