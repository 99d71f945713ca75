"""Which reader a file needs: CSV by its header, JSON by its first character and fields, never by name."""

from __future__ import annotations

import json
from pathlib import Path

from backbench.errors import WorkloadError
from backbench.workloads.readers import azure, burstgpt, mooncake, qwen_bailian, tracelab, vidur
from backbench.workloads.readers.text import UNREADABLE, open_text

FORMATS = ("azure", "burstgpt", "mooncake", "openai", "qwen-bailian", "sharegpt", "tracelab", "vidur")
_CSV = {
    "azure": azure.COLUMNS,
    "burstgpt": burstgpt.COLUMNS,
    "tracelab": tracelab.COLUMNS,
    "vidur": vidur.COLUMNS,
}
_HEAD_CHARACTERS = 1 << 20


def detect(path: Path) -> str:
    """The format's name; WorkloadError lists the known formats when none fits.

    A file that starts with [ is ShareGPT. One that starts with { is JSONL: `chat_id` makes it qwen-bailian,
    `hash_ids` mooncake, `messages` or `prompt` openai. Anything else is CSV, told apart by its columns.
    """
    with open_text(path) as file:
        try:
            lines = iter(lambda: file.readline(_HEAD_CHARACTERS), "")
            head = next((line.strip() for line in lines if line.strip()), "")
        except UNREADABLE as error:
            raise WorkloadError(f"'{path}' is no readable text: {error}.") from None
    if head.startswith("["):
        return "sharegpt"
    found = _json_format(head) if head.startswith("{") else _csv_format(head)
    if found is None:
        raise WorkloadError(
            f"'{path}' is no trace known here (its first line: '{head[:60]}'); formats: {', '.join(FORMATS)}."
        )
    return found


def _json_format(head: str) -> str | None:
    try:
        fields = set(json.loads(head))
    except (ValueError, RecursionError):
        # Let the likeliest reader name the line and the mistake.
        fields = {name for name in ("chat_id", "hash_ids", "messages", "prompt") if f'"{name}"' in head}
    if fields >= set(qwen_bailian.FIELDS) or "chat_id" in fields:
        return "qwen-bailian"
    if "hash_ids" in fields or fields >= set(mooncake.FIELDS[:3]):
        return "mooncake"
    return "openai" if fields & {"messages", "prompt"} else None


def _csv_format(head: str) -> str | None:
    columns = {name.strip() for name in head.split(",")}
    return next((name for name, needed in _CSV.items() if columns >= set(needed)), None)
