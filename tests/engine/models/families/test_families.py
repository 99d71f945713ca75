"""A model family is one file: found by being there, and computed as transformers computes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models import families
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import whole_sequences
from backbench.errors import EngineError

PAGE = Path(__file__).parents[4] / "docs" / "models.md"
BLOCK = re.compile(r"^```python file=renamed\.py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WINDOW = 6


@pytest.fixture
def renamed(tmp_path):
    """A checkpoint of an architecture nobody knows, and what transformers makes of the same weights: Mistral
    is a Llama with a window."""
    torch.manual_seed(0)
    shape = MistralConfig(
        sliding_window=WINDOW,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["RenamedForCausalLM"], "model_type": "renamed"}
    del config["eos_token_id"]
    file.write_text(json.dumps(config | {"sliding_window": WINDOW}))
    return tmp_path / "model", model


def test_adding_a_family_touches_one_file(renamed, tmp_path, monkeypatch):
    """The file is that of docs/models.md, as it stands."""
    folder, model = renamed
    with pytest.raises(EngineError, match="Unknown architecture 'RenamedForCausalLM'; known are Llama"):
        _ = find_model(str(folder)).config
    (tmp_path / "plugged").mkdir()
    (only,) = BLOCK.findall(PAGE.read_text())
    (tmp_path / "plugged" / "renamed.py").write_text(only)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "plugged")])
    source = find_model(str(folder))
    assert source.config.architecture == "renamed" and source.config.eos_token_ids == (9,)
    settings = EngineConfig(block_size=4, max_seqs=2, max_step_tokens=32, num_blocks=16)
    decoder = Engine.open(source, backend="torch", device=detect(), config=settings).decoder
    ids = torch.arange(20) * 3
    batch = whole_sequences([20], 4, torch.device("cpu"))
    found = decoder.logits(decoder.forward(ids, torch.arange(20), batch, decoder.new_caches(5)))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_each_file_of_the_folder_is_a_family():
    found = families.families()
    assert set(found) >= {"llama", "mistral", "qwen2", "qwen3"}
    assert all(name == family.name for name, family in found.items())
    assert found["qwen2"].qkv_bias and found["qwen3"].qk_norm
