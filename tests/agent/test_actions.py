"""Answers in UI-TARS 1.5's format: what they mean, what is wrong with them, and writing them."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S

from managed_vllm.agent.actions import (
    UI_TARS_PROMPT,
    Action,
    ActionParseError,
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
    OpenApp,
    ParsedResponse,
    Scroll,
    Type,
    Wait,
    action_from_dict,
    action_to_dict,
    describe,
    parse_ui_tars,
    smart_resize,
    system_prompt,
    to_pyautogui,
    to_ui_tars,
    ui_tars_regex,
)
from managed_vllm.agent.actions.coordinates import MAX_PIXELS, MIN_PIXELS
from managed_vllm.errors import ConfigError

CORPUS = Path(__file__).parent.parent / "data" / "ui_tars" / "answers.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
SIZE = (1932, 1092)
"""The same after resizing: pixels of the model are pixels of the screenshot."""
HD = (1920, 1080)


def parsed(case: dict[str, Any]) -> ParsedResponse:
    size = case.get("size", SIZE)
    return parse_ui_tars(case["text"], (size[0], size[1]), coordinates=case.get("coordinates", "resized"))


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_the_corpus_is_whole() -> None:
    assert len(CASES) >= 240
    assert sum("error" in case for case in CASES) >= 70


@pytest.mark.parametrize("case", [case for case in CASES if "actions" in case], ids=lambda case: case["text"][:60])
def test_an_answer_means(case: dict[str, Any]) -> None:
    actions = tuple(action_from_dict(action) for action in case["actions"])
    assert parsed(case) == ParsedResponse(case["thought"], actions)


@pytest.mark.parametrize("case", [case for case in CASES if "error" in case], ids=lambda case: case["text"][:60])
def test_an_answer_is_refused_with_the_characters_to_blame(case: dict[str, Any]) -> None:
    with pytest.raises(ActionParseError) as caught:
        parsed(case)
    error = caught.value
    assert case["error"] in error.message
    assert error.text == case["text"]
    if "blame" in case:
        assert error.text[slice(*error.span)] == case["blame"]


# -- coordinates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1920, 1080), (1932, 1092)),
        ((1280, 720), (1288, 728)),
        ((640, 360), (644, 364)),
        ((28, 28), (280, 280)),
        ((100, 100), (280, 280)),
        ((3840, 2160), (3836, 2156)),
        ((10000, 10000), (3556, 3556)),  # 3584 but for rounding, in transformers too
    ],
)
def test_smart_resize_gives_the_size_that_the_model_sees(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert smart_resize(size) == resized


@pytest.mark.no_cover
def test_smart_resize_agrees_with_transformers() -> None:
    theirs = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_qwen2_vl",
        reason="transformers, with what its image processors import, is not installed",
        exc_type=ImportError,
    ).smart_resize

    @settings(max_examples=examples(100), deadline=None)
    @given(
        st.integers(1, 8000),
        st.integers(1, 8000),
        st.sampled_from([(MIN_PIXELS, MAX_PIXELS), (3136, 1003520), (1, 50_000), (4 * 28**2, 1280 * 28**2)]),
        st.sampled_from([28, 32]),
    )
    def agrees(width: int, height: int, bounds: tuple[int, int], factor: int) -> None:
        assume(max(width, height) <= 200 * min(width, height))
        least, most = bounds
        ours = smart_resize((width, height), factor=factor, min_pixels=least, max_pixels=most)
        assert ours == theirs(height, width, factor=factor, min_pixels=least, max_pixels=most)[::-1]

    agrees()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"image_size": (4001, 20)}, "image_size"),
        ({"image_size": (0, 20)}, "image_size"),
        ({"image_size": (10.5, 20)}, "image_size"),
        ({"image_size": (10, 20, 3)}, "image_size"),
        ({"image_size": None}, "image_size"),
        ({"coordinates": "pixels"}, "coordinates"),
        ({"off_screen": "ignore"}, "off_screen"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels"),
        ({"factor": True}, "factor"),
    ],
)
def test_wrong_arguments_are_told_by_name(arguments: dict[str, Any], field: str) -> None:
    size = arguments.pop("image_size", HD)
    with pytest.raises(ConfigError) as caught:
        parse_ui_tars("wait()", size, **arguments)
    assert caught.value.field == field


def test_a_narrow_image_has_absolute_and_relative_coordinates_all_the_same() -> None:
    for frame in ("absolute", "relative1000"):
        response = parse_ui_tars("click(start_box='(500,2)')", (4001, 20), coordinates=frame)
        assert isinstance(response.actions[0], Click)


def test_points_are_scaled_exactly() -> None:
    (action,) = parse_ui_tars("click(start_box='(197,525)')", HD).actions
    assert action == Click(197 * 1920 / 1932, 525 * 1080 / 1092)


def test_the_edge_of_the_image_is_its_last_pixel() -> None:
    for frame, edge in (("resized", "(1932,1092)"), ("absolute", "(1920,1080)"), ("relative1000", "(1000,1000)")):
        (action,) = parse_ui_tars(f"click(start_box='{edge}')", HD, coordinates=frame).actions  # type: ignore[arg-type]
        assert action == Click(1919, 1079)


def test_points_off_the_screen_can_be_moved_onto_it() -> None:
    for text, x, y in (("(-5,9999)", 0, 1079), (f"({'9' * 400},0)", 1919, 0)):
        answer = f"click(start_box='{text}')"
        with pytest.raises(ActionParseError, match="off the screen"):
            parse_ui_tars(answer, HD)
        assert parse_ui_tars(answer, HD, off_screen="clamp").actions == (Click(x, y),)


# -- time --------------------------------------------------------------------------------------------------------------

QUARTER_OF_A_MEGABYTE = 250_000


PIECES = (
    *("'", '"', "(", "[", "`", "\\", " ", "\n", "#", "<", "*", "')", "' ", "'\\", "')\n", "') x", "''') ", "`` "),
    *("# \n", "Action:", "Action: ", "Action:\n", "Thought: ", "\nThought:", "<think>", "<|x|>", "Action_Summary: "),
    *("wait()", "wait()\n", "wait() ", "click(", "click (", "click(start_box='(1,2)')\n", "start_box=", "a", "a("),
    *("1", "1,", "type(content='", "type(content='a')\n", "type(content='a') x\n", "type(content='''a') x\n"),
    *("C:\\a ", "C:\\a\\", "Program Files ", "ctrl+", "a-", "<|box_start|>", "<point>", "((1,2)"),
)
PLACES = (
    *(("", ""), ("Action: type(content='", "')"), ("Action: type(content='''", ""), ("click(start_box='", "')")),
    *(("click(start_box=", ""), ("Thought: ", "\nAction: wait()"), ("hotkey(key='", "')"), ("Action: wait()", "")),
)


@pytest.mark.no_cover
@pytest.mark.parametrize("piece", PIECES)
def test_a_long_answer_of_anything_is_read_in_linear_time(piece: str) -> None:
    for before, after in PLACES:
        text = before + piece * (QUARTER_OF_A_MEGABYTE // len(piece)) + after
        began = time.process_time()
        outcome(text, HD)
        # Measured: 0.2 s at most. What is quadratic takes minutes. benchmarks/ratios.py measures it.
        assert time.process_time() - began < HANG_S, before


@pytest.mark.no_cover
@pytest.mark.parametrize("text", ["'", "')", "(", "Action: wait()\n", "type(content='a')\n"])
def test_a_megabyte_is_read_in_linear_time_too(text: str) -> None:
    text = "Action: type(content='x')\n" + text * (4 * QUARTER_OF_A_MEGABYTE // len(text))
    began = time.process_time()
    outcome(text, HD)
    assert time.process_time() - began < HANG_S


# -- fuzz --------------------------------------------------------------------------------------------------------------

FRAGMENTS = (
    *("Thought: ", "Action: ", "Action:", "Reflection: ", "Action_Summary: ", "\n", "\n\n", " ", "```", "`", "; "),
    *("# ", "click(", "left_double(", "right_single(", "drag(", "hotkey(", "type(", "scroll(", "wait(", "finished("),
    *("call_user(", "start_box=", "end_box=", "point=", "key=", "content=", "direction=", "x=", ", ", ",", "(", ")"),
    *("[", "]", "'", '"', "'(197,525)'", "(1,2)", "[1, 2, 3, 4]", "<|box_start|>", "<|box_end|>", "<point>"),
    *("</point>", "1", "-1", "9999", ".", "nan", "1e9", "ctrl c", "ctrl+", "down", "hello", "it's", "\\", "\\'"),
    *("\\n", "\\\\", "C:\\new", "é", "\ud800", "'''", "<think>", "</think>", "<|im_end|>", "wait()"),
    *("type(content='x')", "click(start_box='(1,2)')", "')", "\x00", "\r\n"),
)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An answer of the corpus in which something was cut out, put in, or repeated."""
    text: str = draw(st.sampled_from(CASES))["text"]
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        middle = draw(st.sampled_from(["", text[start:end] * 2, *FRAGMENTS]))
        text = text[:start] + middle + text[end:]
    return text


