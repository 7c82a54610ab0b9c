"""Places: taken by one at a time, all or none, in the order of arrival; and nothing is believed of other users."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import HANG_S, eventually

from managed_vllm.errors import StateDirectoryError
from managed_vllm.server.places import Occupant, PlacesFolder, give_back

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "devices"


@pytest.fixture
def folder(path: Path) -> Iterator[PlacesFolder]:
    opened = PlacesFolder(path)
    yield opened
    opened.close()


def me(instance: str = "mine-0123456789") -> Occupant:
    return Occupant(os.getuid(), instance, os.getpid(), time.time())


def always(_: str) -> bool:
    return True


HOLDER = """
import os, sys, time
from pathlib import Path
from managed_vllm.server.places import Occupant, PlacesFolder
folder = PlacesFolder(Path(sys.argv[1]))
waiting = folder.join(sys.argv[3:], int(sys.argv[2]), Occupant(os.getuid(), "other-0123456789", os.getpid(), 0.0))
print("in line", flush=True)
while not (taken := waiting.take(sys.argv[3:], int(sys.argv[2]), lambda _: True)):
    time.sleep(0.02)
print("taken", flush=True)
if sys.stdin.read(1) == "c":  # a child that inherits the places
    if child := os.fork():
        print(child, flush=True)
    time.sleep(3600)
