"""MiniWoB++: small web pages with a task each, in a headless Chromium that belongs to one environment.

    env = MiniWoBEnvironment("click-test-2", scale=3)
    seen = await env.reset(Task("t", seed=0))            # seen.instruction: 'Click button ONE.'
    result = await env.step(Click(120, 480))             # pixels of the screenshot

Needs Debian's packages `chromium` and `chromium-driver` (or others of the kind) and PyPI's `miniwob` (1.1.0, MIT),
whose wheel has the pages; nothing goes over a network. `missing()` says what is not there, and how to get it.

What holds:

- **Screenshot.** PNG of the page's 160 x 210 pixels, the instruction above the task. `scale=3`: 480 x 630, drawn so by
  the browser, not blown up. Points of actions are in these pixels.
- **Text**, if asked for: a line for each visible element, with its centre in pixels of the screenshot.
- **Time.** A page ends its episode after 10 s (some 20 or more) with reward -1. That includes the model's thinking, so
  the limit is `page_time_limit_s` instead; None: the page's own.
- **Reward.** `"raw"`: what the page gives, between -1 and 1, mostly one of these. `"decayed"`: the same, but what is
  positive shrinks with the time taken, down to 0 at the limit; that of published results, with
  `page_time_limit_s=None`. It is 0.0 before the end, `evaluate` included: the page alone says what is success.
- **End.** The page is covered then; the observation is that before the last action. Actions after the end do nothing.
- **Seeds.** `Task.seed` draws the page's problem; the same seed gives the same one.
- What a page does not know (a key without a name, a point outside of it) does nothing: `info["ignored"]` says why.
- **Reuse.** One browser for any number of episodes, also of different pages (`Task.data["task_name"]`). Chromium's
  profile and temporary files are in a folder of the environment's own, gone with it, also if it is killed.

Measured with Chromium 156 on two busy cores, at scale 1 without text, memory as proportional set size of each:

    environments   start   reset    click    episodes/s   memory    close
    1              1.5 s    73 ms    51 ms    8.1         459 MiB   0.4 s
    4              4.1 s   133 ms    94 ms   15.0         277 MiB   0.7 s
    8              8.2 s   300 ms   156 ms   14.5         243 MiB   1.3 s
"""

from __future__ import annotations

import base64
import difflib
import importlib.util
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from managed_vllm.agent.actions import (
    Action,
    Button,
    CallUser,
    Click,
    Direction,
    Drag,
    Finished,
    Hotkey,
    KeyDown,
    KeyUp,
    Move,
    Noop,
    Scroll,
    Type,
    Wait,
)
from managed_vllm.agent.actions.keys import key_of
from managed_vllm.agent.environments.process_environment import ProcessEnvironment
from managed_vllm.agent.types import Limits, Observation, StepResult, Task
from managed_vllm.errors import EnvironmentFailedError

Reward = Literal["raw", "decayed"]

INSTALL_CHROMIUM = "apt-get install chromium chromium-driver"
INSTALL_MINIWOB = "pip install 'managed-vllm[miniwob]'  (or: pip install miniwob)"

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
)
_SHARED_MEMORY_BYTES = 256 << 20
"""Chromium is told not to use /dev/shm where less than that is free in it: containers often have 64 MiB."""

_MAX_SCALE = 8
_SCROLL_STEP = 50
"""Pixels of the page, as miniwob's own. `Scroll.amount` counts them; None: two."""

_WAIT_S = 0.5
"""Of `Wait()`."""

_DRAG_MOVES = 4
"""Moves on the way of a drag: jQuery UI begins to drag with the first that is far enough."""

_BUTTONS = {Button.LEFT: 0, Button.MIDDLE: 1, Button.RIGHT: 2}

_KEYS = {
    "enter": "\ue007",
    "return": "\ue006",
    "tab": "\ue004",
    "backspace": "\ue003",
    "delete": "\ue017",
    "del": "\ue017",
    "esc": "\ue00c",
    "escape": "\ue00c",
    "insert": "\ue016",
    "home": "\ue011",
    "end": "\ue010",
    "pageup": "\ue00e",
    "pgup": "\ue00e",
    "pagedown": "\ue00f",
    "pgdn": "\ue00f",
    "left": "\ue012",
    "up": "\ue013",
    "right": "\ue014",
    "down": "\ue015",
    "pause": "\ue00b",
    "help": "\ue002",
    "clear": "\ue005",
    "shift": "\ue008",
    "shiftleft": "\ue008",
    "shiftright": "\ue050",
    "ctrl": "\ue009",
    "ctrlleft": "\ue009",
    "ctrlright": "\ue051",
    "alt": "\ue00a",
    "altleft": "\ue00a",
    "altright": "\ue052",
    "win": "\ue03d",
    "winleft": "\ue03d",
    "winright": "\ue053",
    **{f"f{n}": chr(0xE030 + n) for n in range(1, 13)},
    **{f"num{n}": chr(0xE01A + n) for n in range(10)},
}
"""pyautogui's names of keys to WebDriver's (https://www.w3.org/TR/webdriver/#keyboard-actions)."""

