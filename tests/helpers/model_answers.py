"""Answers of models in their own formats, as their cards and published agents give them, and the actions they mean.

`CORPORA` has at least ten for each format; `FIELD` has those from issues and cards of many models, of which some are no
action, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from managed_vllm.agent import AgentFormat, holo, json_actions, scalecua, tool_calls, ui_tars
from managed_vllm.agent.actions import (
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
    Scroll,
    Swipe,
    Type,
    Wait,
    smart_resize,
)

Size = tuple[int, int]
At = Callable[[float, float], tuple[float, float]]
"""From the model's numbers to the pixel of the screenshot."""
Means = Callable[[At], tuple[Action, ...]]


def thousandths(size: Size) -> At:
    return lambda x, y: (x * size[0] / 1000, y * size[1] / 1000)


def resized(size: Size) -> At:
    width, height = smart_resize(size)
    return lambda x, y: (x * size[0] / width, y * size[1] / height)


def pixels(size: Size) -> At:
    return lambda x, y: (float(x), float(y))


class Answer(NamedTuple):
    """An answer, and what it means.

    Attributes:
        text: of the answer.
        means: the actions.
        thought: what comes before them.
        calls: its tool calls, where the server took them out.
    """

    text: str
    means: Means
    thought: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()


class Corpus(NamedTuple):
    """The answers of a format, and what its numbers are."""

    at: Callable[[Size], At]
    answers: list[Answer]


def only(*actions: Action) -> Means:
    """Actions without a point."""
    return lambda at: actions


def call(name: str, **arguments: Any) -> Mapping[str, Any]:
    """A tool call as vLLM gives it."""
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


# -- UI-TARS-2, Seed ---------------------------------------------------------------------------------------------------

TOKEN = "51bce0c785ca2f68081bfa7d91973934"
THINK = f"think_never_used_{TOKEN}"


def xml(name: str, **given: str) -> str:
    parameters = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in given.items())
    return f"<seed:tool_call>\n<function={name}>\n{parameters}</function>\n</seed:tool_call>"


def as_tokens(name: str, inner: str) -> str:
    """As the tokens of Seed 1.8 are written."""
    return (
        f"<seed:tool_call_never_used_{TOKEN}><function_never_used_{TOKEN}={name}>{inner}"
        f"</function_never_used_{TOKEN}></seed:tool_call_never_used_{TOKEN}>"
    )


def parameter(name: str, value: str) -> str:
    return f"<parameter_never_used_{TOKEN}={name}>{value}</parameter_never_used_{TOKEN}>"


POINT = "<point>512 340</point>"
NAMED = (
    '<seed:tool_call>\n<function name="click">\n<parameter name="point" string="true">'
    f"{POINT}</parameter>\n</function>\n</seed:tool_call>"
)
OF_X_AND_Y = f"<object>{parameter('x', '539')}{parameter('y', '130')}</object>"

