"""Secrets: the type that hides one, the names that give one away, and values with every secret masked.

What must hold:

1. A `Secret` is printed, logged, pickled and compared in messages without its value; only `reveal` gives it.
2. Whether something is a secret is decided by the words of its name, in one place: `is_secret_name`.
3. `protect` wraps what is secret in nested values and `reveal` unwraps it, at the borders where the value is needed:
   the control channel and the server's environment.

This module imports nothing of ours; everything else may import it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, overload

STARS = "***"
"""What stands in place of a secret in everything that people read."""

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{12}")
_PASSWORD = re.compile(r"(://[^/\s:@]*:)([^/\s@]+)@")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_ALWAYS = frozenset(
    {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials", "apikey"}
    | {"apikeys", "authtoken", "accesstoken", "authorization", "bearer", "dsn"}
)
"""Words that make a name a secret's wherever they stand."""

_NOT_TOKENS = frozenset(
    {"bos", "eos", "pad", "mask", "sep", "cls", "unk", "image", "video", "audio", "vision", "start", "end", "begin"}
    | {"stop", "special", "per", "prompt", "output", "input", "next", "first", "last", "newline", "think", "thinking"}
    | {"reasoning", "tool"}
)
"""Words before `token` that make it a model's (`eos_token`), not somebody's (`hf_token`)."""

_NOT_KEYS = frozenset(
    {"cache", "sort", "primary", "foreign", "public", "lookup", "config", "dict", "group", "partition", "index", "map"}
    | {"layer"}
)
"""Words before `key` that make it one of a table."""

_KEY_OWNERS = frozenset({"api", "access", "secret", "private", "auth", "encryption", "signing"})
"""Words before `keys` that make it several secrets."""


class Secret:
    """A value that nobody reads by accident: it prints as stars. `reveal` gives the value.

    Equal to another one with the same value; false if the value is empty. A pickle does not hold the value: what comes
    out of one is a secret that was left behind, whose `reveal` raises `LookupError`.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value.reveal() if isinstance(value, Secret) else value

    @property
    def left_behind(self) -> bool:
        """Whether this is what came out of a pickle, without the value."""
        return False

    def reveal(self) -> Any:
        """The value itself. Raises `LookupError` if it was left behind in a pickle."""
        return self._value

    def __repr__(self) -> str:
        return STARS

    def __format__(self, spec: str) -> str:
        return format(STARS, spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash((Secret, str(self._value)))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Lost, ())


class _Lost(Secret):
    """What a pickled secret becomes."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("")

    @property
    def left_behind(self) -> bool:
        return True

    def reveal(self) -> NoReturn:
        raise LookupError(
            "this secret was left behind when it was pickled; take it from a handle of this process "
            "(ManagedVLLM.api_key), or give it again"
        )


def is_secret_name(name: str) -> bool:
    """Whether a value of this name (variable, argument, field) is a secret, by the name's words.

    `HF_TOKEN`, `api_key`, `awsSecretAccessKey` are; `max_num_batched_tokens`, `tokenizer`, `eos_token`, `HF_TOKEN_PATH`
    are not.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[-1] in ("path", "file", "dir", "name", "id"):
        return False
    before = words[-2] if len(words) > 1 else ""
    match words[-1]:
        case "token":
            return before not in _NOT_TOKENS
        case "key":
            return before not in _NOT_KEYS
        case "keys":
            return before in _KEY_OWNERS
        case "pwd":
            return len(words) > 1  # PWD itself is the working directory
    return not _ALWAYS.isdisjoint(words)


def protect(value: Any, name: str = "") -> Any:
    """A copy of the value with every secret in it wrapped as `Secret`: by its name, or a URL with a password."""
    return _mapped(value, name, Secret)


def masked(value: Any, name: str = "") -> Any:
    """A copy of the value with a part of its hash for each secret: what may stand in a file, and can be compared."""
    return _mapped(value, name, fingerprint)


def starred(value: Any) -> Any:
    """A masked value for people: stars in place of the parts of hashes."""
    if isinstance(value, str):
        return STARS if _FINGERPRINT.fullmatch(value) else value
    if isinstance(value, Mapping):
        return {key: starred(item) for key, item in value.items()}
    return [starred(item) for item in value] if isinstance(value, list | tuple) else value


def fingerprint(value: Any) -> str:
    """A part of a secret's hash; of a fingerprint, itself."""
    plain = str(value.reveal() if isinstance(value, Secret) else value)
    if _FINGERPRINT.fullmatch(plain):
        return plain
    return f"sha256:{hashlib.sha256(plain.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def _mapped(value: Any, name: str, hide: Any) -> Any:
    if isinstance(value, Mapping):
        secret = is_secret_name(name)
        return {key: _mapped(item, name if secret else str(key), hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, name, hide) for item in value]
    return hide(value) if _is_secret(value, name) else value