_TYPED = {"\n": _KEYS["enter"], "\t": _KEYS["tab"], "\r": ""}


def missing(chromium: str | None = None, chromedriver: str | None = None) -> str | None:
    """What is not installed that these environments need, with the command that installs it; None: nothing."""
    lacks = []
    if importlib.util.find_spec("miniwob") is None or importlib.util.find_spec("selenium") is None:
        lacks.append(f"the Python package miniwob: {INSTALL_MINIWOB}")
    if _browser(chromium) is None:
        lacks.append(f"Chromium{_where(chromium)}: {INSTALL_CHROMIUM}")
    if _driver(chromedriver) is None:
        lacks.append(f"chromedriver{_where(chromedriver)}: {INSTALL_CHROMIUM}")
    return "MiniWoB++ lacks " + "; ".join(lacks) if lacks else None


def task_names() -> list[str]:
    """The pages that there are, by name: `click-test-2`, … Raises `EnvironmentFailedError` without miniwob."""
    found = importlib.util.find_spec("miniwob")
    if found is None or not found.submodule_search_locations:
        raise EnvironmentFailedError(f"MiniWoB++ lacks the Python package miniwob: {INSTALL_MINIWOB}")
    html = Path(found.submodule_search_locations[0]) / "html"
    pages = [path.stem for path in (html / "miniwob").glob("*.html")]
    flights = [f"flight.{path.parent.name}" for path in (html / "flight").glob("*/wrapper.html")]
    return sorted(pages) + sorted(flights)


