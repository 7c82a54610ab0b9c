"""What an examination of a machine finds."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """Servers may start, and something may go wrong, or be slow, or surprise."""
    ERROR = "error"
    """No server starts, or none of the kind that is named."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what, in a word or two.
        level: how bad it is.
        text: what was seen.
        remedy: what to do about it; empty if nothing need be done.
        fix: does it, where the trouble is ours alone; returns what was done.
    """

    topic: str
    level: Level
    text: str
    remedy: str = ""
    fix: Callable[[], str] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As `managed-vllm doctor --json` prints it."""
        return {
            "topic": self.topic,
            "level": str(self.level),
            "text": self.text,
            "remedy": self.remedy,
            "can_be_fixed": self.fix is not None,
        }


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, Level.OK, text)


def warning(topic: str, text: str, remedy: str, fix: Callable[[], str] | None = None) -> Finding:
    return Finding(topic, Level.WARNING, text, remedy, fix)


def error(topic: str, text: str, remedy: str, fix: Callable[[], str] | None = None) -> Finding:
    return Finding(topic, Level.ERROR, text, remedy, fix)
