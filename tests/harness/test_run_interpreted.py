"""`bench run --interpret`: every Triton kernel of a run, in the interpreter, from prompt to record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backbench.reports.metrics.validity import DISTURBED, INTERPRETED
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

BENCH = "from backbench.harness.cli import main; main()"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 32, 4, 2, 16, 48, 64


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random Llama of two layers."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    norm = torch.ones(HIDDEN)
    tensors = {
        "model.embed_tokens.weight": weight(VOCAB, HIDDEN) * 5,
        "lm_head.weight": weight(VOCAB, HIDDEN),
        "model.norm.weight": norm.clone(),
    }
    for index in range(2):
        layer = {
            "self_attn.q_proj": weight(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": weight(HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": weight(FFN, HIDDEN),
            "mlp.up_proj": weight(FFN, HIDDEN),
            "mlp.down_proj": weight(HIDDEN, FFN),
            "input_layernorm": norm.clone(),
            "post_attention_layernorm": norm.clone(),
        }
        tensors |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled here")
def test_two_requests_run_right_in_the_interpreter(checkpoint: Path, tmp_path: Path) -> None:
    """fp16, so that the skinny products run too: fp32 goes to the library."""
    out = tmp_path / "run"
    command = ["run", "--backend", "triton", "--interpret", "--model", str(checkpoint), "--dtype", "float16"]
    command += ["--workload", "batch:2x6+4", "--warmup", "0", "--max-len", "28", "--max-step-tokens", "64"]
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *command, "--max-seqs", "4", "--out", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    directory = RunDirectory.open(out)
    record = directory.read_record()
    assert record.run["status"] == "complete"
    assert [each for each in record.validity if not each.startswith(DISTURBED)] == [INTERPRETED]
    assert record.metrics["counts"]["completed"] == 2
    assert record.backend["used"] == {"attention": "triton", "linear": "triton", "operations": "triton"}
    assert record.backend["tuned"] == {"attention": None, "linear": None, "operations": None}
    assert record.system["device"]["interpreter"] is True
    assert record.correctness["passed"] is True
    assert record.correctness["against_itself"] is False
    assert verify(directory) == []
