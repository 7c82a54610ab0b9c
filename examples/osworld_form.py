"""An app for OSWorld's machine: a text field, two buttons, and a canvas; what happens to it is in a folder.

`shown` is there as soon as the app is on the screen. `saved` is the field's text as of a click on Save; Discard empties
it. `events` has a line of JSON for each event of the canvas, and for each key in it. Runs with Debian's Python and
python3-tk, without a window manager.
"""

import json
import sys
import tkinter
from pathlib import Path

BACKGROUND = "#2e8b57"
FIELD, CANVAS = (60, 60, 1200, 500), (1300, 60, 500, 500)
SAVE, DISCARD = (60, 600, 200, 80), (320, 600, 200, 80)
"""Left, top, width, height, in pixels of the screen."""


def note(folder: Path, *what: object) -> None:
    with (folder / "events").open("a") as file:
        file.write(json.dumps(what) + "\n")


def save(folder: Path, text: str) -> None:
    (folder / "saving").write_text(text)
    (folder / "saving").rename(folder / "saved")


def fill(window: tkinter.Tk, folder: Path) -> None:
    field = tkinter.Text(window, font=("Courier", 8), undo=True)
    saving = tkinter.Button(window, text="Save", command=lambda: save(folder, field.get("1.0", "end-1c")))
    discarding = tkinter.Button(window, text="Discard", command=lambda: save(folder, ""))
    canvas = tkinter.Canvas(window, background="white", highlightthickness=0)
    for widget, place in ((field, FIELD), (saving, SAVE), (discarding, DISCARD), (canvas, CANVAS)):
        put(widget, place)
    for number in range(1, 6):
        canvas.bind(f"<ButtonPress-{number}>", lambda event: note(folder, "press", event.num, event.x, event.y))
        canvas.bind(f"<ButtonRelease-{number}>", lambda event: note(folder, "release", event.num, event.x, event.y))
    canvas.bind("<Double-ButtonPress-1>", lambda event: note(folder, "double", event.num, event.x, event.y))
    canvas.bind("<Motion>", lambda event: note(folder, "motion", 0, event.x, event.y))
    canvas.bind("<KeyPress>", lambda event: note(folder, "key", event.keysym))
    canvas.bind("<Enter>", lambda event: canvas.focus_set())
    field.bind("<Enter>", lambda event: field.focus_set())


def put(widget: tkinter.Widget, place: tuple[int, int, int, int]) -> None:
    left, top, width, height = place
    widget.place(x=left, y=top, width=width, height=height)


def main(folder: Path) -> None:
    window = tkinter.Tk()
    window.geometry("1920x1080+0+0")
    window.configure(background=BACKGROUND)
    fill(window, folder)
    window.wait_visibility()
    window.update()
    (folder / "shown").touch()
    window.mainloop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