SEED = [
    Answer(xml("click", point=POINT), lambda at: (Click(*at(512, 340)),)),
    Answer(f"<{THINK}>So.</{THINK}>\n{NAMED}", lambda at: (Click(*at(512, 340)),), "So."),
    Answer(
        "<gui_think>So.</gui_think>" + as_tokens("click", parameter("point", OF_X_AND_Y)),
        lambda at: (Click(*at(539, 130)),),
        "So.",
    ),
    Answer(
        f"<thinkt>So.</thinkt>{xml('left_double', point=POINT)}", lambda at: (Click(*at(512, 340), clicks=2),), "So."
    ),
    Answer(f"So.\n{xml('right_single', point='512 340')}", lambda at: (Click(*at(512, 340), Button.RIGHT),), "So."),
    Answer(
        xml("drag", start_point=POINT, end_point="<point>100 900</point>"),
        lambda at: (Drag(*at(512, 340), *at(100, 900)),),
    ),
    Answer(xml("scroll", point=POINT, direction="down"), lambda at: (Scroll(Direction.DOWN, *at(512, 340)),)),
    Answer(xml("scroll", direction="up"), only(Scroll(Direction.UP))),
    Answer(xml("move_to", point="(512,340)"), lambda at: (Move(*at(512, 340)),)),
    Answer(xml("mouse_down", point=POINT, button="right"), lambda at: (MouseDown(Button.RIGHT, *at(512, 340)),)),
    Answer(xml("mouse_up"), only(MouseUp())),
    Answer(xml("type", content="crab recipes"), only(Type("crab recipes"))),
    Answer(xml("type", content="crab recipes\n"), only(Type("crab recipes", enter=True))),
    Answer(xml("type", content="crab recipes\\n"), only(Type("crab recipes", enter=True))),
    Answer(xml("type", content="\n<b>\n  1\n"), only(Type("<b>\n  1"))),
    Answer(
        as_tokens("type", parameter("content", f"<text_never_used_{TOKEN}>a</text_never_used_{TOKEN}>")),
        only(Type("a")),
    ),
    Answer(xml("hotkey", key="ctrl c"), only(Hotkey(("ctrl", "c")))),
    Answer(xml("press", key="shift"), only(KeyDown("shift"))),
    Answer(xml("release", key="shift"), only(KeyUp("shift"))),
    Answer(xml("wait", time="5"), only(Wait(5.0))),
    Answer(xml("wait"), only(Wait())),
    Answer(xml("finished", content="42"), only(Finished("42"))),
    Answer(
        "<think>Add.</think>\n<answer>\nThe answer to 1+1 is 2.\n</answer>",
        only(Finished("The answer to 1+1 is 2.")),
        "Add.",
    ),
    Answer(xml("call_user"), only(CallUser())),
    Answer(xml("infeasible", content="no such menu"), only(CallUser("no such menu"))),
    Answer(xml("take_screenshot"), only(Noop("a screenshot comes with each turn"))),
    Answer(xml("open_app", app_name="Clock"), only(OpenApp("Clock"))),
    Answer(
        "<thinkt>The tag <point>1 2</point> is a place.</thinkt><seed:tool_call>\n<function=scroll>\n"
        f"<parameter=direction>up</parameter>\n<parameter=point>{POINT}</parameter>\n</function>\n<function=wait>\n"
        "</function>\n</seed:tool_call>",
        lambda at: (Scroll(Direction.UP, *at(512, 340)), Wait()),
        "The tag <point>1 2</point> is a place.",
    ),
    Answer("So.", lambda at: (Click(*at(512, 340)),), "So.", (call("click", point=POINT),)),
    Answer("", only(Hotkey(("ctrl", "v")), Wait(3.0)), "", (call("hotkey", key="ctrl v"), call("wait", time=3))),
]

# -- ScaleCUA ----------------------------------------------------------------------------------------------------------


def operation(calls: str, think: str = "So.") -> str:
    return f"<think>\n{think}\n</think>\n<operation>\nClick OK.\n</operation>\n<action>\n{calls}\n</action>"


def scaled(calls: str, means: Means) -> Answer:
    return Answer(operation(calls), means, "So.\nClick OK.")


