"""What a model's answer means: parsers from text to typed actions, and executors' forms of these."""

from __future__ import annotations

from managed_vllm.agent.actions.types import (
    Action,
    Button,
    CallUser,
    Click,
    Custom,
    Direction,
    Drag,
    Finished,
    Hotkey,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

__all__ = [
    "Action",
    "ActionParseError",
    "Button",
    "CallUser",
    "Click",
    "Custom",
    "Direction",
    "Drag",
    "Finished",
    "Hotkey",
    "ParsedResponse",
    "Scroll",
    "Type",
    "Wait",
]
