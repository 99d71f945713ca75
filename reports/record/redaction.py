"""Texts without what names a machine or a person: in a record as it is written, and in one that is shared."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import shlex
import socket
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH, ADDRESS, SERIAL, WORD = "<path>", "<address>", "<serial>", "<redacted>"
"""What stands for an absolute path; a mail, network or web address; a serial number or UUID; a named word."""

UUID = re.compile(r"\b(GPU-|MIG-)?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")

IDENTIFYING_KEY = re.compile(
    r"(?i)(^|_)(host_?name|fqdn|node_?name|user(_?name)?|login|serial(_?(number|no))?|uuid|mac|ip|address)$"
)
"""Fields of a configuration whose whole value goes, of whatever type."""

MEASURED = ("metrics", "memory", "energy", "schedule", "correctness", "roofline", "warmup", "validity")
"""Sections whose fields are no configuration."""
KEPT = ("run.uuid", "run.digests", "software.packages", "schema_version")
"""The uuid is random and names the run, not the machine; versions of packages may look like addresses."""

_START = r"(?<![\w.~/\\-])(?:~[\w.-]*/|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\(?=\w))"
_QUOTED_PATH = re.compile(r"(?P<quote>['\"])(?:~|/|[A-Za-z]:[\\/]|\\\\).*?(?P=quote)")
_OPEN_PATH = re.compile(rf"{_START}(?:(?![:;] )[^'\"`\n])*")
_REST = re.compile(rf"{_START}.*", re.DOTALL)
_ADDRESSES = re.compile(
    r"\b[a-z][a-z0-9+.-]*://[^\s'\"]+"
    r"|[\w.+-]+@[\w-][\w.-]*"
    r"|(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"
    r"|\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b"
    r"|\b(?:[0-9a-f]{1,4}:){4,7}[0-9a-f]{1,4}\b"
    r"|(?<![\w:])[0-9a-f:]*::[0-9a-f:]+(?![\w:])",
    re.IGNORECASE,
)
_SAID_SERIAL = re.compile(r"(?i)\bserial(?:[ _-]?(?:number|no\.?))?\s*[:=#]?\s*(?=\S*\d)[^\s'\",;]+")


@dataclass(frozen=True)
class Names:
    """What this machine and this account are called."""

    homes: tuple[str, ...]
    """Home directories, longest first."""
    hosts: tuple[str, ...]
    users: tuple[str, ...]

    @classmethod
    def here(cls) -> Names:
        """Of this machine. It may ask a name server: once for a record, not once for a text."""
        hosts = {socket.gethostname(), socket.getfqdn(), platform.node()} - {"", "localhost"}
        return cls(tuple(_homes()), tuple(sorted(hosts)), tuple(sorted(_users())))


def redact(text: str, names: Names | None = None) -> str:
    """`text` without this machine's name, home directories, the user's name and UUIDs."""
    names = names or Names.here()
    for home in names.homes:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    text = re.sub(r"(?i)(?<!\w)[a-z]:[\\/]+Users[\\/]+[^\\/\s'\"]+", "~", text)
    text = re.sub(r"/(home|Users)/[^/\s'\"]+", "~", text)
    for name in names.hosts:
        text = _without_word(text, name, "<host>")
    for name in names.users:
        text = _without_word(text, name, "<user>")
    return UUID.sub(SERIAL, text)


def redacted(value: Any, names: Names | None = None) -> Any:
    """`value`, plain data of a record, with every text in it redacted."""
    names = names or Names.here()
    if isinstance(value, dict):
        return {key: redacted(each, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each, names) for each in value]
    return redact(value, names) if isinstance(value, str) else value


def anonymous(text: str, words: Sequence[str] = (), names: Names | None = None) -> str:
    """`text` as it may be shared: `redact`, and no absolute path, address or serial number, whoever's it is.

    A path may hold spaces: in a sentence it reaches to a quote, ": ", "; " or the end, and a text that begins
    with one is all path. `words` go wherever they stand, in any case: names that only their owner knows.
    """
    for word in words:
        text = re.sub(re.escape(word), WORD, text, flags=re.IGNORECASE)
    if _REST.match(text):
        return PATH
    text = _OPEN_PATH.sub(PATH, _QUOTED_PATH.sub(PATH, _ADDRESSES.sub(ADDRESS, text)))
    return redact(_SAID_SERIAL.sub(SERIAL, text), names)


def anonymous_command(command: str, words: Sequence[str] = (), names: Names | None = None) -> str:
    """A command line as it may be shared: argument by argument, each of which may end in a path."""
    try:
        arguments = shlex.split(command)
    except ValueError:  # no shell wrote it
        return anonymous(command, words, names)
    return shlex.join(anonymous(_REST.sub(PATH, each), words, names) for each in arguments)


@dataclass
class Redaction:
    """What is taken out of one run, and where it stood."""

    words: tuple[str, ...] = ()
    names: Names = field(default_factory=Names.here)
    changed: dict[str, None] = field(default_factory=dict)
    """Dotted names of the fields that were changed, in order."""

    def text(self, text: str, where: str) -> str:
        """`text` as it may be shared; `where` names the field."""
        rewrite = anonymous_command if where.endswith(".command") else anonymous
        found = rewrite(text, self.words, self.names)
        if found != text:
            self.changed[where] = None
        return found

    def data(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """`value`, plain data of a record, with every text and every key as it may be shared.

        Numbers stay, but for those that a configuration keeps under an identifying name.
        """
        where = ".".join(each for each in path if each != "[]")
        if where in KEPT:
            return value
        if path and path[0] not in MEASURED and value is not None and IDENTIFYING_KEY.search(path[-1]):
            self.changed[where] = None
            return WORD
        if isinstance(value, dict):
            found: dict[str, Any] = {}
            for key, each in value.items():
                name = unique(self.text(key, where), found)
                found[name] = self.data(each, (*path, name))
            return found
        if isinstance(value, list | tuple):
            return [self.data(each, (*path, "[]")) for each in value]
        return self.text(value, where) if isinstance(value, str) else value


def unique(name: str, taken: Container[str]) -> str:
    """`name`, with a number where it is taken already: two paths that became one stay two."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found


def _homes() -> list[str]:
    """This account's home directories, longest first; an account may have none."""
    found = {os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")}
    with contextlib.suppress(RuntimeError):  # neither a variable nor an account says where
        found.add(str(Path.home()))
    return sorted((home.rstrip("/\\") for home in found if len(home) > 1), key=len, reverse=True)


def _users() -> set[str]:
    """Names of this account, but for those that are everyone's."""
    found = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME")}
    with contextlib.suppress(OSError, KeyError, ImportError):  # an account without an entry has no name
        found.add(getpass.getuser())
    return found - {"", "root"}


def _without_word(text: str, word: str, instead: str) -> str:
    return re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", instead, text)
