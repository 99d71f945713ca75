"""The table of fields against the config classes of transformers: none is missing, no default differs."""

from __future__ import annotations

import dataclasses

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from backbench.engine.models.families import families
from backbench.engine.models.fields import REQUIRED, Honoured, Refused

FAMILIES = families()


def class_defaults(name):
    """Field -> class default, of the class and of what an object of it writes to a config.json."""
    kind = CONFIG_MAPPING[name]
    declared = {field.name: field.default for field in dataclasses.fields(kind)}
    # An object also fills in what follows from other fields; those are not class defaults.
    return {**dict.fromkeys(kind().to_dict()), **declared}


def test_every_family_is_found():
    assert list(FAMILIES) == ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_field_of_the_class_is_classified(family):
    names = [name for name in class_defaults(family.name) if not name.startswith("_")]
    assert len(names) > 25
    assert sorted(set(names) - set(family.fields)) == []


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_the_class(family):
    defaults = class_defaults(family.name)
    compared = 0
    for name, field in family.fields.items():
        if name not in defaults:
            continue
        if isinstance(field, Refused):
            assert defaults[name] in field.harmless, name
        elif isinstance(field, Honoured) and field.default is not REQUIRED:
            assert defaults[name] == field.default, name
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_new_field_of_the_class_would_be_noticed(family, monkeypatch):
    """The comparison sees a field the table lacks, and a default that moved."""
    kind = CONFIG_MAPPING[family.name]
    grown = dataclasses.make_dataclass("Grown", [("new_gate", bool, False)], bases=(kind,), kw_only=True)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, family.name, grown)
    with pytest.raises(AssertionError, match="new_gate"):
        test_every_field_of_the_class_is_classified(family)
    moved = dataclasses.make_dataclass("Moved", [("rms_norm_eps", float, 1e-5)], bases=(kind,), kw_only=True)
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, family.name, moved)
    with pytest.raises(AssertionError, match="rms_norm_eps"):
        test_defaults_are_those_of_the_class(family)