FROM_FRAGMENTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
CALLS = st.sampled_from([case["text"] for case in CASES if "actions" in case])
SEVERAL = st.tuples(CALLS, st.sampled_from(["\n", "\n\n", " ", "; ", ""]), CALLS | FROM_FRAGMENTS).map("".join)
ANSWERS = st.one_of(damaged(), damaged(), damaged(), SEVERAL, FROM_FRAGMENTS, st.text(st.characters(), max_size=60))


def outcome(text: str, size: tuple[int, int], coordinates: Any = "resized") -> ParsedResponse | ActionParseError:
    """The parsed answer or the error, either of them as it must be."""
    try:
        response = parse_ui_tars(text, size, coordinates=coordinates)
    except ActionParseError as caught:
        error = caught
    else:
        assert response.actions
        return response
    start, end = error.span
    assert 0 <= start <= end <= len(text)
    assert error.text == text
    assert 0 < len(error.message) < 500
    return error


def check(text: str, size: tuple[int, int], coordinates: Any) -> None:
    """Whatever the text is: actions that everything else can deal with, or the one error."""
    response = outcome(text, size, coordinates)
    if isinstance(response, ActionParseError):
        return
    for action in response.actions:
        for name, most in (("x", size[0]), ("y", size[1]), ("to_x", size[0]), ("to_y", size[1])):
            value = getattr(action, name, None)
            assert value is None or (math.isfinite(value) and 0 <= value <= most - 1)
        assert action_from_dict(json.loads(json.dumps(action_to_dict(action)))) == action
        assert "\n" not in describe(action)
        if not (isinstance(action, Type) and not action.enter and action.text.endswith("\n")):
            again = to_ui_tars(action, size, coordinates)
            assert parse_ui_tars(again, size, coordinates=coordinates).actions == (action,)
    of_desktops = [action for action in response.actions if not isinstance(action, OpenApp | Home | Back)]
    compile(to_pyautogui(of_desktops), "answer", "exec")