"""


class Other:
    """Another process that waits for places, and keeps what it gets."""

    def __init__(self, path: Path, wanted: int, *places: str) -> None:
        words = [sys.executable, "-c", HOLDER, str(path), str(wanted), *places]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.says() == "in line"

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def fork(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("c")
        self.process.stdin.flush()
        return int(self.says())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def other(path: Path) -> Iterator[Callable[..., Other]]:
    made: list[Other] = []

    def make(wanted: int, *places: str) -> Other:
        made.append(Other(path, wanted, *places))
        return made[-1]

    yield make
    for one in made:
        one.kill()
        for pipe in (one.process.stdin, one.process.stdout):
            assert pipe is not None
            pipe.close()


# -- one at a time, all or none ----------------------------------------------------------------------------------------


def test_a_place_has_one_holder_and_is_free_again_once_given_back(folder: PlacesFolder, path: Path) -> None:
    taken = {"a": folder.take("a")}
    assert taken["a"] is not None
    assert folder.is_held("a")
    second = PlacesFolder(path)
    assert second.take("a") is None
    give_back({"a": taken["a"]})
    assert not folder.is_held("a")
    descriptor = second.take("a")
    assert descriptor is not None
    os.close(descriptor)
    second.close()


def test_all_that_are_wanted_or_none(folder: PlacesFolder) -> None:
    held = folder.take("b")
    assert held is not None
    waiting = folder.join("abc", 3, me())
    assert waiting.take("abc", 3, always) == {}
    assert [folder.is_held(place) for place in "abc"] == [False, True, False]
    os.close(held)
    taken = waiting.take("abc", 3, always)
    assert list(taken) == ["a", "b", "c"]
    waiting.leave()
    give_back(taken)


def test_one_that_is_in_use_by_others_is_left_alone(folder: PlacesFolder) -> None:
    waiting = folder.join("ab", 1, me())
    taken = waiting.take("ab", 1, lambda place: place != "a")
    assert list(taken) == ["b"]
    assert not folder.is_held("a")
    assert waiting.take("a", 1, lambda _: False) == {}
    waiting.leave()
    give_back(taken)


def test_a_killed_holder_gives_its_places_back_with_its_last_child(
    folder: PlacesFolder, other: Callable[..., Other]
) -> None:
    holder = other(2, "a", "b")
    assert holder.says() == "taken"
    child = holder.fork()
    holder.kill()
    assert folder.is_held("a")
    assert folder.is_held("b")
    os.kill(child, signal.SIGKILL)
    eventually(lambda: not folder.is_held("a") and not folder.is_held("b"), "both are free")


def test_given_back_is_free_whatever_child_has_inherited_it(folder: PlacesFolder) -> None:
    descriptor = folder.take("a")
    assert descriptor is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    give_back({"a": descriptor})
    assert not folder.is_held("a")
    child.communicate(b"\n", HANG_S)


# -- the line ----------------------------------------------------------------------------------------------------------


def test_first_come_first_served_and_those_that_need_few_do_not_pass(folder: PlacesFolder) -> None:
    held = folder.take("a")
    assert held is not None
    many, few = folder.join("ab", 2, me("many-0123456789")), folder.join("ab", 1, me("few-0123456789"))
    assert many.take("ab", 2, always) == {}
    assert few.take("ab", 1, always) == {}  # though one is free
    assert [ticket.occupant.instance for ticket in few.before("ab")] == ["many-0123456789"]
    assert many.before("ab") == []
    os.close(held)
    taken = many.take("ab", 2, always)
    assert len(taken) == 2
    many.leave()
    assert few.before("ab") == []
    assert few.take("ab", 1, always) == {}
    give_back(taken)
    few.leave()


def test_what_none_before_may_have_is_taken_at_once(folder: PlacesFolder) -> None:
    held = folder.take("a")
    assert held is not None
    first, second = folder.join("a", 1, me()), folder.join("ab", 1, me())
    assert first.take("a", 1, always) == {}
    taken = second.take("ab", 1, always)
    assert list(taken) == ["b"]
    for waiting in (first, second):
        waiting.leave()
    give_back(taken)
    os.close(held)


def test_a_killed_process_is_in_nobodys_way(folder: PlacesFolder, path: Path, other: Callable[..., Other]) -> None:
    held = folder.take("a")
    assert held is not None
    before = other(1, "a")
    waiting = folder.join("a", 1, me())
    assert len(waiting.before("a")) == 1
    before.kill()
    assert waiting.before("a") == []
    assert len(list(path.glob("line-*"))) == 2
    folder.join("a", 1, me()).leave()
    assert len(list(path.glob("line-*"))) == 1, "the dead one's ticket was not removed"
    os.close(held)
    waiting.leave()


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_note_says_who_holds_a_place(folder: PlacesFolder, path: Path) -> None:
    assert folder.holder("a") is None
    noted = me("demo-0123456789")
    folder.note("a", noted)
    holder = folder.holder("a")
    assert holder is not None
    assert str(holder).startswith("instance demo-0123456789 of user ")
    assert f"pid {os.getpid()}, since {time.strftime('%H:', time.localtime(noted.since))}" in str(holder)
    folder.forget("a")
    assert folder.holder("a") is None


def test_garbage_in_notes_and_tickets_is_no_one(folder: PlacesFolder, path: Path) -> None:
    note = path / f"a.holder-{os.getuid()}"
    good = {"uid": 4711, "instance": "x-0123456789", "pid": 1, "since": 0}
    for bad in (
        "",
        "[]",
        "{",
        json.dumps({**good, "instance": "\x1b[2J"}),
        json.dumps({**good, "since": "now"}),
        "[" * 9**5,
    ):
        note.write_text(bad)
        assert folder.holder("a") is None
    note.write_text(json.dumps(good))
    found = folder.holder("a")
    assert found is not None
    assert found.uid == os.getuid()  # the owner of the file, not what is in it
    note.unlink()
    note.symlink_to(path / "elsewhere")
    assert folder.holder("a") is None
    (path / f"line-{'0' * 16}").write_text("no ticket")
    os.mkfifo(path / f"line-{'1' * 16}")
    assert folder.line() == []


# -- the directory -----------------------------------------------------------------------------------------------------


def test_it_is_made_open_to_all_and_sticky_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = PlacesFolder(path)
        descriptor = folder.take("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o1777
    assert stat.S_IMODE((path / "a.place").stat().st_mode) == 0o644
    assert descriptor is not None
    os.close(descriptor)
    folder.close()


def test_one_in_which_others_could_remove_our_files_is_refused(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(StateDirectoryError, match=r"chmod \+t"):
        PlacesFolder(path)
    path.chmod(0o3770)  # a group's
    PlacesFolder(path).close()


def test_neither_a_link_nor_a_file_is_taken_for_it(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path)
    with pytest.raises(StateDirectoryError, match="MANAGED_VLLM_DEVICES_DIR"):
        PlacesFolder(path)
    path.unlink()
    path.touch()
    with pytest.raises(StateDirectoryError, match="MANAGED_VLLM_DEVICES_DIR"):
        PlacesFolder(path)
    with pytest.raises(StateDirectoryError, match="MANAGED_VLLM_DEVICES_DIR"):
        PlacesFolder(tmp_path / "no" / "parent")


def test_what_is_planted_in_a_places_stead_is_refused(folder: PlacesFolder, path: Path, tmp_path: Path) -> None:
    (path / "a.place").symlink_to(tmp_path / "target")
    os.mkfifo(path / "b.place")
    for place in "ab":
        with pytest.raises(StateDirectoryError, match=f"{place}.place"):
            folder.take(place)
    assert not (tmp_path / "target").exists()


def test_a_place_whose_file_was_removed_is_taken_anew(folder: PlacesFolder, path: Path) -> None:
    for _ in range(2):
        descriptor = folder.take("a")
        assert descriptor is not None
        os.close(descriptor)
        (path / "a.place").unlink()


# -- another user ------------------------------------------------------------------------------------------------------


def as_nobody(what: Callable[[], object]) -> int:
    """Runs a function as the user nobody, in a forked child, whose exit code says whether it returned true."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = 0 if what() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_way_to(path: Path) -> None:
    """Temporary folders of a test are its user's alone."""
    for parent in path.parents:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)


