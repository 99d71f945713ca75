"""Write the quantized checkpoints under `tests/engine/models/fixtures` with the public tools themselves.

    python tools/quantized_fixtures.py tests/engine/models/fixtures llmcompressor   # and transformers' fp8
    python tools/quantized_fixtures.py tests/engine/models/fixtures gptqmodel

Each tool needs an environment of its own (CPU builds do):

    pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1
    pip install torch==2.14.1 && BUILD_CUDA_EXT=0 pip install --no-build-isolation gptqmodel==7.7.0

Every fixture is the same random Llama of one layer, quantized by one scheme, with `expected.safetensors`: the
logits that the tool's own loading gives for a fixed prompt. `how.json` says who wrote it and who read it.
Names of fixtures after the tool write those only.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import load_file, save_file

PROMPT_TOKENS = 32
CALIBRATION = (16, 128)
"""Random sequences, tokens each: only ranges of activations are taken from them, or Hessians."""
KEPT = ("config.json", "model.safetensors")
LINEAR_CLASSES = ["Linear"]
TYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("tool", choices=("llmcompressor", "gptqmodel"))
    parser.add_argument("names", nargs="*", help="fixtures to write; all of the tool's by default")
    arguments = parser.parse_args()
    cases = compressed_tensors_cases() if arguments.tool == "llmcompressor" else gptqmodel_cases()
    for name in arguments.names or list(cases):
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(temporary) / "base"
            write_base(base, untied=name == "ct-mixed")
            written = Path(temporary) / "written"
            how = cases[name](base, written)
            keep(written, arguments.out / name, how)
            print(name, sum(file.stat().st_size for file in (arguments.out / name).iterdir()), flush=True)


def write_base(folder: Path, *, untied: bool) -> None:
    """The model before quantization: big enough for two groups of 128, and no bigger."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=256,
        initializer_range=256**-0.5,  # what a layer adds weighs as much as the embedding it is added to
        tie_word_embeddings=not untied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One that knows every id as a word: the tools ask for one, and nothing here needs it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"t{index}": index for index in range(256)}, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", pad_token="t0", eos_token="t1")
    fast.save_pretrained(folder)