SCALECUA = [
    scaled("click(x=312, y=240)", lambda at: (Click(*at(312, 240)),)),
    scaled("click(x=312, y=240, clicks=3, button='right')", lambda at: (Click(*at(312, 240), Button.RIGHT, 3),)),
    scaled("click()", only(MouseDown(), MouseUp())),
    scaled("doubleClick(x=312, y=240)", lambda at: (Click(*at(312, 240), clicks=2),)),
    scaled("rightClick(x=312, y=240)", lambda at: (Click(*at(312, 240), Button.RIGHT),)),
    scaled("moveTo(x=312, y=240)\ndragTo(x=100, y=60, button='left')", lambda at: (Drag(*at(312, 240), *at(100, 60)),)),
    scaled("scroll(clicks=-8, x=312, y=240)", lambda at: (Scroll(Direction.DOWN, *at(312, 240), 8),)),
    scaled("scroll(14)", only(Scroll(Direction.UP, None, None, 14))),
    scaled("press(keys='enter', presses=2)", only(Hotkey(("enter",)), Hotkey(("enter",)))),
    scaled("press(keys=['left', 'right'])", only(Hotkey(("left",)), Hotkey(("right",)))),
    scaled("hotkey('ctrl', 'c')", only(Hotkey(("ctrl", "c")))),
    scaled("hotkey(['cmd', 'a'])", only(Hotkey(("cmd", "a")))),
    scaled("keyDown(key='shift')", only(KeyDown("shift"))),
    scaled("keyUp(key='shift')", only(KeyUp("shift"))),
    scaled("write(message='it\\'s, (so)')", only(Type("it's, (so)"))),
    scaled("wait(seconds=3)", only(Wait(3.0))),
    scaled("wait()", only(Wait(3.0))),
    scaled("call_user()", only(CallUser())),
    scaled("response(answer='42')\nterminate(status='success')", only(Finished("42"))),
    scaled("terminate(status='success', info='done')", only(Finished("done"))),
    scaled("terminate(status='failure')", only(CallUser("the model has given up"))),
    Answer("<action>\nclick(x=312, y=240)\n</action>", lambda at: (Click(*at(312, 240)),)),
    Answer(
        "<operation>Two.</operation><action>click(x=312, y=240)</action>\n<action>wait()</action>",
        lambda at: (Click(*at(312, 240)), Wait(3.0)),
        "Two.",
    ),
    scaled("long_press(x=312, y=240, duration=2)", lambda at: (LongPress(*at(312, 240), 2.0),)),
    scaled("swipe(from_coord=[312, 240], to_coord=(100, 60))", lambda at: (Swipe(*at(312, 240), *at(100, 60)),)),
    scaled("open_app(app_name='Clock')", only(OpenApp("Clock"))),
    scaled("navigate_home()", only(Home())),
    scaled("navigate_back()", only(Back())),
]

# -- Holo --------------------------------------------------------------------------------------------------------------


def step(note: str | None, **action: Any) -> str:
    return json.dumps({"note": note, "thought": "So.", "action": action})


HOLO1_5 = [
    Answer(step("", action="click_element", element="OK", x=312, y=240), lambda at: (Click(*at(312, 240)),), "So."),
    Answer(
        step("7 €", action="write_element_abs", content="crab", element="the search bar", x=312, y=240),
        lambda at: (Click(*at(312, 240)), Type("crab", enter=True)),
        "7 €\nSo.",
    ),
    Answer(step("", action="scroll", direction="down"), only(Scroll(Direction.DOWN)), "So."),
    Answer(step("", action="go_back"), only(Back()), "So."),
    Answer(step("", action="refresh"), only(Hotkey(("f5",))), "So."),
    Answer(step("", action="goto", url="https://example.org"), only(OpenURL("https://example.org")), "So."),
    Answer(step("", action="wait", seconds=4), only(Wait(4.0)), "So."),
    Answer(step("", action="wait"), only(Wait(2.0)), "So."),
    Answer(step("", action="restart"), only(Custom("restart")), "So."),
    Answer(step("", action="answer", content="42"), only(Finished("42")), "So."),
    Answer(f"```json\n{step('', action='go_back')}\n```", only(Back()), "So."),
    Answer('{"action": "click_element", "element": "OK", "x": 312, "y": 240}', lambda at: (Click(*at(312, 240)),)),
    Answer('{"action": "click_absolute", "x": 312, "y": 240}', lambda at: (Click(*at(312, 240)),)),
    Answer("Click(312, 240)", lambda at: (Click(*at(312, 240)),)),
    Answer("click(x=312, y=240)", lambda at: (Click(*at(312, 240)),)),
]


def holo3(note: str | None, **tool_call: Any) -> str:
    return json.dumps({"note": note, "thought": "So.", "tool_call": tool_call})