class MiniWoBEnvironment(ProcessEnvironment):
    """An `Environment` of MiniWoB++'s pages: see the module, and `ProcessEnvironment`."""

    def __init__(
        self,
        task_name: str | None = None,
        *,
        scale: int = 1,
        reward: Reward = "raw",
        text: bool = False,
        page_time_limit_s: float | None = 600.0,
        pause_s: float = 0.0,
        data_mode: str = "train",
        chromium: str | os.PathLike[str] | None = None,
        chromedriver: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """The browser starts with the first `reset`.

        Args:
            task_name: the page: one of `task_names()`. None: each task says so, in `Task.data["task_name"]`.
            scale: pixels of the screenshot for one of the page, 1 to 8.
            reward: `"raw"` or `"decayed"`: see the module.
            text: `Observation.text` lists the elements of the page.
            page_time_limit_s: seconds until the page ends the episode; None: its own, 10 mostly.
            pause_s: seconds between an action and the look at the page, for those with animations.
            data_mode: `"train"` or `"test"`; a few pages draw their problems from different sets.
            chromium: the browser's program; else `MINIWOB_CHROME_BINARY`, or what is in the `PATH`.
            chromedriver: its driver's; else `MINIWOB_CHROMEDRIVER`, or what is in the `PATH`.
            limits: seconds for each call.

        Raises `EnvironmentFailedError` if a program or package is missing, `ValueError` for a name that no page has.
        """
        browser = None if chromium is None else os.fspath(chromium)
        driver = None if chromedriver is None else os.fspath(chromedriver)
        lacks = missing(browser, driver)
        if lacks is not None:
            raise EnvironmentFailedError(lacks)
        if type(scale) is not int or not 1 <= scale <= _MAX_SCALE:
            raise ValueError(f"scale must be an integer from 1 to {_MAX_SCALE}, not {scale!r}")
        if reward not in ("raw", "decayed"):
            raise ValueError(f"reward must be 'raw' or 'decayed', not {reward!r}")
        if page_time_limit_s is not None and not 0 < page_time_limit_s <= 2_000_000:
            raise ValueError(f"page_time_limit_s must be more than 0 and at most 2,000,000, not {page_time_limit_s}")
        if not pause_s >= 0:
            raise ValueError(f"pause_s must be 0 or more, not {pause_s}")
        if task_name is not None:
            _check_name(task_name)
        super().__init__(
            SyncMiniWoB,
            arguments={
                "task_name": task_name,
                "scale": scale,
                "reward": reward,
                "text": text,
                "page_time_limit_s": page_time_limit_s,
                "pause_s": pause_s,
                "data_mode": data_mode,
                "chromium": _browser(browser),
                "chromedriver": _driver(driver),
            },
            limits=limits,
            name=f"MiniWoB++ {task_name or ''}".rstrip(),
        )


class SyncMiniWoB:
    """The synchronous half, where chromedriver is spoken to."""

    def __init__(
        self,
        task_name: str | None,
        scale: int,
        reward: Reward,
        text: bool,
        page_time_limit_s: float | None,
        pause_s: float,
        data_mode: str,
        chromium: str,
        chromedriver: str,
    ) -> None:
        """Arguments as those of `MiniWoBEnvironment`. Alone in its process: it sets environment variables."""
        self._task_name = task_name
        self._scale = scale
        self._reward_key = {"raw": "raw_reward", "decayed": "env_reward"}[reward]
        self._text = text
        self._limit_s = page_time_limit_s
        self._pause_s = pause_s
        self._data_mode = data_mode
        self._env: Any = None
        self._open: str | None = None
        self._last = Observation()
        self._pointer: tuple[float, float] | None = None
        folder = Path(os.environ["TMPDIR"])
        home = folder / "home"
        home.mkdir()
        # Chromium writes to the home directory: crash reports, its cache, settings.
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
            os.environ[name] = str(home)
        os.environ["MINIWOB_CHROME_BINARY"] = str(_launcher(folder, chromium))
        os.environ["MINIWOB_CHROMEDRIVER"] = chromedriver
        os.environ["SE_OFFLINE"] = "true"  # selenium looks for no driver
        # Both programs are named, so nothing has to be found through a proxy, which would get the calls of the driver.
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"

    # -- SyncEnvironment -----------------------------------------------------------------------------------------------

    def reset(self, task: Task) -> Observation:
        name = task.data.get("task_name") or self._task_name
        if not isinstance(name, str):
            raise ValueError(
                f"which page is task {task.id}? Set Task.data['task_name'], or the environment's task_name"
            )
        self._to_page(name)
        if self._limit_s is not None:
            self._script("core.EPISODE_MAX_TIME = arguments[0];", round(self._limit_s * 1000))
        self._pointer = None
        _, info = self._env.reset(seed=task.seed)
        self._last = self._seen(info)
        return self._last

    def step(self, action: Action) -> StepResult:
        if self._metadata()["done"]:
            # A click now would go to the cover, and begin another episode.
            return self._result({"ignored": "the episode was over before the action"})
        ignored = self._act(action)
        if self._pause_s:
            time.sleep(self._pause_s)
        return self._result({} if ignored is None else {"ignored": ignored})

    def evaluate(self) -> float | None:
        return self._reward(self._metadata())

    def close(self) -> None:
        # The browser has nothing to save: what a polite end takes a second for, the keeper does in some milliseconds.
        if self._env is not None:
            self._env.instance.driver.service.process.kill()

    # -- the page ------------------------------------------------------------------------------------------------------

    def _to_page(self, name: str) -> None:
        if name == self._open:
            return
        _check_name(name)
        if self._env is not None and not (name.startswith("flight.") or str(self._open).startswith("flight.")):
            self._open = None
            self._load(self._env.instance, name)
        else:
            if self._env is not None:
                self._env.close()
                self._env = None
            self._env = self._started(name)
        self._open = name

    def _started(self, name: str) -> Any:
        browsing = import_module("miniwob.environment").MiniWoBEnvironment
        failed = import_module("selenium.common.exceptions").WebDriverException
        for attempt in range(2):
            try:
                env = browsing(subdomain=name, data_mode=self._data_mode, field_extractor=_no_fields)
                break
            except failed:  # its port was taken by another one in the meantime
                if attempt:
                    raise
        env.set_record_screenshots(False)  # they are of the whole window, shrunk to the page's resolution
        env.instance.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": env.instance.window_width,
                "height": env.instance.window_height,
                "deviceScaleFactor": self._scale,
                "mobile": False,
            },
        )
        return env

    def _load(self, instance: Any, name: str) -> None:
        """Another page in the same browser."""
        clickable = import_module("selenium.webdriver.support.expected_conditions").element_to_be_clickable
        waiting = import_module("selenium.webdriver.support.wait").WebDriverWait
        instance.url = instance.url.rpartition("/")[0] + f"/{name}.html"
        instance.driver.get(instance.url)
        waiting(instance.driver, 5).until(clickable(("id", instance.SYNC_SCREEN_ID)))

    def _script(self, source: str, *arguments: Any) -> Any:
        return self._env.instance.driver.execute_script(source, *arguments)

    def _metadata(self) -> dict[str, Any]:
        if self._env is None:
            raise RuntimeError("reset comes first")
        metadata: dict[str, Any] = self._env.instance.get_metadata()
        return metadata

    def _reward(self, metadata: Mapping[str, Any]) -> float:
        return float(metadata[self._reward_key]) if metadata["done"] else 0.0

    def _result(self, info: dict[str, Any]) -> StepResult:
        _, _, done, _, metadata = self._env.step(None)
        if not done:
            self._last = self._seen(metadata)
        info |= {"raw_reward": metadata["raw_reward"], "elapsed_s": metadata["elapsed"]}
        if metadata["reason"]:
            info["reason"] = str(metadata["reason"])
        return StepResult(self._last, self._reward(metadata), terminated=bool(done), info=info)

    def _seen(self, info: Mapping[str, Any]) -> Observation:
        instance = self._env.instance
        clip = {"x": 0, "y": 0, "width": instance.task_width, "height": instance.task_height, "scale": 1}
        taken = instance.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
        said = self._script("return core.getUtterance();")  # miniwob's own copy ends after 256 characters
        return Observation(
            base64.b64decode(taken["data"]),
            self._elements(info["root_dom"]) if self._text else None,
            said["utterance"] if isinstance(said, dict) else said,
        )

    def _elements(self, root: Any) -> str:
        width, height = self._env.instance.task_width, self._env.instance.task_height
        lines = []
        for element in root.subtree_elements:
            if not (element.is_leaf or element.tag.startswith(("input", "button", "select", "textarea"))):
                continue
            x, y = element.left + element.width / 2, element.top + element.height / 2
            if not (0 <= x < width and 0 <= y < height):
                continue
            words = [element.tag]
            if element.text:
                words.append(repr(element.text))
            if element.value not in (None, ""):
                words.append(f"value={element.value!r}")
            if element.id:
                words.append(f"id={element.id}")
            if element.focused:
                words.append("focused")
            lines.append(f"{' '.join(words)} ({x * self._scale:.0f}, {y * self._scale:.0f})")
        return "\n".join(lines)

    # -- actions -------------------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> str | None:
        """Carries it out; returns why not where a page knows no such thing."""
        match action:
            case Click(x=x, y=y, button=button, clicks=clicks):
                return self._outside((x, y)) or self._click(x, y, _BUTTONS[button], clicks)
            case Drag(x=x, y=y, to_x=to_x, to_y=to_y):
                return self._outside((x, y), (to_x, to_y)) or self._drag(x, y, to_x, to_y)
            case Type(text=text, enter=enter):
                return self._keys([_TYPED.get(sign, sign) for sign in text] + [_KEYS["enter"]] * enter)
            case Hotkey(keys=names):
                return self._hotkey(names)
            case Move(x=x, y=y):
                return self._outside((x, y)) or self._move(x, y)
            case KeyDown(key=name) | KeyUp(key=name):
                return self._hold(name, down=isinstance(action, KeyDown))
            case Scroll():
                return self._scroll(action)
            case Wait(seconds=seconds):
                time.sleep(_WAIT_S if seconds is None else seconds)
                return None
            case Finished() | CallUser() | Noop():
                return None
        return f"{type(action).__name__} {getattr(action, 'name', '')} is no action of a page".replace("  ", " ")

    def _builder(self) -> Any:
        return import_module("selenium.webdriver.common.actions.action_builder").ActionBuilder(
            self._env.instance.driver, duration=0
        )

    def _outside(self, *points: tuple[float, float]) -> str | None:
        width, height = (side * self._scale for side in (self._env.instance.task_width, self._env.instance.task_height))
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                return f"({x:g}, {y:g}) is outside of the page's {width} x {height} pixels"
        return None

    def _click(self, x: float, y: float, button: int, clicks: int) -> str | None:
        builder = self._builder()
        pointer = builder.pointer_action
        pointer.move_to_location(x / self._scale, y / self._scale)
        for _ in range(clicks):
            pointer.pointer_down(button=button)
            pointer.pointer_up(button=button)
        builder.perform()
        self._pointer = (x, y)
        return None

    def _drag(self, x: float, y: float, to_x: float, to_y: float) -> str | None:
        builder = self._builder()
        pointer = builder.pointer_action
        pointer.move_to_location(x / self._scale, y / self._scale)
        pointer.pointer_down(button=0)
        for move in range(1, _DRAG_MOVES + 1):
            part = move / _DRAG_MOVES
            pointer.move_to_location((x + (to_x - x) * part) / self._scale, (y + (to_y - y) * part) / self._scale)
        pointer.pointer_up(button=0)
        builder.perform()
        self._pointer = (to_x, to_y)
        return None

    def _keys(self, keys: list[str]) -> str | None:
        builder = self._builder()
        for key in keys:
            if key:
                builder.key_action.key_down(key)
                builder.key_action.key_up(key)
        builder.perform()
        return None

    def _move(self, x: float, y: float) -> str | None:
        builder = self._builder()
        builder.pointer_action.move_to_location(x / self._scale, y / self._scale)
        builder.perform()
        self._pointer = (x, y)
        return None

    def _hold(self, name: str, *, down: bool) -> str | None:
        code = _code_of(name)
        if code is None:
            return f"{name[:40]!r} is no key of a page"
        builder = self._builder()
        (builder.key_action.key_down if down else builder.key_action.key_up)(code)
        builder.perform()
        return None

    def _hotkey(self, names: tuple[str, ...]) -> str | None:
        keys = []
        for name in names:
            code = _code_of(name)
            if code is None:
                return f"{name[:40]!r} is no key of a page"
            keys.append(code)
        builder = self._builder()
        for code in keys:
            builder.key_action.key_down(code)
        for code in reversed(keys):
            builder.key_action.key_up(code)
        builder.perform()
        return None

    def _scroll(self, action: Scroll) -> str | None:
        size = self._env.instance.task_width * self._scale, self._env.instance.task_height * self._scale
        x, y = self._pointer or (size[0] / 2, size[1] / 2)
        x, y = x if action.x is None else action.x, y if action.y is None else action.y
        outside = self._outside((x, y))
        if outside is not None:
            return outside
        far = _SCROLL_STEP * (2 if action.amount is None else action.amount)
        across, down = {
            Direction.UP: (0, -far),
            Direction.DOWN: (0, far),
            Direction.LEFT: (-far, 0),
            Direction.RIGHT: (far, 0),
        }[action.direction]
        builder = self._builder()
        builder.wheel_action.scroll(x=int(x / self._scale), y=int(y / self._scale), delta_x=across, delta_y=down)
        builder.perform()
        self._pointer = (x, y)
        return None


