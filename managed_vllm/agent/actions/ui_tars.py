r"""Answers of UI-TARS 1.5, and of models that were taught its format, to typed actions.

    Thought: The dialog is open, so I click OK.
    Action: click(start_box='(197,525)')

`parse_ui_tars` reads it once, from left to right, and evaluates nothing. What can be told without a doubt is taken;
what can't is an `ActionParseError` that says which characters are to blame. Nothing that looks like an action is left
out in silence. In this order:

- **Thought.** All before the first action, without its labels: `Thought:`, `Reflection:`, `Action_Summary:`. It may be
  missing. So may `Action:`, where a line begins with an action. `<think>…</think>` is thought, whatever stands in it.
- **Actions.** One or more, with blank lines, line ends, `;` or a further `Action:` between them: they are in order. A
  second `Thought:` after an action is an error, since the model went on without having seen what its action did.
- **After them** there may be text, as long as no action is in it. Text between actions is an error, since it may take
  one of them back. Markdown fences and backticks around an action, comments (`# …`) and end-of-turn tokens are skipped.
- **Points.** `'(x,y)'`, `'x y'`, `'[x1, y1, x2, y2]'`, `'(x1,y1),(x2,y2)'`, each also in `<|box_start|>…<|box_end|>`,
  `<point>…</point>` or `<bbox>…</bbox>`; quotes may be missing. Four numbers are a box, whose centre is meant. `point`,
  `start_point` and `end_point` are other names of `start_box` and `end_box`.
- **Keys**: `hotkey` presses them together; `press` and `keydown` hold one, `release` and `keyup` let it go.
- `wait(5)` waits so many seconds, `hover` moves the pointer.
- **Texts** (`content`). `\'`, `\"`, `\\`, `\n` and `\t` are escapes, as UI-TARS is told; any other backslash stands for
  itself. So does a Windows path on a drive from C to H that is written with single backslashes, until the next blank
  or quote (`C:\new\table`; `Program Files` counts as one word), but for a `\n` at the end of the content. For `type` a
  line end there, escaped or not, is the Enter key. Quotes within, which should have been escaped but are not, are taken
  as part of the text if there is one place only at which the action can end.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from fractions import Fraction
from typing import NamedTuple, NoReturn

from managed_vllm.agent.actions.coordinates import (
    FACTOR,
    MAX_PIXELS,
    MIN_PIXELS,
    Coordinates,
    Frame,
    OffScreen,
    OffScreenError,
)
from managed_vllm.agent.actions.ui_tars_calls import BUILD, FUNCTIONS, SAME_PARAMETER, Function, Value
from managed_vllm.agent.actions.values import (
    Action,
    ParsedResponse,
    Type,
)
from managed_vllm.errors import ActionParseError


def parse_ui_tars(
    text: str,
    image_size: tuple[int, int],
    *,
    coordinates: Coordinates = "resized",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = FACTOR,
    off_screen: OffScreen = "error",
    picture: tuple[int, int] | None = None,
) -> ParsedResponse:
    """The thought and the actions of an answer, in time linear in its length.

    Args:
        text: the model's answer, whole.
        image_size: width and height of the screenshot, in pixels.
        coordinates: the frame of the model's numbers, see `managed_vllm.agent.actions.coordinates`.
        min_pixels, max_pixels, factor: of the model's image processor, for `resized`.
        picture: width and height of what the model sees, for `resized`, where it is known; then the three don't count.
        off_screen: what a point outside of the image is: `error`, or `clamp`: moved to the nearest pixel. A point up to
            one pixel beyond the last one (x = width) is moved in any case.

    Returns at least one action; their coordinates are pixels of the screenshot. Raises `ActionParseError` if the answer
    is no action, `ConfigError` if another argument is wrong.
    """
    frame = Frame.of(
        image_size,
        coordinates,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        factor=factor,
        off_screen=off_screen,
        picture=picture,
    )
    return parse_in(frame, text)


def parse_in(frame: Frame, text: str) -> ParsedResponse:
    """`parse_ui_tars`, where the frame is known."""
    return _Scanner(text, frame).parse()


# -- patterns ----------------------------------------------------------------------------------------------------------


# Every repeat below is possessive or followed by what it can't take itself, so that none is tried twice from one place.
_NAMES = "|".join(FUNCTIONS)
_ACTION_LABEL = re.compile(r"^[ \t>*#`]*+(?i:action)[ \t]?[*`]*+[ \t]?[:：][*`]*+", re.MULTILINE)
_ACTION_LABEL_INSIDE = re.compile(rf"\bAction[:：]\s*+(?=(?:{_NAMES})\()")
_THOUGHT_LABEL = re.compile(
    r"^[ \t>*#`]*+(?i:thought|reflection|action_summary)[*`]*+[ \t]?[:：][*`]*+[ \t]*+", re.MULTILINE
)
_ANY_LABEL = re.compile(rf"{_ACTION_LABEL.pattern}|{_THOUGHT_LABEL.pattern}", re.MULTILINE)
_SUMMARY_LABEL_INSIDE = re.compile(r"\bAction_Summary[:：][ \t]*+")
_CALL_AT_LINE = re.compile(rf"^[ \t>*`]*+((?:{_NAMES})\()", re.MULTILINE)
_CALL_ANYWHERE = re.compile(rf"\b(?:{_NAMES})\(")
_CALL = re.compile(r"([A-Za-z_]\w{0,63}+) ?\(")
_PARAMETER = re.compile(r"([A-Za-z_]\w{0,63}+)\s*+=(?!=)\s*+")
_PARAMETER_CUT_OFF = re.compile(r"[A-Za-z_]\w{0,63}+\s*+\Z")
_SKIPPED = r"[\s;]++|`{3,}+(?:\w{1,20}+(?=\s))?|`|<\|\w{1,40}\|>|</s>|\[EOS\]"
_GAP = re.compile(rf"(?:{_SKIPPED})*+")
_COMMENT = re.compile(r"#[^\n]*+")
_SPACE = re.compile(r"\s*+")
_LINE_END = re.compile(r"[ \t]*+\r?\n")
_PROSE_AFTER = re.compile(r"[\s.,;:!?#`<\u2013\u2014-]")
_BARE_WORD = re.compile(r"[^\s'\"(),=][^'\"(),=]{0,100}+(?=[,)])")

_CLOSING = {quote: re.compile(rf"{quote}\s*+\)") for quote in "'\""}
_UNQUOTED = {quote: re.compile(rf"(?:[^{quote}\\]++|\\.)*+", re.DOTALL) for quote in "'\""}
_END_OF_WORD = {quote: re.compile(rf"{quote}(?=\s*+[,)])") for quote in "'\""}
_ESCAPED_SIGN = re.compile(r"\\([\\'\"])")
_TRIPLE = {quote: re.compile(rf"{quote}{{3}}(?=\s*+\))") for quote in "'\""}
_ENDS_HERE = re.compile(
    rf"(?:{_SKIPPED}|\#[^\n'\"]*+(?=\n|\Z))*+"
    rf"(?:\Z|[ \t>*#`]*+(?i:action|thought|reflection|action_summary)[*`]*+[ \t]?[:：]|(?:{_NAMES})\()"
)
"""After the `)` of an action: nothing but the end, or what begins the next one."""

_NUMBER = re.compile(r"([+-]?)([0-9]{0,512}+)(?:\.([0-9]{0,512}+))?")
_BOX_WRAPS = {"<|box_start|>": "<|box_end|>", "<point>": "</point>", "<bbox>": "</bbox>"}
_BOX_SPECIAL = re.compile("|".join(re.escape(tag) for pair in _BOX_WRAPS.items() for tag in pair))
_PAIRS = {"(": ")", "[": "]"}

_PATH = (
    r"(?<![A-Za-z0-9])[C-Hc-h]:\\(?![\\'\"])"
    r"(?:[^\s'\"\\]|\\(?!['\"])|(?<=Program)[ ](?=Files)|(?<=Files)[ ](?=\(x86\)))*+"
)
_ESCAPE = re.compile(rf"{_PATH}|\\['\"\\nt]")
_ESCAPED = {"\\'": "'", '\\"': '"', "\\\\": "\\", "\\n": "\n", "\\t": "\t"}


# -- the reader --------------------------------------------------------------------------------------------------------


class _Scanner:
    """One answer while it is scanned."""

    def __init__(self, text: str, frame: Frame) -> None:
        self.text = text
        self.frame = frame
        self._ends: dict[str, _Ends] = {}
        self._no_triple: set[str] = set()

    def parse(self) -> ParsedResponse:
        thought_end, at = self._start()
        actions = self._actions(at)
        return ParsedResponse(_thought(self.text[:thought_end]), tuple(actions))

    def fail(self, message: str, start: int, end: int | None = None) -> NoReturn:
        """Raises the error. Without an end: to the end of the line."""
        if end is None:
            line = self.text.find("\n", start)
            end = len(self.text) if line < 0 else line
        raise ActionParseError(message, text=self.text, span=(start, max(start, end)))

    # -- where the actions begin

    def _start(self) -> tuple[int, int]:
        """The end of the thought, and the place of the first action."""
        text = self.text
        begin = 0
        if text.lstrip().startswith("<think>"):
            begin = text.find("</think>")
            if begin < 0:
                self.fail("the answer was cut off while the model was thinking: allow it more tokens", 0, len(text))
            begin += len("</think>")
        label = _ACTION_LABEL.search(text, begin)
        inside = _ACTION_LABEL_INSIDE.search(text, begin)  # … Action: click(… in the middle of a line
        bare = _CALL_AT_LINE.search(text, begin)  # click(… without the label
        starts = []
        if inside is not None:
            starts.append((inside.start(), inside.end()))
        if bare is not None:
            starts.append((bare.start(), bare.start(1)))
        if label is None:
            if not starts:
                self._no_action(begin)
            return min(starts)
        for start in sorted(starts):
            # A label in a text that is to be typed is none.
            if start[0] < label.start() and self._covers(start[1], label.start()):
                return start
        if inside is not None and inside.start() < label.start() and self._leads_to(inside.end(), label.start()):
            return inside.start(), inside.end()
        if bare is not None and bare.start() < label.start():
            begun = _THOUGHT_LABEL.search(text, begin)
            if begun is None or begun.start() > bare.start():
                if self._leads_to(bare.start(1), label.start()):
                    return bare.start(), bare.start(1)
                self.fail(
                    "an action stands before the label 'Action:', and it can't be told whether it is meant",
                    bare.start(1),
                )
        return label.start(), self._after_gap(label.end())

    def _covers(self, at: int, label: int) -> bool:
        """Whether the label stands within the action that begins here."""
        try:
            return self._action(at)[1] > label
        except ActionParseError:
            return False

    def _leads_to(self, at: int, label: int) -> bool:
        """Whether there are only actions from here to the label: then they are meant, too."""
        try:
            while at < label:
                at = self._after_gap(self._action(at)[1])
        except ActionParseError:
            return False
        return True

    def _no_action(self, begin: int) -> NoReturn:
        if not self.text.strip():
            self.fail("the answer is empty", 0, len(self.text))
        self.fail(
            "the answer has no action; it needs a line such as Action: click(start_box='(x,y)')", begin, len(self.text)
        )

    # -- one after the other

    def _actions(self, at: int) -> list[Action]:
        text = self.text
        actions: list[Action] = []
        while True:
            action, at = self._action(at)
            actions.append(action)
            at = self._after_gap(at)
            while text.startswith("#", at) and _label_at(_ANY_LABEL, text, at) is None:
                comment = _COMMENT.match(text, at)
                assert comment is not None
                if (call := _CALL_ANYWHERE.search(text, at, comment.end())) is not None:
                    self.fail("an action stands in a comment, and it can't be told whether it is meant", call.start())
                at = self._after_gap(comment.end())
            if at == len(text):
                return actions
            label = _label_at(_ACTION_LABEL, text, at)
            if label is not None:
                at = self._after_gap(label)
            elif _label_at(_THOUGHT_LABEL, text, at) is not None:
                self.fail(
                    "a second thought follows the action; answer with one turn, since the screen may have changed", at
                )
            elif _CALL.match(text, at) is None:
                self._only_prose(at)
                return actions

    def _only_prose(self, at: int) -> None:
        found = [
            match.start()
            for pattern in (_CALL_ANYWHERE, _ACTION_LABEL, _ACTION_LABEL_INSIDE, _THOUGHT_LABEL)
            if (match := pattern.search(self.text, at)) is not None
        ]
        if found:
            self.fail("text stands between two actions, so it can't be told whether both are meant", at, min(found))

    def _after_gap(self, at: int) -> int:
        gap = _GAP.match(self.text, at)
        assert gap is not None
        return gap.end()

    def _after_space(self, at: int) -> int:
        space = _SPACE.match(self.text, at)
        assert space is not None
        return space.end()

    # -- one action

    def _action(self, start: int) -> tuple[Action, int]:
        """The action that begins here, and where it ends."""
        call = _CALL.match(self.text, start)
        if call is None:
            if start >= len(self.text):
                self.fail("the answer was cut off before its action", start)
            self.fail("expected an action, such as click(start_box='(x,y)')", start)
        name = call[1]
        function = FUNCTIONS.get(name)
        if function is None:
            self.fail(f"there is no action {name!r}; the actions are {', '.join(FUNCTIONS)}", start, call.end(1))
        values, end = self._arguments(name, function, start, call.end())
        for parameter in function.required:
            if parameter not in values:
                self.fail(f"{name} needs {parameter}", start, end)
        return BUILD[name](self, name, values), end

    def _arguments(self, name: str, function: Function, start: int, at: int) -> tuple[dict[str, Value], int]:
        text = self.text
        values: dict[str, Value] = {}
        at = self._after_space(at)
        while not text.startswith(")", at):
            named = _PARAMETER.match(text, at)
            if named is not None:
                parameter = named[1]
                # `hotkey(hotkey='…')`, and `click(point='…')`
                parameter = SAME_PARAMETER.get(parameter, parameter)
                if parameter not in function.parameters:
                    takes = f"takes {', '.join(function.parameters)}" if function.parameters else "takes nothing"
                    self.fail(f"{name} has no {named[1]!r}; it {takes}", named.start(1), named.end(1))
            elif at >= len(text) or _PARAMETER_CUT_OFF.match(text, at) is not None:
                self._cut_off(start)
            elif not values and function.parameters:
                parameter = next(iter(function.parameters))
            else:
                self.fail(f"expected ')' or the name of an argument of {name}", at)
            if parameter in values:
                self.fail(f"{name} has {parameter} twice", at)
            begin = at if named is None else named.end()
            if begin >= len(text):
                self._cut_off(start)
            values[parameter], at = self._value(function.parameters[parameter], name, parameter, start, begin)
            at = self._after_space(at)
            if text.startswith(",", at):
                at = self._after_space(at + 1)
            elif at >= len(text):
                self._cut_off(start)
            elif not text.startswith(")", at):
                self.fail(f"expected ')' or ',' after {parameter} of {name}", at)
        return values, at + 1

    def _cut_off(self, start: int) -> NoReturn:
        self.fail("the answer was cut off within its action", start, len(self.text))

    def _value(self, kind: str, name: str, parameter: str, start: int, at: int) -> tuple[Value, int]:
        text = self.text
        quote = text[at]
        if quote not in "'\"":
            if kind == "box":
                point, end = self._box(at, None)
                return Value(at, end, point=point), end
            bare = _BARE_WORD.match(text, at) if kind == "word" else None
            if bare is None:
                self.fail(f"{parameter} of {name} must be in quotes", at)
            return Value(at, bare.end(), word=bare[0]), bare.end()
        if kind == "text":
            begin, close, end = self._text_span(quote, name, start, at)
            return Value(begin, close, word=text[begin:close]), end
        if kind == "box":
            close = text.find(quote, at + 1)
            if close < 0:
                self._cut_off(start)
            point, _ = self._box(at + 1, close)
            return Value(at + 1, close, point=point), close + 1
        # A key may be a quote or a backslash itself.
        last = _END_OF_WORD[quote].search(text, at + 1)
        if last is None:
            self._cut_off(start)
        word = _ESCAPED_SIGN.sub(r"\1", text[at + 1 : last.start()])
        return Value(at + 1, last.start(), word=word), last.end()

    # -- texts

    def _text_span(self, quote: str, name: str, start: int, at: int) -> tuple[int, int, int]:
        """Of a content that begins with this quote: the span of what is in it, and the place after the last quote."""
        text = self.text
        if text.startswith(quote * 3, at) and quote not in self._no_triple:
            triple = _TRIPLE[quote].search(text, at + 3)
            if triple is not None:
                return at + 3, triple.start(), triple.end()
            self._no_triple.add(quote)
        run = _UNQUOTED[quote].match(text, at + 1)
        assert run is not None
        first = run.end()  # the first quote that is not escaped
        if first >= len(text):
            self._cut_off(start)
        ends = self._ends.get(quote)
        if ends is None:
            ends = self._ends[quote] = _Ends.of(text, quote)
        close = ends.close(first)
        if close is None:
            if ends.any_after(at):
                self.fail(
                    f"it can't be told where the content of {name} ends: escape the quotes in it, and write nothing "
                    "after it",
                    start,
                    len(text),
                )
            self._cut_off(start)
        return at + 1, close, close + 1

    def text_of(self, value: Value) -> str:
        """The content, with its escapes carried out."""
        return self._encodable(_ESCAPE.sub(_unescape, value.word), value)

    def typed(self, value: Value) -> Type:
        raw = value.word
        enter = True
        if raw.endswith("\\n") and (len(raw) - len(raw[:-1].rstrip("\\"))) % 2 == 0:
            raw = raw[:-2]
        elif raw.endswith("\n"):
            raw = raw[:-2] if raw.endswith("\r\n") else raw[:-1]
        else:
            enter = False
        return Type(self._encodable(_ESCAPE.sub(_unescape, raw), value), enter)

    def _encodable(self, text: str, value: Value) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail("content has half of a surrogate pair, which is no character", value.start, value.end)
        return text

    # -- points

    def _box(self, at: int, limit: int | None) -> tuple[tuple[float, float], int]:
        """The point, or the centre of the box, that is written here, and where it ends. `limit`: it must end there."""
        text = self.text
        begin = at
        size = len(text) if limit is None else limit
        open_: list[str] = []
        numbers: list[Fraction] = []
        separated = True  # since the last number
        comma = False  # since then, too
        while at < size:
            sign = text[at]
            if sign.isspace() or sign == ",":
                if sign == ",":
                    if not open_ and limit is None:
                        break  # of the arguments
                    if comma or not numbers:
                        self._no_box(begin, limit)
                    comma = True
                separated = True
                at += 1
                continue
            if open_ and text.startswith(open_[-1], at):
                at += len(open_.pop())
                separated = True
                continue
            if sign in _PAIRS:
                open_.append(_PAIRS[sign])
                separated = True
                at += 1
            elif sign == "<" and (tag := _BOX_SPECIAL.match(text, at, size)) and tag[0] in _BOX_WRAPS:
                open_.append(_BOX_WRAPS[tag[0]])
                at = tag.end()
            else:
                if sign == ")" and not open_ and limit is None:
                    break  # of the call
                if not separated:
                    self._no_box(begin, size if limit is not None else None)
                number, at = self._number(at, size, begin, limit)
                numbers.append(number)
                separated = comma = False
            if len(numbers) > 4 or len(open_) > 4:
                self._no_box(begin, limit)
        if open_ and limit is None:
            self._cut_off(begin)
        if open_ or len(numbers) not in (2, 4):
            self._no_box(begin, limit if limit is not None else at)
        if len(numbers) == 4:
            numbers = [(numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2]
        try:
            return self.frame.point(*numbers), at
        except OffScreenError as error:
            self.fail(f"the point is off the screen: {error}", begin, at)

    def _number(self, at: int, size: int, begin: int, limit: int | None) -> tuple[Fraction, int]:
        match = _NUMBER.match(self.text, at, size)
        assert match is not None  # it may be empty
        sign, whole, part = match[1], match[2], match[3] or ""
        after = self.text[match.end() : match.end() + 1] if match.end() < size else ""
        if not whole and not part:
            self._no_box(begin, limit)
        if after.isalnum() or (after and after in "._%"):
            self._no_box(begin, limit)
        value = Fraction(int(whole + part or "0"), 10 ** len(part))
        return -value if sign == "-" else value, match.end()

    def _no_box(self, begin: int, end: int | None) -> NoReturn:
        self.fail("a point must be two finite numbers, '(x,y)', or a box of four, '(x1,y1,x2,y2)'", begin, end)


class _Ends(NamedTuple):
    """All places of an answer at which a quote of one kind may end a content, sorted.

    They are found once, for all the contents of an answer: looking for them anew for each is quadratic.
    """

    sure: list[int]
    """After the `)` comes the end, or the next action."""
    at_line: list[int]
    """After the `)` the line ends, and text follows."""
    in_line: list[int]
    """After the `)` text follows in the line."""

    @classmethod
    def of(cls, text: str, quote: str) -> _Ends:
        ends = cls([], [], [])
        for match in _CLOSING[quote].finditer(text):
            at = match.start()
            run = at
            while run and text[run - 1] == "\\":
                run -= 1
            if (at - run) % 2:
                continue  # it is escaped
            after = match.end()
            if _ENDS_HERE.match(text, after) is not None:
                ends.sure.append(at)
            elif _LINE_END.match(text, after) is not None:
                ends.at_line.append(at)
            elif _PROSE_AFTER.match(text, after) is not None:
                ends.in_line.append(at)
        return ends

    def close(self, first: int) -> int | None:
        """The quote that ends the content whose first unescaped quote this is; None: no such, or it can't be told."""
        sure, at_line, in_line = (_next(places, first) for places in self)
        if first in (sure, at_line, in_line):
            # It is quoted as it should be. But text after it may also be the rest of a content that is not.
            return first if first == sure or sure is None else None
        # Quotes within are not escaped: what follows in the line is likely the rest of the content.
        if sure is not None:
            return sure if at_line is None or sure < at_line else None
        if at_line is not None:
            return at_line if _next(self.at_line, at_line + 1) is None else None
        return in_line if in_line is not None and _next(self.in_line, in_line + 1) is None else None

    def any_after(self, at: int) -> bool:
        return any(_next(places, at) is not None for places in self)


def _next(places: list[int], at: int) -> int | None:
    """The first of the places that is not before `at`."""
    index = bisect_right(places, at - 1)
    return places[index] if index < len(places) else None


def _label_at(label: re.Pattern[str], text: str, at: int) -> int | None:
    """The end of the label that stands here, whether a line begins here or not."""
    match = label.match(text[at : at + 200])
    return None if match is None else at + match.end()


def _thought(text: str) -> str:
    text = re.sub(r"</?think>", "", text, count=2) if text.lstrip().startswith("<think>") else text
    inside = _THOUGHT_LABEL.match(text.lstrip(" \t\r\n`"))
    if inside is not None:
        text = "\n".join(part.rstrip() for part in _SUMMARY_LABEL_INSIDE.split(text))
    text = _THOUGHT_LABEL.sub("", text).strip()
    if text.startswith("```") and text.count("```") % 2:  # a fence around the whole answer
        text = text.partition("\n")[2] if "\n" in text else text.lstrip("`")
    return text.removesuffix("```").strip() if text.count("```") % 2 else text


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[0], match[0])
