"""When two requests are the same, and how they differ: the canonical form of a request.

A body of JSON stands there with its names in order, without what is different each time that the same is asked, and
with the hash of each file that is in it (an image as a `data:` URL). Any other body stands there as its hash. Headers
don't count, so no key gets into a cassette.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

VARYING = frozenset({"request_id", "session_id", "cache_salt", "stream_interval", "priority"})
"""Fields of a body that don't change what is answered."""
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?[^,]{0,200},", re.ASCII)
_LINE = 100
_SHOWN_LINES = 60
_MOST_COMPARED = 200


def canonical(method: str, path: str, body: bytes) -> dict[str, Any]:
    """The canonical form of a request: method, path, body."""
    found: dict[str, Any] = {"method": method, "path": path}
    if not body:
        return found
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        return {**found, "body": {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}}
    if isinstance(decoded, dict):
        decoded = {name: value for name, value in sorted(decoded.items()) if name not in VARYING}
    return {**found, "body": _hashed(decoded)}


def key_of(request: dict[str, Any]) -> str:
    """The same text for the same request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _hashed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hashed(each) for name, each in sorted(value.items())}
    if isinstance(value, list):
        return [_hashed(each) for each in value]
    if isinstance(value, str) and value[:5] == "data:" and (begin := _DATA_URL.match(value)):
        data = value[begin.end() :].encode(errors="surrogatepass")
        if begin.group().endswith(";base64,"):
            with contextlib.suppress(ValueError):
                data = base64.b64decode(data, validate=True)
        return f"{begin.group()}sha256={hashlib.sha256(data).hexdigest()}"
    return value


# -- how they differ ---------------------------------------------------------------------------------------------------


def nearest(request: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The request that differs least from `request`, among those for the same path, of the first so many; else None."""
    lines = list(_lines(request))
    best: dict[str, Any] | None = None
    likeness = -1.0
    compared = 0
    for other in others:
        if (other["method"], other["path"]) != (request["method"], request["path"]):
            continue
        compared += 1
        if compared > _MOST_COMPARED:
            break
        found = difflib.SequenceMatcher(None, lines, list(_lines(other)), autojunk=False).ratio()
        if found > likeness:
            best, likeness = other, found
    return best


def difference(request: dict[str, Any], other: dict[str, Any]) -> str:
    """What is asked otherwise than in the `other`, recorded one, as a diff."""
    lines = difflib.unified_diff(list(_lines(other)), list(_lines(request)), "recorded", "asked now", lineterm="", n=2)
    shown = list(lines)
    if len(shown) > _SHOWN_LINES:
        shown = [*shown[:_SHOWN_LINES], f"… {len(shown) - _SHOWN_LINES} more lines"]
    return "\n".join(shown)


def _lines(request: dict[str, Any]) -> Iterator[str]:
    """As indented JSON; long lines in pieces, so that a diff shows the place."""
    for line in json.dumps(request, indent=1, sort_keys=True, ensure_ascii=False).split("\n"):
        for start in range(0, len(line) or 1, _LINE):
            yield line[start : start + _LINE]