FRAMES = st.sampled_from(["resized", "relative1000", "absolute"])
SIZES = st.sampled_from([HD, SIZE, (1280, 720), (640, 360), (3, 2), (5000, 4000)])
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.no_cover
@settings(max_examples=examples(1000), **QUIET)
@given(ANSWERS, SIZES, FRAMES)
def test_any_text_is_actions_or_a_parse_error(text: str, size: tuple[int, int], coordinates: str) -> None:
    check(text, size, coordinates)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, database=None, **QUIET)
@given(ANSWERS, SIZES, FRAMES)
def test_any_of_100_000_texts_is_actions_or_a_parse_error(text: str, size: tuple[int, int], coordinates: str) -> None:
    check(text, size, coordinates)


# -- writing -----------------------------------------------------------------------------------------------------------


def points(size: tuple[int, int]) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(0, size[0] - 1), st.floats(0, size[1] - 1))


TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("'\"\\\n\tCn: ()")), max_size=30)
KEYS = st.sampled_from(["ctrl", "shift", "a", "f5", "arrowleft", "page_down", "space", "1", ".", "'", '"', "\\", "+"])


@st.composite
def actions_in(draw: st.DrawFn, size: tuple[int, int]) -> Action:
    kind = draw(st.sampled_from([Click, Drag, Type, Hotkey, Scroll, Wait, Finished, CallUser]))
    if kind is Click:
        button, clicks = draw(st.sampled_from([(Button.LEFT, 1), (Button.LEFT, 2), (Button.RIGHT, 1)]))
        return Click(*draw(points(size)), button, clicks)
    if kind is Drag:
        return Drag(*draw(points(size)), *draw(points(size)))
    if kind is Type:
        text, enter = draw(TEXTS), draw(st.booleans())
        return Type(text, enter or text.endswith("\n"))
    if kind is Hotkey:
        keys = draw(st.lists(KEYS, min_size=1, max_size=3).filter(lambda keys: "++" not in "".join(keys)))
        return Hotkey(tuple(keys))
    if kind is Scroll:
        direction = draw(st.sampled_from(list(Direction)))
        return Scroll(direction, *draw(points(size))) if draw(st.booleans()) else Scroll(direction)
    if kind is Wait:
        return Wait()
    text = draw(TEXTS)
    return Finished(text) if draw(st.booleans()) else CallUser(text)


