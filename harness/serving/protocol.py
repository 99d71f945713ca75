"""Bodies of requests, read field by field: what is served is checked, what is not is named and refused.

Names and meanings are those of OpenAI's API and of vLLM's additions to it (`ignore_eos`, `min_tokens`,
`top_k`, `min_p`, `stop_token_ids`, `skip_special_tokens`, `continuous_usage_stats`,
`return_token_ids`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn

from backbench.engine.request import SamplingParams, is_number
from backbench.errors import EngineError, HarnessError, printable, shown

MOST_STOPS = 16
"""Stop strings of a request; each is looked for after every token."""
LONGEST_STOP = 256
"""Characters of a stop string: four times as many tokens are decoded after every token."""
MOST_STOP_TOKENS = 1024
LONGEST_PARAMETER = 100
"""Characters of a field's name in an error."""
COMPLETION_TOKENS = 16
"""Output tokens of a completion that says nothing of them, as in OpenAI's API."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "priority": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
"""Fields that may be given as long as they ask for nothing: name -> values that do not."""
UNHEEDED = ("metadata", "prompt_cache_key", "safety_identifier", "user")
"""Fields that say who asks and why, on which no answer depends."""


class Refused(HarnessError):
    """A request that is answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.parameter = None if parameter is None else printable(parameter[:LONGEST_PARAMETER])
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As OpenAI's API words it."""
        error = {"message": str(self), "type": self.kind, "param": self.parameter, "code": self.status}
        return {"error": error}


