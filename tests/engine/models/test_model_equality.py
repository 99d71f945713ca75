"""The decoder against transformers: same weights, chunked prefill over permuted blocks, fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backbench.backends.interface import Batch
from backbench.backends.interface.device import cpu
from backbench.backends.registry import select
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, Wanted, attention_specs

VOCAB = 199
BLOCK = 16
PROMPTS = (37, 5)
NEW_TOKENS = 64
MAX_LEN = 128
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@dataclass(frozen=True)
class Case:
    architecture: str
    q_heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    rope: str = "default"
    window: int | None = None
    max_window_layers: int = 0

    def hf_config(self):
        changes = {}
        if self.architecture in ("mistral", "qwen2", "qwen3"):
            changes["sliding_window"] = self.window
        if self.architecture in ("qwen2", "qwen3"):
            changes["use_sliding_window"] = self.window is not None
            changes["max_window_layers"] = self.max_window_layers
        free = self.architecture in ("mistral", "qwen3")
        hidden_size = 64 if free else self.q_heads * self.head_dim
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=VOCAB,
            hidden_size=hidden_size,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=self.q_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=MAX_LEN,
            rope_parameters=dict(ROPES[self.rope]),
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **changes,
        )


CASES = [
    Case("llama", 4, 4, 32),
    Case("llama", 4, 1, 64, tied=True, rope="llama3"),
    Case("llama", 7, 1, 80, rope="yarn"),
    Case("llama", 8, 2, 128, rope="linear"),
    Case("mistral", 4, 1, 32),
    Case("mistral", 7, 1, 64, window=8),
    Case("mistral", 4, 4, 128, tied=True, window=19, rope="yarn"),
    Case("qwen2", 7, 1, 64, rope="yarn"),
    Case("qwen2", 4, 4, 80, tied=True),
    Case("qwen2", 4, 1, 32, window=8, max_window_layers=1),
    Case("qwen3", 4, 4, 128),
    Case("qwen3", 7, 1, 32, tied=True, rope="linear"),
    Case("qwen3", 4, 1, 80, rope="llama3", window=20, max_window_layers=1),
]


class PagedBatches:
    """Builds batches for a set of sequences whose blocks lie in a random order, after one junk block."""

    def __init__(self, num_sequences: int, max_len: int) -> None:
        self.blocks_each = -(-max_len // BLOCK)
        count = num_sequences * self.blocks_each
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1)) + 1
        self.num_blocks = count + 1
        self.table = order.view(num_sequences, self.blocks_each).int()
        self.computed = [0] * num_sequences

    def step(self, tokens_of_row: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor, Batch]:
        """(ids, positions, batch) that appends tokens to rows; single tokens must come first."""
        rows, ids, positions, slots, starts = list(tokens_of_row), [], [], [], [0]
        for row, tokens in tokens_of_row.items():
            position = torch.arange(self.computed[row], self.computed[row] + len(tokens))
            self.computed[row] += len(tokens)
            ids += tokens
            positions.append(position)
            slots.append(self.table[row, position // BLOCK].long() * BLOCK + position % BLOCK)
            starts.append(len(ids))
        lengths = [self.computed[row] for row in rows]
        counts = [len(tokens) for tokens in tokens_of_row.values()]
        batch = Batch(
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=self.table[rows],
            slots=torch.cat(slots),
            num_seqs=len(rows),
            num_tokens=len(ids),
            num_decodes=sum(count == 1 for count in counts),
            max_query=max(counts),
            max_len=max(lengths),
        )
        return torch.tensor(ids), torch.cat(positions), batch


def save_random(case: Case, folder) -> Any:
    """A random transformers model of the case, saved to `folder`; its weights are large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.hf_config(), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model


def open_decoder(name: str, backend: str = "torch") -> Decoder:
    source = find_model(name)
    limits = StepLimits(block_size=BLOCK, max_len=MAX_LEN, max_seqs=4, max_step_tokens=60, prefill_chunk=60)
    specs = attention_specs(source.config, dtype=torch.float32, limits=limits)
    selection = select(backend, device=cpu(), specs=specs, dtype=torch.float32)
    weights = source.load_weights(torch.device("cpu"), torch.float32)
    return Decoder(source.config, weights, selection, dtype=torch.float32, limits=limits)


def random_decoder(case: Case, folder) -> Decoder:
    """The case with random weights, read back from a checkpoint."""
    save_random(case, folder)
    return open_decoder(str(folder))


def fresh(decoder: Decoder, num_sequences: int) -> tuple[PagedBatches, list[Any]]:
    """Empty sequences and the caches that hold their blocks."""
    pages = PagedBatches(num_sequences, MAX_LEN)
    return pages, decoder.new_caches(pages.num_blocks)