@pytest.mark.no_cover
@settings(max_examples=examples(200), **QUIET)
@given(st.data(), SIZES, FRAMES)
def test_what_is_written_is_read_as_the_same_action(data: Any, size: tuple[int, int], coordinates: Any) -> None:
    written = [data.draw(actions_in(size)) for _ in range(data.draw(st.integers(1, 3)))]
    lines = [to_ui_tars(action, size, coordinates) for action in written]
    for between in ("\n", "\n\n", " "):
        answer = f"Thought: I do.\nAction: {between.join(lines)}"
        assert parse_ui_tars(answer, size, coordinates=coordinates) == ParsedResponse("I do.", tuple(written))


def test_coordinates_are_written_as_short_as_can_be() -> None:
    assert to_ui_tars(Click(197, 525), SIZE) == "click(start_box='(197,525)')"
    assert to_ui_tars(Click(197, 525), HD, "absolute") == "click(start_box='(197,525)')"
    assert to_ui_tars(Click(960, 540), HD, "relative1000") == "click(start_box='(500,500)')"
    assert to_ui_tars(Click(197, 525), HD) == "click(start_box='(198.23125,530.8333333333333)')"
    assert to_ui_tars(Click(197, 525), HD, decimals=0) == "click(start_box='(198,531)')"


@pytest.mark.parametrize(
    "action",
    [
        Click(1, 2, Button.MIDDLE),
        Click(1, 2, Button.LEFT, 3),
        Click(1920, 2),
        Click(-1, 2),
        Click(math.nan, 2),
        Type("a\n"),
        Type("\ud800"),
        Hotkey(()),
        Hotkey(("ctrl c",)),
        Hotkey(("Ctrl",)),
        Hotkey(("x'",)),
        Hotkey(("+", "+", "c")),
        Scroll(Direction.UP, amount=3),
        Wait(1e9),
        Custom("fly"),
    ],
)
def test_what_the_format_has_no_words_for_is_not_written(action: Action) -> None:
    with pytest.raises(ValueError, match=r"can't say|not within the image"):
        to_ui_tars(action, HD)


# -- prompt and constraint ---------------------------------------------------------------------------------------------


def test_every_action_of_the_prompt_is_one_that_is_read() -> None:
    space = UI_TARS_PROMPT.partition("## Action Space")[2].partition("## Note")[0].strip()
    for line in space.splitlines():
        example = line.partition(" #")[0].replace("down or up or right or left", "down")
        for name, value in (("x1", "1"), ("y1", "2"), ("x3", "3"), ("y3", "4")):
            example = example.replace(name, value)
        assert len(parse_ui_tars(f"Action: {example}", HD).actions) == 1, example
    listed = {line.partition("(")[0] for line in space.splitlines()}
    assert listed == set(inspect.signature(ui_tars_regex).parameters["actions"].default)


def test_an_instruction_goes_into_the_prompt_as_it_is() -> None:
    prompt = system_prompt("Type {language} {instruction} {0}", language="German")
    assert prompt.endswith("## User Instruction\nType {language} {instruction} {0}\n")
    assert "in German." in prompt


@pytest.mark.parametrize("coordinates", ["resized", "relative1000", "absolute"])
@pytest.mark.parametrize("size", [HD, (640, 360), (100, 40), (3, 2)])
def test_every_match_of_the_regex_is_one_action(coordinates: Any, size: tuple[int, int]) -> None:
    pattern = ui_tars_regex(size, coordinates=coordinates)
    assert not re.search(r"\(\?|[*+](?![^\[]*\])|\{\d*,\}", pattern)  # no look-around, every repeat is bounded

    @settings(max_examples=examples(50), **QUIET)
    @given(st.from_regex(pattern, fullmatch=True))
    def is_one_action(answer: str) -> None:
        response = parse_ui_tars(answer, size, coordinates=coordinates)
        assert len(response.actions) == 1
        assert response.thought == answer.partition("\n")[0].removeprefix("Thought: ").strip()

    is_one_action()