HOLO3 = [
    Answer(holo3(None, tool_name="click", element="OK", x=932, y=880), lambda at: (Click(*at(932, 880)),), "So."),
    Answer(
        holo3("Order 7.", tool_name="double_click", element="OK", x=932, y=880),
        lambda at: (Click(*at(932, 880), clicks=2),),
        "Order 7.\nSo.",
    ),
    Answer(
        holo3(None, tool_name="right_click", element="OK", x=932, y=880),
        lambda at: (Click(*at(932, 880), Button.RIGHT),),
        "So.",
    ),
    Answer(holo3(None, tool_name="move", element="OK", x=932, y=880), lambda at: (Move(*at(932, 880)),), "So."),
    Answer(
        holo3(None, tool_name="drag", element="the card", x=932, y=880, to_x=100, to_y=200),
        lambda at: (Drag(*at(932, 880), *at(100, 200)),),
        "So.",
    ),
    Answer(holo3(None, tool_name="write", content="crab"), only(Type("crab")), "So."),
    Answer(
        holo3(None, tool_name="write", content="crab", element="the search bar", x=932, y=880, press_enter=True),
        lambda at: (Click(*at(932, 880)), Type("crab", enter=True)),
        "So.",
    ),
    Answer(holo3(None, tool_name="hotkey", keys=["ctrl", "c"]), only(Hotkey(("ctrl", "c"))), "So."),
    Answer(
        holo3(None, tool_name="scroll", direction="down", x=932, y=880, amount=3),
        lambda at: (Scroll(Direction.DOWN, *at(932, 880), 3),),
        "So.",
    ),
    Answer(holo3(None, tool_name="goto", url="https://example.org"), only(OpenURL("https://example.org")), "So."),
    Answer(holo3(None, tool_name="go_back"), only(Back()), "So."),
    Answer(holo3(None, tool_name="wait", seconds=2), only(Wait(2.0)), "So."),
    Answer(holo3(None, tool_name="answer", content="42"), only(Finished("42")), "So."),
    Answer(f"<think>Well.</think>\n{holo3(None, tool_name='go_back')}", only(Back()), "Well.\nSo."),
    Answer("So.", lambda at: (Click(*at(932, 880)),), "So.", (call("click", element="OK", x=932, y=880),)),
    Answer("", only(Type("a"), Back()), "", (call("write", content="a"), call("go_back"))),
]

# -- AndroidWorld ------------------------------------------------------------------------------------------------------


def reasoned(**action: Any) -> str:
    return f"Reason: So.\nAction: {json.dumps(action)}"


ANDROID_WORLD = [
    Answer(reasoned(action_type="click", x=100, y=200), lambda at: (Click(*at(100, 200)),), "So."),
    Answer('{"action_type": "click", "x": 100, "y": 200}', lambda at: (Click(*at(100, 200)),)),
    Answer(reasoned(action_type="double_tap", x=100, y=200), lambda at: (Click(*at(100, 200), clicks=2),), "So."),
    Answer(reasoned(action_type="long_press", x=100, y=200), lambda at: (LongPress(*at(100, 200)),), "So."),
    Answer(
        reasoned(action_type="input_text", text="Ann", x=100, y=200),
        lambda at: (Click(*at(100, 200)), Type("Ann", enter=True)),
        "So.",
    ),
    Answer(
        reasoned(action_type="input_text", text=42, clear_text=True, index=None),
        only(Hotkey(("ctrl", "a")), Hotkey(("delete",)), Type("42", enter=True)),
        "So.",
    ),
    Answer(reasoned(action_type="keyboard_enter"), only(Hotkey(("enter",))), "So."),
    Answer(reasoned(action_type="navigate_home"), only(Home()), "So."),
    Answer(reasoned(action_type="navigate_back"), only(Back()), "So."),
    Answer(reasoned(action_type="scroll", direction="down"), only(Scroll(Direction.DOWN)), "So."),
    Answer(reasoned(action_type="open_app", app_name="Clock"), only(OpenApp("Clock")), "So."),
    Answer(reasoned(action_type="wait"), only(Wait()), "So."),
    Answer(reasoned(action_type="answer", text="42"), only(Finished("42")), "So."),
    Answer(reasoned(action_type="status", goal_status="complete"), only(Finished()), "So."),
    Answer(
        reasoned(action_type="status", goal_status="infeasible"),
        only(CallUser("the model says that the task can't be done")),
        "So.",
    ),
    Answer(
        reasoned(action_type="press_keyboard", keycode="KEYCODE_DEL"),
        only(Custom("key_event", {"key": "KEYCODE_DEL"})),
        "So.",
    ),
    Answer(reasoned(action_type="unknown"), only(Noop("the model knows no action")), "So."),
]

