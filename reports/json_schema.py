"""The JSON Schema of run.json, from the definitions that the record is read and written by."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from backbench.reports.metrics.catalogue import METRICS
from backbench.reports.metrics.metric import ABSENT
from backbench.reports.record import REQUEST_COLUMNS, STEP_COLUMNS, TELEMETRY_COLUMNS, RunRecord
from backbench.reports.record.schema import (
    ADDED_SECTIONS,
    READABLE,
    REQUESTS_FILE,
    SCHEMA_VERSION,
    STATUSES,
    STEPS_FILE,
    TELEMETRY_FILE,
)
from backbench.reports.record.shape import ESTIMATES, EXPLANATIONS, KINDS, NUMBER_NAME, NUMERIC

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TYPES: dict[type, str] = {
    str: "string",
    dict: "object",
    list: "array",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}
_NUMBER = {"type": ["number", "object", "null"]}
_TEXT = {"type": ["string", "null"]}
_TEXTS = {"type": ["array", "null"], "items": {"type": "string"}}

Schema = dict[str, Any]


def json_schema() -> Schema:
    """Draft 2020-12 of one run.json; the rows of the Parquet tables beside it are under `$defs`.

    What it allows is what may be read: sections keep fields that it does not name.
    """
    names = [each.name for each in fields(RunRecord)]
    properties = {name: _section(name) for name in names}
    properties["schema_version"] = {
        "enum": list(READABLE),
        "description": f"{SCHEMA_VERSION} is written now.",
    }
    for path, kind in KINDS.items():
        _merge(_place(properties, path), _of_kind(kind))
    properties["run"]["required"] = ["status"]
    properties["run"]["properties"]["status"] = {"enum": list(STATUSES)}
    for metric in METRICS:
        place = _place(properties, ".".join(metric.path))
        place["title"] = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
        place["description"] = metric.definition
    tables = {
        REQUESTS_FILE: REQUEST_COLUMNS,
        STEPS_FILE: STEP_COLUMNS,
        TELEMETRY_FILE: TELEMETRY_COLUMNS,
    }
    return {
        "$schema": DIALECT,
        "title": "Backbench run record (run.json)",
        "type": "object",
        "required": [name for name in names if name not in ADDED_SECTIONS],
        "properties": properties,
        "$defs": {"measured": _measured()} | {name: _row(columns) for name, columns in tables.items()},
    }


def _section(name: str) -> Schema:
    if name == "validity":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": "object"} | ({"$ref": "#/$defs/measured"} if name in NUMERIC else {})


def _measured() -> Schema:
    """An object whose names say their units, whatever else is in it; so are those inside it."""
    numbers = rf"{NUMBER_NAME.pattern}|^({'|'.join(ESTIMATES)})$"
    texts = f"^({'|'.join(EXPLANATIONS)})$"
    inside = {"if": {"type": "object"}, "then": {"$ref": "#/$defs/measured"}}
    return {
        "type": "object",
        "properties": {ABSENT: {"type": ["object", "null"], "additionalProperties": _TEXT}},
        "patternProperties": {
            numbers: {"type": ["number", "object", "null"], **inside},
            texts: _TEXT,
            rf"^(?!{ABSENT}$)": inside,
        },
    }


def _place(properties: Schema, path: str) -> Schema:
    """The schema of a dotted path, made where it is not there yet; * is any key, [] any item."""
    section, *keys = path.split(".")
    place: Schema = properties[section]
    for key in keys:
        if key in ("*", "[]"):
            place = place.setdefault("items" if key == "[]" else "additionalProperties", {})
        else:
            place = place.setdefault("properties", {}).setdefault(key, {})
    return place


def _of_kind(kind: tuple[type, ...] | str) -> Schema:
    if isinstance(kind, str):
        return dict(_TEXTS)
    types = [_TYPES[each] for each in kind if not (each is int and float in kind)]
    return {"type": types[0] if len(types) == 1 else types}


def _merge(place: Schema, given: Schema) -> None:
    """What is said of a place once more; the narrower words win."""
    for key, value in given.items():
        place.setdefault(key, value)


def _row(columns: dict[str, str]) -> Schema:
    """A row of a Parquet table: Arrow's types as JSON's."""
    kinds = {"int64": "integer", "float64": "number", "bool": "boolean", "string": "string"}
    found: Schema = {}
    for name, kind in columns.items():
        plain = kind.rstrip("?")
        if plain.startswith("list"):
            found[name] = {"type": "array", "items": {"type": ["integer", "null"]}}
        else:
            found[name] = {"type": [kinds[plain], "null"] if kind.endswith("?") else kinds[plain]}
    return {"type": "object", "required": list(columns), "properties": found}
