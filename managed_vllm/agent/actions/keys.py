"""Names of keys: which a model may say, how a combination of them is written, and what pyautogui calls them.

A key is one printable ASCII character, or a name that pyautogui 0.9.54 knows, or another spelling of such a name:
`arrowleft`, `page_down`, `control`. pyautogui ignores a name that it does not know; so such a name is an error here.
"""

from __future__ import annotations

_NAMED = (
    "accept add alt altleft altright apps backspace browserback browserfavorites browserforward browserhome "
    "browserrefresh browsersearch browserstop capslock clear command convert ctrl ctrlleft ctrlright decimal del "
    "delete divide down end enter esc escape execute final fn hanguel hangul hanja help home insert junja kana "
    "kanji launchapp1 launchapp2 launchmail launchmediaselect left modechange multiply nexttrack nonconvert "
    "numlock option optionleft optionright pagedown pageup pause pgdn pgup playpause prevtrack print printscreen "
    "prntscrn prtsc prtscr return right scrolllock select separator shift shiftleft shiftright sleep stop "
    "subtract tab up volumedown volumemute volumeup win winleft winright yen "
)
_PYAUTOGUI = frozenset(_NAMED.split()) | {f"f{n}" for n in range(1, 25)} | {f"num{n}" for n in range(10)}

_OTHER = {
    "arrowleft": "left",
    "arrowright": "right",
    "arrowup": "up",
    "arrowdown": "down",
    "leftarrow": "left",
    "rightarrow": "right",
    "uparrow": "up",
    "downarrow": "down",
    "space": " ",
    "spacebar": " ",
    "plus": "+",
    "minus": "-",
    "comma": ",",
    "period": ".",
    "slash": "/",
    "backslash": "\\",
    "equal": "=",
    "equals": "=",
    "control": "ctrl",
    "ctl": "ctrl",
    # A PC's keyboard, which OSWorld's machines have: its Windows key is Linux's super. On a Mac: `keys=` of
    # `to_pyautogui`.
    "cmd": "win",
    "command": "win",
    "meta": "win",
    "super": "win",
    "windows": "win",
    "option": "alt",
    "altgr": "altright",
    "ins": "insert",
    "caps": "capslock",
    "bksp": "backspace",
    "pgdown": "pagedown",
    "print": "printscreen",
    "menu": "apps",
}


def key_of(name: str) -> str | None:
    """pyautogui's name of a key, or None if it is none: `arrowleft` → `left`, `space` → a blank, `C` → `c`."""
    if len(name) == 1:
        return name.lower() if name.isascii() and name.isprintable() else None
    plain = name.lower().replace("_", "").replace("-", "")
    if plain in _OTHER:
        return _OTHER[plain]
    return plain if plain in _PYAUTOGUI else None


def keys_of(text: str) -> tuple[str, ...]:
    """The keys of a combination, in lower case: `ctrl c`, `ctrl+c`, `Ctrl + C` and `ctrl-c` are `("ctrl", "c")`.

    Blanks separate, then `+`, then `-`. A sign at the end is the key itself: `ctrl +`, `ctrl++`. Raises `ValueError`:
    no key, or a name that no key has.
    """
    parts = text.lower().split()
    keys: list[str] = []
    for index, part in enumerate(parts):
        if part in ("+", "-"):
            # Alone between others it separates, as in `ctrl + c`.
            if not 0 < index < len(parts) - 1:
                keys.append(part)
        elif key_of(part) is not None:
            keys.append(part)
        else:
            keys += _apart(part)
    if not keys:
        raise ValueError("no key is named")
    return tuple(keys)


def _apart(part: str) -> list[str]:
    for sign in ("+", "-"):
        if sign in part[1:]:
            head, last = (part[:-2], [sign]) if part.endswith(sign * 2) else (part, [])
            names = [*head.split(sign), *last]
            if "" not in names:
                for name in names:
                    if key_of(name) is None:
                        raise ValueError(f"{name[:40]!r} is no key")
                return names
    raise ValueError(f"{part[:40]!r} is no key")