# -- the shapes of hosted models ---------------------------------------------------------------------------------------


def by_call(means: Means, name: str, **arguments: Any) -> Answer:
    return Answer("So.", means, "So.", (call(name, **arguments),))


CLEARED = (Hotkey(("ctrl", "a")), Hotkey(("delete",)))
GEMINI = [
    by_call(lambda at: (Click(*at(512, 340)),), "click_at", x=512, y=340),
    by_call(lambda at: (Move(*at(512, 340)),), "hover_at", x=512, y=340),
    by_call(lambda at: (Click(*at(512, 340)), *CLEARED, Type("a", True)), "type_text_at", x=512, y=340, text="a"),
    by_call(only(Hotkey(("control", "c"))), "key_combination", keys="Control+C"),
    by_call(only(Scroll(Direction.DOWN)), "scroll_document", direction="down"),
    by_call(lambda at: (Scroll(Direction.UP, *at(512, 340)),), "scroll_at", x=512, y=340, direction="up"),
    by_call(
        lambda at: (Drag(*at(512, 340), *at(100, 900)),),
        "drag_and_drop",
        x=512,
        y=340,
        destination_x=100,
        destination_y=900,
    ),
    by_call(only(OpenURL("https://example.org")), "navigate", url="https://example.org"),
    by_call(only(Back()), "go_back"),
    by_call(only(Wait(5.0)), "wait_5_seconds"),
    Answer('So. {"name": "click_at", "args": {"x": 512, "y": 340}}', lambda at: (Click(*at(512, 340)),), "So."),
    Answer("<think>Well.</think>The answer is 42.", only(Finished("The answer is 42.")), "Well."),
]


def computer(means: Means, **action: Any) -> Answer:
    return by_call(means, "computer", action=action)


OPENAI = [
    computer(lambda at: (Click(*at(100, 200)),), type="click", x=100, y=200, button="left", keys=[]),
    computer(
        lambda at: (KeyDown("shift"), Click(*at(100, 200)), KeyUp("shift")), type="click", x=100, y=200, keys=["SHIFT"]
    ),
    computer(lambda at: (Click(*at(100, 200), clicks=2),), type="double_click", x=100, y=200),
    computer(lambda at: (Move(*at(100, 200)),), type="move", x=100, y=200),
    computer(
        lambda at: (Drag(*at(100, 200), *at(300, 20)),), type="drag", path=[{"x": 100, "y": 200}, {"x": 300, "y": 20}]
    ),
    computer(
        lambda at: (Scroll(Direction.DOWN, *at(100, 200)),), type="scroll", x=100, y=200, scroll_x=0, scroll_y=300
    ),
    computer(only(Hotkey(("ctrl", "c"))), type="keypress", keys=["CTRL", "C"]),
    computer(only(Type("a")), type="type", text="a"),
    computer(only(Wait()), type="wait"),
    computer(only(Noop("a screenshot comes with each turn")), type="screenshot"),
    by_call(only(Wait()), "computer", type="wait"),
    Answer('{"type": "click", "x": 100, "y": 200}', lambda at: (Click(*at(100, 200)),)),
    Answer("Done.", only(Finished("Done."))),
]


def anthropic(means: Means, **arguments: Any) -> Answer:
    return by_call(means, "computer", **arguments)