def _is_secret(value: Any, name: str) -> bool:
    if isinstance(value, Secret):
        return True
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return False
    return is_secret_name(name) or (isinstance(value, str) and _PASSWORD.search(value) is not None)


@overload
def reveal(value: Mapping[str, Any]) -> dict[str, Any]: ...
@overload
def reveal(value: Any) -> Any: ...
def reveal(value: Any) -> Any:
    """The inverse of `protect`: every `Secret` in a nested value replaced by what it hides."""
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Mapping):
        return {key: reveal(item) for key, item in value.items()}
    return [reveal(item) for item in value] if isinstance(value, list | tuple) else value


def secrets_in(value: Any) -> Iterator[Secret]:
    """Every `Secret` in a nested value."""
    if isinstance(value, Secret):
        yield value
    elif isinstance(value, Mapping):
        yield from secrets_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from secrets_in(item)


def without_passwords(text: str) -> str:
    """The text with stars for the passwords in its URLs (`http://user:password@host`)."""
    return _PASSWORD.sub(rf"\1{STARS}@", text)


def passwords_in(text: str) -> list[str]:
    """The passwords in the URLs of a text."""
    return [found[2] for found in _PASSWORD.finditer(text)]


def masked_words(words: Sequence[str], *, in_file: bool = False) -> list[str]:
    """A command line with stars for its secrets: `--api-key X`, `--hf-token=X`, `HF_TOKEN=X`, JSON that has some.

    `in_file`: with parts of hashes, as `masked` has them.
    """
    hide = fingerprint if in_file else _stars
    shown: list[str] = []
    hide_next = False
    for word in words:
        if hide_next and not re.match(r"--?[A-Za-z]", word):
            shown.append(hide(word))
            continue
        name, equals, value = word.partition("=")
        is_flag = name.startswith("-")
        hide_next = is_flag and not equals and is_secret_name(name)
        if equals and re.fullmatch(r"-{0,2}[A-Za-z][\w.-]*", name):
            shown.append(f"{name}={hide(value) if is_secret_name(name) else _masked_text(value)}")
        else:
            shown.append(_masked_text(word))
    return shown


def _stars(value: object) -> str:
    return STARS


def _masked_text(text: str) -> str:
    if text.startswith(("{", "[")):
        try:
            return json.dumps(starred(masked(json.loads(text))))
        except (ValueError, RecursionError):
            pass
    return re.sub(r"(?i)\b(bearer\s+)\S+", rf"\1{STARS}", without_passwords(text))


class Redactor:
    """Takes known secrets out of a stream of bytes, wherever its chunks are cut."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Secrets of fewer than 8 characters are left alone: they would be found everywhere."""
        known = {secret.encode("utf-8", "surrogateescape") for secret in secrets if len(secret) >= 8}
        self._secrets = sorted(known, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._secrets)) or rb"(?!)")
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on by now: the end of a chunk is held back while it may be the beginning of a secret."""
        text, shown, at = self._held + chunk, b"", 0
        while (found := self._pattern.search(text, at)) and not self._begins_secret(text[found.start() :]):
            shown += text[at : found.start()] + STARS.encode()
            at = found.end()
        longest = max((len(secret) for secret in self._secrets), default=1) - 1
        held = next((i for i in range(max(at, len(text) - longest), len(text)) if self._begins_secret(text[i:])), None)
        cut = len(text) if held is None else held
        self._held = text[cut:]
        return shown + text[at:cut]

    def rest(self) -> bytes:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, b""
        return self._pattern.sub(STARS.encode(), held)

    def _begins_secret(self, text: bytes) -> bool:
        """Whether a secret begins with this text, and goes on after it."""
        return any(len(secret) > len(text) and secret.startswith(text) for secret in self._secrets)