def keep(written: Path, folder: Path, how: dict[str, Any]) -> None:
    """Only what a reader needs, the expected logits, and how they came about."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(written / name, folder / name)
    save_file({"ids": prompt(), "logits": how.pop("logits")}, folder / "expected.safetensors")
    (folder / "how.json").write_text(json.dumps(how, indent=2) + "\n")


def prompt() -> torch.Tensor:
    """Token ids i64[PROMPT_TOKENS], the same for every fixture."""
    return torch.randint(0, 256, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(2))


def calibration() -> list[list[int]]:
    """Random token ids for what a tool must see run."""
    return torch.randint(0, 256, CALIBRATION, generator=torch.Generator().manual_seed(1)).tolist()


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}


# compressed-tensors, by llm-compressor; and DeepSeek's fp8, by renaming


def compressed_tensors_cases() -> dict[str, Callable[[Path, Path], dict[str, Any]]]:
    """Fixture -> what writes it.

    "bf16": compressed-tensors makes dense weights of these only in bf16, which changes NVFP4's; in fp32 from
    there on, so that no rounding of activations falls otherwise for want of digits.
    """
    presets = {
        "ct-w4a16": ("W4A16", "fp32"),
        "ct-w4a16-asym": ("W4A16_ASYM", "fp32"),
        "ct-w8a16": ("W8A16", "fp32"),
        "ct-w8a8": ("W8A8", "fp32"),
        "ct-fp8": ("FP8", "fp32"),
        "ct-fp8-dynamic": ("FP8_DYNAMIC", "fp32"),
        "ct-fp8-block": ("FP8_BLOCK", "fp32"),
        "ct-nvfp4a16": ("NVFP4A16", "bf16"),
        "ct-nvfp4": ("NVFP4", "bf16"),
        "ct-mxfp4a16": ("MXFP4A16", "bf16"),
        "ct-mxfp4": ("MXFP4", "bf16"),
        "ct-mxfp8": ("MXFP8", "bf16"),
    }
    by_preset = {
        name: _compressor(f'scheme="{preset}"', {"scheme": preset}, weights)
        for name, (preset, weights) in presets.items()
    }
    return {
        **by_preset,
        "ct-w8a8-static": _compressor("int8 W8A8, static per-tensor activations", _static_int8(), "fp32"),
        "ct-mixed": _compressor(
            "attention W4A16 g32 asymmetric, gate and up FP8_DYNAMIC, head W8A16 per channel; down ignored",
            _mixed(),
            "fp32",
        ),
        "deepseek-fp8": _deepseek,
    }


def _static_int8() -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = {"targets": LINEAR_CLASSES, "weights": weights, "input_activations": inputs}
    return {"config_groups": {"group_0": group}}


def _mixed() -> dict[str, Any]:
    int4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    token = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*_proj$"], "weights": int4},
            "group_1": {
                "targets": ["re:.*gate_proj$", "re:.*up_proj$"],
                "weights": fp8,
                "input_activations": token,
            },
            "group_2": {"targets": ["re:.*lm_head"], "weights": int8},
        },
        "ignore": ["re:.*down_proj$"],
    }


def _compressor(
    described: str, settings: dict[str, Any], weights: str
) -> Callable[[Path, Path], dict[str, Any]]:
    def write(base: Path, out: Path) -> dict[str, Any]:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from transformers import AutoModelForCausalLM

        rows = calibration()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        given = {"targets": "Linear", "ignore": ["lm_head"], **copy.deepcopy(settings)}
        if "config_groups" in given:
            del given["targets"]
        oneshot(
            model=model,
            dataset=data,
            recipe=QuantizationModifier(**given),
            max_seq_length=CALIBRATION[1],
            num_calibration_samples=CALIBRATION[0],
        )
        model.save_pretrained(out, save_compressed=True)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=TYPE[weights])
        with torch.no_grad():
            loaded(prompt()[None])  # the first pass makes the weights dense
        torch.nn.Module.float(loaded)  # the model's own refuses, for the sake of weights that are not
        return {
            "written_by": f"llmcompressor.oneshot, QuantizationModifier: {described}",
            "expected_by": "transformers with compressed-tensors, on a CPU in fp32",
            "dense_weights": weights,
            "versions": versions("llmcompressor", "compressed-tensors"),
            "logits": logits(loaded),
        }

    return write


def _deepseek(base: Path, out: Path) -> dict[str, Any]:
    """No tool writes this one on a CPU: the layout is that of FP8_BLOCK with the scale under another name.

    Source: transformers' FineGrainedFP8Config, and DeepSeek-V3's README_WEIGHTS.md.
    """
    block = out.parent / "block"
    how = _compressor("", {"scheme": "FP8_BLOCK"}, "fp32")(base, block)
    out.mkdir()
    tensors = load_file(block / "model.safetensors")
    renamed = {
        name.replace("weight_scale", "weight_scale_inv"): tensor.float() if "scale" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((block / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return {
        "written_by": "llmcompressor FP8_BLOCK; weight_scale renamed to weight_scale_inv, fp32",
        "expected_by": "transformers, FineGrainedFP8Config(dequantize=True), on a CPU in fp32",
        "dense_weights": "fp32",
        "versions": how["versions"],
        "logits": _dequantized_by_transformers(out),
    }


def _dequantized_by_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    """[PROMPT_TOKENS, vocab]"""
    with torch.no_grad():
        return model.eval()(prompt()[None]).logits[0].clone().contiguous()


# GPTQ and AWQ, by GPTQModel


def gptqmodel_cases() -> dict[str, Callable[[Path, Path], dict[str, Any]]]:
    """Fixture -> what writes it."""
    settings: dict[str, dict[str, Any]] = {
        "gptq-w4": {"bits": 4, "group_size": 128, "sym": True},
        "gptq-w4-asym": {"bits": 4, "group_size": 128, "sym": False},
        "gptq-w4-act-order": {"bits": 4, "group_size": 128, "sym": True, "desc_act": True},
        "gptq-w8": {"bits": 8, "group_size": 32, "sym": True},
        "gptq-v2-w4-asym": {"bits": 4, "group_size": 128, "sym": False, "format": "gptq_v2"},
        "gptq-mixed": {
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "dynamic": {
                "-:.*down_proj": {},
                "+:.*(gate|up)_proj": {"bits": 8, "group_size": 32, "sym": False},
            },
        },
        "awq-w4": {"bits": 4, "group_size": 128, "sym": False, "method": "awq", "format": "gemm"},
    }
    return {name: _gptqmodel(each) for name, each in settings.items()}


def _gptqmodel(settings: dict[str, Any]) -> Callable[[Path, Path], dict[str, Any]]:
    def write(base: Path, out: Path) -> dict[str, Any]:
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        given = {"desc_act": False, **settings}
        model = GPTQModel.load(str(base), QuantizeConfig(**given, device="cpu"))
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration()])
        model.save(str(out))
        backend = BACKEND.TORCH if settings.get("method") != "awq" else BACKEND.TORCH_AWQ
        loaded = GPTQModel.load(str(out), device="cpu", backend=backend, dtype=torch.float16)
        return {
            "written_by": f"GPTQModel, QuantizeConfig({', '.join(f'{k}={v!r}' for k, v in given.items())})",
            "expected_by": f"GPTQModel.load(backend={backend}), on a CPU in fp16",
            "dense_weights": "fp16",
            "versions": versions("gptqmodel"),
            "logits": logits(loaded.model),
        }

    return write


if __name__ == "__main__":
    main()