def test_the_regex_has_every_whole_number_of_the_image_and_no_other() -> None:
    for side in (1, 2, 9, 10, 11, 28, 99, 100, 101, 364, 1000, 1090, 1932):
        pattern = re.compile(ui_tars_regex((side, side), coordinates="absolute", actions=["click"], max_thought=0))
        found = {n for n in range(side + 200) if pattern.fullmatch(f"Action: click(start_box='({n},0)')")}
        assert found == set(range(side))


def test_the_regex_has_the_actions_that_are_asked_for() -> None:
    pattern = re.compile(ui_tars_regex(HD, actions=["click", "finished"], max_thought=0))
    assert pattern.fullmatch("Action: finished()")
    assert not pattern.fullmatch("Action: wait()")
    with pytest.raises(ConfigError):
        ui_tars_regex(HD, actions=["fly"])
    with pytest.raises(ConfigError):
        ui_tars_regex(HD, actions=[])


def test_the_regex_is_one_for_the_structured_outputs_of_vllm() -> None:
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed", exc_type=ImportError)
    xgrammar.Grammar.from_regex(ui_tars_regex(HD))


# -- others ------------------------------------------------------------------------------------------------------------

RIGHT_IN_BOTH = [
    "Thought: a\nAction: click(start_box='(197,525)')",
    "Thought: a\nAction: click(start_box='(187,515,207,535)')",
    "Thought: a\nAction: click(point='<point>197 525</point>')",
    "Thought: a\nAction: click(start_box='(197.5,525.25)')",
    "Thought: a\nAction: left_double(start_box='(1,2)')",
    "Thought: a\nAction: right_single(start_box='(1,2)')",
    "Thought: a\nAction: drag(start_box='(1,2)', end_box='(300,400)')",
    "Thought: a\nAction: hotkey(key='ctrl c')",
    "Thought: a\nAction: click(start_box='(1,2)')\n\nhotkey(key='enter')",
    "Thought: a\nAction: type(content='it\\'s')",
    "Thought: a\nAction: finished()",
    "Thought: a b\n\nAction: wait()",
]


@pytest.mark.parametrize("answer", RIGHT_IN_BOTH)
def test_the_package_ui_tars_agrees_where_it_is_right(answer: str) -> None:
    module = pytest.importorskip("ui_tars.action_parser", reason="the package ui-tars is not installed")
    theirs = module.parse_action_to_structure_output(answer, 1000, HD[1], HD[0], "qwen25vl")
    ours = parse_ui_tars(answer, HD)
    assert ours.thought == theirs[0]["thought"]
    assert len(ours.actions) == len(theirs)
    for action, their in zip(ours.actions, theirs, strict=True):
        inputs = their["action_inputs"]
        places = []
        for name in ("start_box", "end_box"):
            if name in inputs:
                x1, y1, x2, y2 = (float(number) for number in inputs[name].strip("[]").split(","))
                places += [(x1 + x2) / 2 * HD[0], (y1 + y2) / 2 * HD[1]]
        about: Any = [pytest.approx(place) for place in places]
        match their["action_type"]:
            case "click":
                assert action == Click(*about)
            case "left_double":
                assert action == Click(about[0], about[1], Button.LEFT, 2)
            case "right_single":
                assert action == Click(about[0], about[1], Button.RIGHT)
            case "drag":
                assert action == Drag(*about)
            case "hotkey":
                assert action == Hotkey(tuple(inputs["key"].split()))
            case "type":
                # It leaves the backslash in: its own writer takes it out later.
                assert action == Type(inputs["content"].replace("\\'", "'"))
            case "finished":
                assert action == Finished()
            case "wait":
                assert action == Wait()
            case other:
                pytest.fail(f"{other} is not compared")


def test_the_error_is_a_value_error_of_ours_and_survives_pickling() -> None:
    import pickle

    with pytest.raises(ActionParseError) as caught:
        parse_ui_tars("Action: fly()", HD)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, ActionParseError)
    assert (again.message, again.text, again.span) == (caught.value.message, "Action: fly()", (8, 11))


def test_importing_the_actions_is_light() -> None:
    code = "import sys, managed_vllm.agent.actions; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "PIL", "transformers", "torch", "openai", "aiohttp", "jinja2", "gymnasium", "jsonschema"}
    assert not heavy & set(done.stdout.split())