def _no_fields(utterance: str) -> list[tuple[str, str]]:
    """In the place of miniwob's extractors of an instruction's parts: nobody asks for these, and some of them raise."""
    return []


def _code_of(name: str) -> str | None:
    """WebDriver's code of a key; None: a page knows no such key."""
    key = key_of(name)
    return None if key is None else (key if len(key) == 1 else _KEYS.get(key))


def _launcher(folder: Path, chromium: str) -> Path:
    """A program that starts the browser with our flags: miniwob and Debian's own script take none from outside."""
    flags = list(_FLAGS)
    try:
        space = os.statvfs("/dev/shm")
        if space.f_bavail * space.f_frsize < _SHARED_MEMORY_BYTES:
            flags.append("--disable-dev-shm-usage")
    except OSError:
        flags.append("--disable-dev-shm-usage")
    path = folder / "chromium"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(chromium)} {" ".join(flags)} "$@"\n')
    path.chmod(0o700)
    return path


def _browser(given: str | None) -> str | None:
    if given is None:
        given = os.environ.get("MINIWOB_CHROME_BINARY") or None
    if given is not None:
        return shutil.which(given)
    return next((found for name in _CHROMIUM if (found := shutil.which(name))), None)


def _driver(given: str | None) -> str | None:
    return shutil.which(given or os.environ.get("MINIWOB_CHROMEDRIVER") or "chromedriver")


def _where(given: str | None) -> str:
    return "" if given is None else f" ({given} is no program)"


def _check_name(name: str) -> None:
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise ValueError(f"MiniWoB++ has no page {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