def assert_logits_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the logits' scale: the acceptance bound, some 100x what fp32 rounding makes of it."""
    scale = expected.abs().max().item()
    assert scale > 0.5, "the case's logits are too small to compare"
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=0)


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: list[list[int]], chunk: int
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """(logits of each prompt, greedy tokens after it), with prompts prefilled `chunk` tokens at a time."""
    pages, caches = fresh(decoder, len(prompts))
    prompt_logits, outputs = [], [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        rows = []
        for start in range(0, len(prompt), chunk):
            ids, positions, batch = pages.step({row: prompt[start : start + chunk]})
            rows.append(decoder.logits(decoder.forward(ids, positions, batch, caches)))
        prompt_logits.append(torch.cat(rows))
        outputs[row].append(int(prompt_logits[row][-1].argmax()))
    while len(outputs[0]) < NEW_TOKENS:
        ids, positions, batch = pages.step({row: [output[-1]] for row, output in enumerate(outputs)})
        logits = decoder.logits(decoder.forward(ids, positions, batch, caches))
        for output, token in zip(outputs, logits.argmax(-1).tolist(), strict=True):
            output.append(token)
    return prompt_logits, outputs


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.architecture}-{case.q_heads}x{case.head_dim}"
)
def test_logits_and_greedy_tokens_equal_transformers(case, tmp_path):
    model = save_random(case, tmp_path)
    decoder = open_decoder(str(tmp_path))
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in PROMPTS]
    prompt_logits, outputs = generate(decoder, prompts, chunk=7)
    for prompt, logits, output in zip(prompts, prompt_logits, outputs, strict=True):
        with torch.inference_mode():
            # One pass over prompt + output gives transformers' greedy choice after every prefix.
            expected = model(torch.tensor([prompt + output])).logits[0]
        assert_logits_close(logits, expected[: len(prompt)])
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == output
    whole, _ = generate(decoder, prompts[:1], chunk=MAX_LEN)
    torch.testing.assert_close(whole[0], prompt_logits[0], atol=1e-4, rtol=1e-4)


def test_mixed_step_equals_separate_steps(tmp_path):
    """One decode and one prefill chunk in the same step give what they give alone."""
    decoder = random_decoder(CASES[1], tmp_path)
    results = []
    for together in (True, False):
        pages, caches = fresh(decoder, 2)
        decoder.forward(*pages.step({0: list(range(20))}), caches)
        if together:
            hidden = decoder.forward(*pages.step({0: [3], 1: list(range(9))}), caches)
        else:
            hidden = torch.cat(
                [decoder.forward(*pages.step(part), caches) for part in ({0: [3]}, {1: list(range(9))})]
            )
        results.append(decoder.logits(hidden))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=lambda case: case.architecture)
def test_wanted_tokens_come_out_as_without_asking(case, tmp_path):
    """And later steps find the keys and values of those that were not asked for."""
    decoder = random_decoder(case, tmp_path)
    results = []
    for ask in (True, False):
        pages, caches = fresh(decoder, 3)
        ids, positions, batch = pages.step({0: list(range(20)), 1: list(range(5, 12)), 2: [7, 8, 9]})
        last = torch.tensor([19, 29])
        wanted = Wanted.of(batch, last, torch.tensor([0, 2])) if ask else None
        hidden = decoder.forward(ids, positions, batch, caches, wanted)
        chosen = hidden if ask else hidden[last]
        after = decoder.forward(*pages.step({0: [3], 1: [4], 2: [5]}), caches)
        results.append((decoder.logits(chosen), decoder.logits(after)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_step_that_wants_nothing_still_writes(tmp_path):
    decoder = random_decoder(CASES[1], tmp_path)
    results = []
    for ask in (True, False):
        pages, caches = fresh(decoder, 1)
        ids, positions, batch = pages.step({0: list(range(20))})
        none = torch.zeros(0, dtype=torch.int64)
        wanted = Wanted.of(batch, none, none) if ask else None
        hidden = decoder.forward(ids, positions, batch, caches, wanted)
        assert len(hidden) == (0 if ask else 20)
        results.append(decoder.forward(*pages.step({0: [3]}), caches))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_copied_blocks_continue_alike(tmp_path):
    decoder = random_decoder(CASES[0], tmp_path)
    pages, caches = fresh(decoder, 2)
    decoder.forward(*pages.step({0: list(range(20))}), caches)
    decoder.copy_blocks(caches, pages.table[0, :2].long(), pages.table[1, :2].long())
    pages.computed[1] = 20
    logits = decoder.logits(decoder.forward(*pages.step({0: [3], 1: [3]}), caches))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_bundled_models_equal_transformers(name):
    """On real weights and a prompt the model knows how to go on from."""
    source = find_model(name)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    prompt = source.tokenizer()("The road went down to the river, and")["input_ids"]
    prompt_logits, outputs = generate(open_decoder(name), [prompt], chunk=4)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + outputs[0]])).logits[0]
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
    assert_logits_close(prompt_logits[0], expected[: len(prompt)])
    assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == outputs[0]
    if source.config.eos_token_ids[0] not in outputs[0]:
        assert generated[0, len(prompt) :].tolist() == outputs[0]