CLAUDE = [
    anthropic(lambda at: (Click(*at(100, 200)),), action="left_click", coordinate=[100, 200]),
    anthropic(
        lambda at: (KeyDown("ctrl"), Click(*at(100, 200), Button.RIGHT), KeyUp("ctrl")),
        action="right_click",
        coordinate=[100, 200],
        text="ctrl",
    ),
    anthropic(lambda at: (Click(*at(100, 200), clicks=3),), action="triple_click", coordinate=[100, 200]),
    anthropic(lambda at: (Move(*at(100, 200)),), action="mouse_move", coordinate=[100, 200]),
    anthropic(
        lambda at: (Drag(*at(100, 200), *at(300, 20)),),
        action="left_click_drag",
        start_coordinate=[100, 200],
        coordinate=[300, 20],
    ),
    anthropic(
        lambda at: (Scroll(Direction.DOWN, *at(100, 200), 3),),
        action="scroll",
        coordinate=[100, 200],
        scroll_direction="down",
        scroll_amount=3,
    ),
    anthropic(only(Hotkey(("ctrl", "c"))), action="key", text="ctrl+c"),
    anthropic(only(KeyDown("w"), Wait(2.0), KeyUp("w")), action="hold_key", text="w", duration=2),
    anthropic(only(Type("a")), action="type", text="a"),
    anthropic(only(MouseDown()), action="left_mouse_down"),
    anthropic(only(Wait(1.0)), action="wait", duration=1),
    anthropic(only(Noop("a screenshot comes with each turn")), action="screenshot"),
    Answer('{"action": "left_click", "coordinate": [100, 200]}', lambda at: (Click(*at(100, 200)),)),
    Answer("Done.", only(Finished("Done."))),
]

CORPORA: Mapping[str, Corpus] = {
    "seed": Corpus(thousandths, SEED),
    "ui-tars-2": Corpus(thousandths, SEED),
    "scalecua": Corpus(resized, SCALECUA),
    "scalecua-mobile": Corpus(resized, SCALECUA),
    "holo1.5": Corpus(resized, HOLO1_5),
    "holo3": Corpus(thousandths, HOLO3),
    "holo3.1": Corpus(thousandths, HOLO3),
    "android-world": Corpus(pixels, ANDROID_WORLD),
    "gemini": Corpus(thousandths, GEMINI),
    "openai": Corpus(pixels, OPENAI),
    "claude": Corpus(pixels, CLAUDE),
}
"""By the names of `FORMATS`."""


# -- outputs of the field ----------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """An output, the format of its model, and the actions on a screen of 1920x1080, or why it is none."""

    source: str
    format: str
    answer: Answer | str
    means: tuple[Action, ...] | str


OTHER_FORMATS: Mapping[str, AgentFormat] = {
    "ui-tars-thousandths": ui_tars("relative1000"),
    "scalecua-shares": scalecua("relative1"),
    "holo1.5-pixels": holo("absolute", version="holo1.5"),
    "json-thousandths": json_actions("relative1000"),
    "tools-thousandths": tool_calls("relative1000"),
}
SCREEN = (1920, 1080)
OK = thousandths(SCREEN)(512, 340)
BY_CODE = (979.2, 367.2)


def called(name: str, **arguments: Any) -> Answer:
    return Answer("", only(), "", (call(name, **arguments),))