class Fields:
    """The fields of one JSON object. Null is as good as absent; `end` refuses what nobody read."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        """where: what stands before a field's name in messages, such as "stream_options."."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def wrong(self, name: str, must: str, value: Any) -> Refused:
        """The refusal of a field that must be something else."""
        return Refused(
            f"{self._where}{name} must be {must}, not {shown(value)}.", parameter=self._where + name
        )

    def value(self, name: str) -> Any:
        """The field's value, None where it is not given."""
        return self._values.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether it is given and was not read yet."""
        return name in self._values

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string that can be encoded."""
        value = self.value(name)
        if value is None:
            return default
        return self.well_formed(name, value)

    def well_formed(self, name: str, value: Any) -> str:
        """`value`, where it is a string without lone surrogates, which no tokenizer takes."""
        if not isinstance(value, str):
            raise self.wrong(name, "text", value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(name, "text without lone surrogates", value) from None
        return value

    def whole(self, name: str, default: int) -> int:
        """A whole number; its range is for others to check."""
        value = self.value(name)
        if value is None:
            return default
        if not is_number(value, Integral):
            raise self.wrong(name, "a whole number", value)
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number that fp64 holds; its range is for others to check."""
        value = self.value(name)
        if value is None:
            return default
        if not is_number(value, Real) or abs(value) > 1e300:
            raise self.wrong(name, "a number", value)
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def nested(self, name: str) -> Fields:
        """The fields of a nested object; none where it is not given."""
        value = self.value(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return Fields(value, f"{self._where}{name}.")

    def token_ids(self, name: str, most: int) -> list[int]:
        """A list of at most `most` token ids; the vocabulary is for others to check."""
        value = self.value(name)
        if value is None:
            return []
        if not is_token_ids(value) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most:,} token ids", value)
        return list(value)

    def end(self) -> None:
        """Refuse the fields that were not read, unless they ask for nothing."""
        for name, value in self._values.items():
            if name in UNHEEDED and not self._where:
                continue
            known = None if self._where else NEUTRAL.get(name)
            if known is None:
                field = self._where + name
                raise Refused(f"The field {shown(field)} is not known here; leave it out.", parameter=field)
            if value not in known:
                only = " or ".join(json.dumps(each) for each in known)
                raise Refused(f"{name} is not served here; leave it out, or give {only}.", parameter=name)


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen; `SamplingParams` once the output's length is known."""

    max_tokens: int | None
    """None = as many as the context holds."""
    others: Mapping[str, Any]
    """The other arguments of SamplingParams."""

    def params(self, room: int) -> SamplingParams:
        """room: tokens that the context holds after the prompt. Raises Refused for values out of range."""
        max_tokens = max(1, room) if self.max_tokens is None else self.max_tokens
        try:
            return SamplingParams(max_tokens=max_tokens, **self.others)
        except EngineError as error:
            raise Refused(str(error)) from None


@dataclass(frozen=True)
class Delivery:
    """How an answer is to be sent."""

    stream: bool
    include_usage: bool
    """A last chunk of the stream holds the usage."""
    continuous_usage: bool
    """Every chunk holds the usage so far."""
    skip_special_tokens: bool
    keep_stop: bool
    """The stop string that ended a sequence is part of its text."""
    token_ids: bool
    """A choice holds the ids of its tokens, too."""


def read_json(body: bytes) -> Fields:
    """The fields of a body; Refused where it is no JSON object."""
    try:
        values = json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except RecursionError:
        raise Refused("The body is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ones
        raise Refused(f"The body is no JSON: {error}.") from None
    if not isinstance(values, dict):
        raise Refused("The body must be a JSON object.")
    return Fields(values)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_sampling(fields: Fields, seed: int, *, default_tokens: int | None, logprobs: bool) -> Sampling:
    """What both kinds of completions have in common. seed: where none is given."""
    lengths = [name for name in ("max_tokens", "max_completion_tokens") if fields.has(name)]
    limits = [fields.whole(name, 0) for name in lengths]
    if len(set(limits)) > 1:
        raise Refused(
            "max_tokens and max_completion_tokens differ; give one of them.", parameter="max_tokens"
        )
    top_k = fields.whole("top_k", 0)
    n = fields.whole("n", 1)
    others = {
        "n": n,
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": 0 if top_k == -1 else top_k,
        "min_p": fields.number("min_p", 0.0),
        "seed": fields.whole("seed", seed),
        "stop": _read_stops(fields),
        "stop_token_ids": tuple(fields.token_ids("stop_token_ids", MOST_STOP_TOKENS)),
        "ignore_eos": fields.switch("ignore_eos", False),
        "min_tokens": fields.whole("min_tokens", 0),
        "logprobs": logprobs,
    }
    if fields.whole("best_of", n) != n:
        raise Refused("best_of is served only where it equals n; leave it out.", parameter="best_of")
    return Sampling(limits[0] if limits else default_tokens, others)


def _read_stops(fields: Fields) -> tuple[str, ...]:
    value = fields.value("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not fits or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in stops):
        raise fields.wrong("stop", f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", value)
    return tuple(stops)


def read_delivery(fields: Fields) -> Delivery:
    """How the answer is to be sent."""
    stream = fields.switch("stream", False)
    if fields.has("stream_options") and not stream:
        raise Refused("stream_options needs stream to be true.", parameter="stream_options")
    options = fields.nested("stream_options")
    continuous = options.switch("continuous_usage_stats", False)
    include = options.switch("include_usage", False)
    if options.switch("include_obfuscation", False):
        raise options.wrong("include_obfuscation", "false", True)
    options.end()
    return Delivery(
        stream=stream,
        include_usage=include,
        continuous_usage=include and continuous,
        skip_special_tokens=fields.switch("skip_special_tokens", True),
        keep_stop=fields.switch("include_stop_str_in_output", False),
        token_ids=fields.switch("return_token_ids", False),
    )


def require_alternatives(asked: int, temperature: float, name: str) -> None:
    """Refuse to list more alternatives of a token than are known: with greedy decoding the token itself."""
    if asked < 0 or asked > 1 or (asked == 1 and temperature > 0):
        raise Refused(
            f"{name}: the engine knows the log-probability of the chosen token only; ask for 0, or for 1 "
            "with temperature 0.",
            parameter=name,
        )


def read_prompts(fields: Fields) -> list[str | list[int]]:
    """The field `prompt`: a text, a list of texts, token ids or a list of those."""
    value = fields.value("prompt")
    if isinstance(value, str):
        return [fields.well_formed("prompt", value)]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return [fields.well_formed("prompt", each) for each in value]
        if is_token_ids(value):
            return [value]
        if all(is_token_ids(each) for each in value):
            return value
    raise fields.wrong("prompt", "a text, a list of texts, token ids or a list of those", value)


def is_token_ids(value: Any) -> bool:
    """True for a list of whole numbers."""
    return isinstance(value, list) and all(is_number(each, int) for each in value)


def read_messages(fields: Fields) -> list[dict[str, str]]:
    """The field `messages`, each with a role and its text; Refused where there is more to them."""
    value = fields.value("messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "a list of messages", value)
    return [_read_message(each, f"messages[{i}].") for i, each in enumerate(value)]


def _read_message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Refused(f"{where[:-1]} must be an object, not {shown(value)}.", parameter="messages")
    fields = Fields(value, where)
    role = fields.text("role")
    if not role:
        raise fields.wrong("role", "text that is not empty", role)
    parts = fields.value("content")
    message = {"role": role, "content": _read_content(fields, parts)}
    name = fields.text("name")
    fields.end()
    return message if name is None else message | {"name": name}


def _read_content(fields: Fields, value: Any) -> str:
    """A message's text, or its text parts put together line by line."""
    if isinstance(value, str):
        return fields.well_formed("content", value)
    if not isinstance(value, list):
        raise fields.wrong("content", "text or a list of text parts", value)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise fields.wrong("content", 'text or a list of parts {"type": "text", "text": ...}', part)
        texts.append(fields.well_formed("content", part["text"]))
    return "\n".join(texts)