@as_root
def test_two_users_share_places(path: Path, folder: PlacesFolder) -> None:
    open_way_to(path)
    mine = folder.take("a")
    assert mine is not None
    folder.note("a", me("roots-0123456789"))

    def theirs() -> bool:
        opened = PlacesFolder(path)
        waiting = opened.join("ab", 2, me("theirs-0123456789"))
        holder = opened.holder("a")
        seen = holder is not None and holder.uid == 0 and holder.instance == "roots-0123456789"
        for name in ("a.place", "a.holder-0"):
            try:
                os.unlink(path / name)
            except PermissionError:
                continue
            return False
        return seen and waiting.take("ab", 2, always) == {} and list(waiting.take("ab", 1, always)) == ["b"]

    assert as_nobody(theirs) == 0
    assert not folder.is_held("b")  # the process has ended
    taken = folder.take("b")  # whose file is nobody's
    assert taken is not None
    for descriptor in (mine, taken):
        os.close(descriptor)


@as_root
def test_another_users_forgeries_change_nothing_but_what_is_shown(path: Path, folder: PlacesFolder) -> None:
    open_way_to(path)
    ours = folder.join("a", 1, me())

    def forge() -> bool:
        # An earlier ticket, which nobody holds; a holder's note in root's name; a note in the place of root's.
        text = json.dumps({"instance": "first-0123456789", "pid": 1, "since": 0, "places": ["a"], "wanted": 1})
        ticket = path / f"line-{'0' * 16}"
        ticket.write_text(text)
        os.utime(ticket, (0, 0))
        (path / "a.holder-0").write_text(text)
        return True

    assert as_nobody(forge) == 0
    assert ours.before("a") == []
    holder = folder.holder("a")
    assert holder is None or holder.uid == NOBODY
    folder.note("a", me())  # root may replace it; another could not, and would go on without a note
    taken = ours.take("a", 1, always)
    assert list(taken) == ["a"]
    ours.leave()
    give_back(taken)