def qwen(tool: str = "computer_use", **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"


def tars(action: str) -> str:
    return f"Thought: x\nAction: {action}"


OF_TARS = resized(SCREEN)
FIELD: list[Output] = [
    Output(
        "UI-TARS-desktop 37",
        "ui-tars",
        "1. The user has typed the address.\n2. Enter confirms it.\n"
        "Action: click(start_box='<|box_start|>(691,85)<|box_end|>')",
        (Click(*OF_TARS(691, 85)),),
    ),
    Output("UI-TARS-desktop 942", "ui-tars-thousandths", tars(f"click(point='{POINT}')"), (Click(*OK),)),
    Output("942, another quote", "ui-tars-thousandths", tars(f"click(point='{POINT}\""), "cut off within its action"),
    Output("942, no quote", "ui-tars-thousandths", tars(f"click(point='{POINT})"), "cut off within its action"),
    Output(
        "UI-TARS-desktop 28",
        "ui-tars-thousandths",
        tars("click(start_box='[10, 850, 50, 890]')"),
        (Click(57.6, 939.6),),
    ),
    Output("UI-TARS 78", "ui-tars", "Action: click(start_box='=')", "a point must be two finite numbers"),
    Output(
        "midscene 843",
        "ui-tars-thousandths",
        "1. 分析目标\n2. 界面观察\n\nAction：click(start_box='<bbox>191 21 191 21</bbox>')",
        (Click(366.72, 22.68),),
    ),
    Output(
        "midscene 504",
        "ui-tars",
        "Thought: Type \"xxx\".\nAction: click(start_box='(711,499)')\n\ntype(content='xxx')<|im_end|>",
        (Click(*OF_TARS(711, 499)), Type("xxx")),
    ),
    Output("UI-TARS 252, compact", "ui-tars-thousandths", "click>point>point>450 565", "the answer has no action"),
    Output(
        "UI-TARS 252, scroll",
        "ui-tars-thousandths",
        tars("scroll(start_box='(500,800)', end_box='(500,200)')"),
        "scroll has no 'end_box'; it takes start_box, direction",
    ),
    Output("cua 639", "ui-tars", tars("left_double(start_box='(100,200)')"), (Click(*OF_TARS(100, 200), clicks=2),)),
    Output(
        "UI-TARS, long_press",
        "ui-tars",
        tars("long_press(start_box='<|box_start|>(100,200)<|box_end|>')"),
        (LongPress(*OF_TARS(100, 200)),),
    ),
    Output("UI-TARS, open_app", "ui-tars", tars("open_app(app_name='Chrome')"), (OpenApp("Chrome"),)),
    Output("UI-TARS, press_home", "ui-tars", tars("press_home()"), (Home(),)),
    Output("UI-TARS, press_back", "ui-tars", tars("press_back()"), (Back(),)),
    Output("UI-TARS, wait", "ui-tars", tars("wait(time='5')"), (Wait(5.0),)),
    Output("UI-TARS, three keys", "ui-tars", tars("hotkey(key='ctrl shift t')"), (Hotkey(("ctrl", "shift", "t")),)),
    Output(
        "Doubao 1.6",
        "ui-tars-thousandths",
        f"<think>I will click</think>\nThought: x\nAction: click(point='{POINT}')",
        (Click(*OK),),
    ),
    Output("UI-TARS-2", "ui-tars-2", xml("click", point=POINT), (Click(*OK),)),
    Output("Seed, named", "seed", f"<{THINK}>thinking</{THINK}>\n{NAMED}", (Click(*OK),)),
    Output(
        "GLM-4.5V",
        "glm-v",
        "<think>..</think>\nMemory: []\nReason: x\nAction: <|begin_of_box|>"
        "left_click(start_box='[512,340]', element_info='OK button')<|end_of_box|>",
        (Click(*OK),),
    ),
    Output("GLM-4.6V", "glm-v", "Action:\nleft_click(start_box='[512,340]', element_info='OK')", (Click(*OK),)),
    Output(
        "AutoGLM", "autoglm", '<think>..</think><answer>do(action="Tap", element=[512,340])</answer>', (Click(*OK),)
    ),
    Output("ScaleCUA", "scalecua-shares", operation("click(x=0.51, y=0.34)"), (Click(*BY_CODE),)),
    Output("Holo, a place", "holo1.5-pixels", "click(x=932, y=880)", (Click(932, 880),)),
    Output(
        "Qwen, click",
        "qwen3-vl",
        "Action: click OK\n" + qwen(action="left_click", coordinate=[512, 340]),
        (Click(*OK),),
    ),
    Output("Qwen, type", "qwen3-vl", qwen(action="type", text="hello"), (Type("hello"),)),
    Output("Qwen, key", "qwen3-vl", qwen(action="key", keys=["ctrl", "c"]), (Hotkey(("ctrl", "c")),)),
    Output("Qwen, scroll", "qwen3-vl", qwen(action="scroll", pixels=-500), (Scroll(Direction.DOWN, None, None, 500),)),
    Output("Qwen, move", "qwen3-vl", qwen(action="mouse_move", coordinate=[512, 340]), (Move(*OK),)),
    Output(
        "Qwen, drag",
        "qwen3-vl",
        qwen(action="left_click_drag", coordinate=[512, 340]),
        (MouseDown(), Move(*OK), MouseUp()),
    ),
    Output("Qwen, wait", "qwen3-vl", qwen(action="wait", time=2), (Wait(2.0),)),
    Output("Qwen, end", "qwen3-vl", qwen(action="terminate", status="success"), (Finished(),)),
    Output("EvoCUA", "qwen3-vl", qwen(action="key_down", keys=["shift"]), (KeyDown("shift"),)),
    Output(
        "MAI-UI",
        "qwen3-vl-mobile",
        "<thinking>x</thinking>\n" + qwen("mobile_use", action="click", coordinate=[512, 340]),
        (Click(*OK),),
    ),
    Output(
        "Holo3",
        "holo3",
        '{"note": null, "thought": "x", "tool_call": {"tool_name": "click", "element": "OK", "x": 512, "y": 340}}',
        (Click(*OK),),
    ),
    Output(
        "Holo1.5",
        "holo1.5",
        '{"note":"","thought":"x","action":{"action":"click_element","element":"OK","x":657,"y":318}}',
        (Click(*OF_TARS(657, 318)),),
    ),
    Output("Fara", "qwen3-vl", qwen(action="visit_url", url="https://x"), (OpenURL("https://x"),)),
    Output("Gemini", "gemini", '{"name":"click_at","args":{"x":512,"y":340}}', (Click(*OK),)),
    Output(
        "OpenCUA",
        "python",
        "# Step: 1\n## Thought:\nx\n## Action:\nClick OK\n## Code:\n```python\npyautogui.click(x=0.51, y=0.34)\n```",
        (Click(*BY_CODE),),
    ),
    Output(
        "Kimi K2.5",
        "python",
        "## Thought\nx\n## Action:\nclick\n## Code:\n```python\npyautogui.click(x=0.51, y=0.34)\n```",
        (Click(*BY_CODE),),
    ),
    Output("OpenCUA, end", "opencua", '## Code:\n```code\ncomputer.terminate(status="success")\n```', (Finished(),)),
    Output(
        "Agent S",
        "python",
        '```python\nagent.click("OK button", 1, "left")\n```',
        "there is no call 'agent.click': it says in words where to act",
    ),
    Output("Aguvis", "python", "assistantos\nAction: click OK\npyautogui.click(x=0.5, y=0.3)", (Click(960, 324),)),
    Output("AndroidWorld", "android-world", '{"action_type": "click", "x": 100, "y": 200}', (Click(100, 200),)),
    Output("our own", "json-thousandths", '{"thought": "x", "action": "click", "x": 512, "y": 340}', (Click(*OK),)),
    Output(
        "our own, double_click",
        "json-thousandths",
        '{"action": "double_click", "x": 512, "y": 340}',
        "there is no action 'double_click'; the actions are click",
    ),
    Output("Claude", "claude", called("computer", action="left_click", coordinate=[512, 340]), (Click(512, 340),)),
    Output(
        "Qwen, taken out", "qwen3-vl", called("computer_use", action="left_click", coordinate=[512, 340]), (Click(*OK),)
    ),
    Output("OpenAI", "openai", called("computer", type="click", x=512, y=340, button="left"), (Click(512, 340),)),
    Output("Holo3.1", "holo3.1", called("click", element="OK", x=512, y=340), (Click(*OK),)),
    Output("Seed, taken out", "seed", called("click", point=POINT), (Click(*OK),)),
    Output("our own, taken out", "tools-thousandths", called("click", x=512, y=340), (Click(*OK),)),
]

WRITTEN: Mapping[str, list[str]] = {
    **{name: [answer.text for answer in corpus.answers] for name, corpus in CORPORA.items()},
    **{
        name: [
            output.answer if isinstance(output.answer, str) else json.dumps(output.answer.calls)
            for output in FIELD
            if output.format == name
        ]
        for name in ("ui-tars", "qwen3-vl", "qwen3-vl-mobile", "python", "glm-v", "autoglm")
    },
    "json": ['{"thought": "x", "action": "click", "x": 512, "y": 340}', 'So. {"actions": [{"action": "wait"}]}'],
}
"""Answers as texts, by format: for tests that tear them."""
