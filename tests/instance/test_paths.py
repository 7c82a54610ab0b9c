"""Paths as callers write them: one text for one file, against the caller's working directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from managed_vllm import paths
from managed_vllm.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "m")
    (tmp_path / "serve.sh").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_spelling_of_a_folder_is_one_path(folder: Path) -> None:
    target = str(folder / "models" / "m")
    spellings = [target, f"{target}/", "models/m", "./models/m", "models//m/.", "~/models/m", "link", f"{folder}/link"]
    assert {paths.argument(spelling) for spelling in spellings} == {target}


def test_what_is_no_path_stays(folder: Path) -> None:
    for text in ("org/model", "", "a\0b", "x" * 5000, "{{ messages }}", "auto"):
        assert paths.argument(text) == text
    assert paths.argument("./not/there") == str(folder / "not" / "there")


def test_words_of_a_command(folder: Path) -> None:
    (folder / "serve").mkdir()
    assert paths.command_word("./serve.sh") == str(folder / "serve.sh")
    assert paths.command_word("serve.sh") == str(folder / "serve.sh")
    assert paths.command_word("--config=./x.yaml") == f"--config={folder}/x.yaml"
    for word in ("serve", "{args}", "python", "--port={port}", "/bin/sh", "", "a\0", "-m"):
        assert paths.command_word(word) == word


def test_the_links_of_a_program_stay(folder: Path) -> None:
    assert paths.absolute("link/../link") == f"{folder}/link"


def test_variables(folder: Path) -> None:
    given = {
        "PYTHONPATH": f"libs::{folder}/x",
        "PATH": "/bin:./bin",
        "HF_HOME": "hf",
        "MY_FILE": "../x",
        "NAME": "models",
        "LD_LIBRARY_PATH": "",
    }
    made = paths.environment(given)
    assert made["PYTHONPATH"].split(os.pathsep) == [f"{folder}/libs", str(folder), f"{folder}/x"]
    assert made["PATH"] == f"/bin:{folder}/bin"
    assert (made["HF_HOME"], made["MY_FILE"]) == (f"{folder}/hf", str(folder.parent / "x"))
    assert (made["NAME"], made["LD_LIBRARY_PATH"]) == ("models", "")


def test_in_a_working_directory_that_was_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="working directory was removed"):
        paths.absolute("x")
    assert paths.argument("org/model") == "org/model"
    assert paths.canonical("/tmp/..") == "/"
    assert paths.environment({"PYTHONPATH": "libs", "HF_HOME": "hf"}) == {"PYTHONPATH": "libs", "HF_HOME": "hf"}
