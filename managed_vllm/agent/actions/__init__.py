"""What a model's answer means: parsers from text to typed actions, and executors' forms of these.

- `values`: the actions. `table`: their names and fields, from which prompts, schemas and parsers are made.
- `serialization`: as JSON for files. `descriptions`: in a few words.
- `ui_tars`: answers of UI-TARS 1.5. `ui_tars_format`: its prompt, a regex that forces it, and writing it.
- `osworld_answers`: the same as OSWorld's own agent reads them.
- `json_actions`: JSON and tool calls, for other models.
- `computer_use`: Qwen-VL's tools, and what came of them. `python_code`: pyautogui's calls in a code block.
- `glm`: GLM-V and AutoGLM. `seed`: UI-TARS-2 and Seed. `scalecua`, `holo`, `android_world`: what their names say.
- `hosted_tools`: calls in Gemini's and OpenAI's shapes. `rows`: action spaces as tables.
- `pyautogui_source`: as source for OSWorld. `adb_source`: as commands for an Android device.
- `coordinates`, `keys`: numbers and names that the parsers share.
"""

from __future__ import annotations

from managed_vllm.agent.actions.adb_source import to_adb
from managed_vllm.agent.actions.android_world import parse_android_world
from managed_vllm.agent.actions.computer_use import parse_computer_use
from managed_vllm.agent.actions.coordinates import Coordinates, OffScreen, smart_resize
from managed_vllm.agent.actions.descriptions import describe
from managed_vllm.agent.actions.glm import parse_autoglm, parse_glm
from managed_vllm.agent.actions.holo import holo_json_schema, parse_holo
from managed_vllm.agent.actions.hosted_tools import parse_hosted
from managed_vllm.agent.actions.json_actions import (
    ACTION_JSON_SCHEMA,
    ACTION_TOOLS,
    action_json_schema,
    action_tools,
    parse_json_actions,
    parse_tool_calls,
)
from managed_vllm.agent.actions.osworld_answers import parse_like_osworld
from managed_vllm.agent.actions.pyautogui_source import to_pyautogui
from managed_vllm.agent.actions.python_code import parse_python_code
from managed_vllm.agent.actions.scalecua import parse_scalecua
from managed_vllm.agent.actions.seed import parse_seed
from managed_vllm.agent.actions.serialization import action_from_dict, action_to_dict
from managed_vllm.agent.actions.ui_tars import parse_ui_tars
from managed_vllm.agent.actions.ui_tars_format import UI_TARS_PROMPT, system_prompt, to_ui_tars, ui_tars_regex
from managed_vllm.agent.actions.values import (
    Action,
    Back,
    Button,
    CallUser,
    Click,
    Custom,
    Direction,
    Drag,
    Finished,
    Home,
    Hotkey,
    KeyDown,
    KeyUp,
    LongPress,
    MouseDown,
    MouseUp,
    Move,
    Noop,
    OpenApp,
    OpenURL,
    ParsedResponse,
    Scroll,
    Swipe,
    Type,
    Wait,
)
from managed_vllm.errors import ActionParseError

__all__ = [
    "ACTION_JSON_SCHEMA",
    "ACTION_TOOLS",
    "UI_TARS_PROMPT",
    "Action",
    "ActionParseError",
    "Back",
    "Button",
    "CallUser",
    "Click",
    "Coordinates",
    "Custom",
    "Direction",
    "Drag",
    "Finished",
    "Home",
    "Hotkey",
    "KeyDown",
    "KeyUp",
    "LongPress",
    "MouseDown",
    "MouseUp",
    "Move",
    "Noop",
    "OffScreen",
    "OpenApp",
    "OpenURL",
    "ParsedResponse",
    "Scroll",
    "Swipe",
    "Type",
    "Wait",
    "action_from_dict",
    "action_json_schema",
    "action_to_dict",
    "action_tools",
    "describe",
    "holo_json_schema",
    "parse_android_world",
    "parse_autoglm",
    "parse_computer_use",
    "parse_glm",
    "parse_holo",
    "parse_hosted",
    "parse_json_actions",
    "parse_like_osworld",
    "parse_python_code",
    "parse_scalecua",
    "parse_seed",
    "parse_tool_calls",
    "parse_ui_tars",
    "smart_resize",
    "system_prompt",
    "to_adb",
    "to_pyautogui",
    "to_ui_tars",
    "ui_tars_regex",
]
