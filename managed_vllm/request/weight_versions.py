"""Which weights sampled the tokens of an answer that comes in parts, over one or more streams."""

from __future__ import annotations

from typing import Any

import msgspec

from managed_vllm.request.responses import WeightVersionSpan

_Starts = list[tuple[str, int]]


class VersionedParts:
    """The versions of one answer's tokens, from what each stream tells of its own.

    A stream tells with its last event; a server of ours already with the first tokens, and whenever the version changes
    (`in_server/managed_vllm_weight_versions.py`). So of a stream that was cut all is known, or nothing.
    """

    def __init__(self) -> None:
        self._starts: _Starts = []
        self._begin = 0
        self._told: _Starts | None = None
        self._is_known = True

    def add(self, told: Any) -> None:
        """Takes what an event says of its stream so far, if it says anything. Raises `ValueError`."""
        if told is not None:
            spans = msgspec.convert(told, list[WeightVersionSpan])
            self._told = [(span.version, self._begin + span.start) for span in spans]

    def begin_part(self, count: int) -> None:
        """The answer has so many tokens, and goes on in another stream."""
        if count > self._begin:
            self._is_known = self._is_known and self._told is not None
            self._starts = self._joined(count)
        self._begin, self._told = count, None

    @property
    def goes_on_otherwise(self) -> bool:
        """Whether the newest part began with other weights than those of the last token before it."""
        if not self._starts or not self._told:
            return False
        return self._starts[-1][0] != self._told[0][0]

    def spans(self, count: int) -> list[dict[str, Any]] | None:
        """The spans of the first `count` tokens, in vLLM's shape; None: not of each is known whose it is."""
        if not self._is_known or (self._told is None and (count > self._begin or not self._starts)):
            return None
        starts = self._joined(count)
        ends = [*(start for _, start in starts[1:]), count]
        return [
            {"version": version, "start": start, "end": end} for (version, start), end in zip(starts, ends, strict=True)
        ]

    def _joined(self, count: int) -> _Starts:
        found: _Starts = []
        for version, start in (*self._starts, *(self._told or ())):
            if start < count and (not found or found[-1][0] != version):
                found.append((version, start))
        return found
