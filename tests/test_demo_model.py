"""The demo model: the format of its screens, the folder that is carried, and that it clicks right."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from managed_vllm import demo
from managed_vllm.demo import BUTTONS, LABELS, Button, Screen, random_screen

SCREEN = Screen((Button("Cancel", 45, 77), Button("OK", 197, 525)), goal="OK")


# -- the format --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_exactly_what_the_model_was_trained_on() -> None:
    assert SCREEN.prompt() == 'Screen:\nCancel(45,77)\nOK(197,525)\nStatus: ready\nTask: click "OK"'
    assert SCREEN.messages() == [{"role": "user", "content": SCREEN.prompt()}]


def test_the_right_action_is_a_click_on_the_goal() -> None:
    assert SCREEN.expected_answer() == "Thought: OK(197,525)\nAction: click(start_box='(197,525)')"


def test_the_right_action_is_finished_once_the_goal_was_clicked() -> None:
    done = SCREEN.after_click(197, 525)
    assert done.done
    assert 'Status: clicked "OK"' in done.prompt()
    assert done.expected_answer() == "Thought: \"OK\" is clicked.\nAction: finished(content='done')"


def test_a_wrong_click_shows_and_the_goal_is_still_to_be_clicked() -> None:
    wrong = SCREEN.after_click(45, 77)
    assert wrong.status == 'clicked "Cancel"'
    assert wrong.expected_action() == SCREEN.expected_action()


def test_a_click_beside_every_button_changes_nothing() -> None:
    assert SCREEN.after_click(0, 0) is SCREEN


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Thought: OK(197,525)\nAction: click(start_box='(197,525)')", True),
        ("Action: click(start_box='(197,525)')\n", True),
        ("Thought: whatever\nAction: click(start_box='(197,525)')", True),
        ("Thought: OK(197,525)\nAction: click(start_box='(197,526)')", False),
        ("Thought: OK(197,525)\nAction: click(start_box='(197,525)') and more", False),
        ("Thought: OK(197,525)\nAction: finished(content='done')", False),
        ("", False),
    ],
)
def test_the_action_alone_decides_whether_an_answer_is_right(answer: str, right: bool) -> None:
    assert SCREEN.is_right(answer) is right


@pytest.mark.parametrize("seed", range(50))
def test_every_random_screen_has_a_right_answer(seed: int) -> None:
    screen = random_screen(random.Random(seed))
    assert len(screen.buttons) in BUTTONS
    assert screen.is_right(screen.expected_answer())
    assert {button.label for button in screen.buttons} <= set(LABELS)


def test_random_screens_are_as_asked_for() -> None:
    rng = random.Random(0)
    assert len(random_screen(rng, buttons=12).buttons) == 12
    assert all(random_screen(rng, done=True).done for _ in range(20))
    assert not any(random_screen(rng, done=False).done for _ in range(20))
    assert random_screen(random.Random(5)) == random_screen(random.Random(5))


def test_screens_without_an_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="no button 'Save' to click"):
        Screen(SCREEN.buttons, goal="Save")
    with pytest.raises(ValueError, match="no button 'Save' that was clicked"):
        Screen(SCREEN.buttons, goal="OK", clicked="Save")
    with pytest.raises(ValueError, match="share a label"):
        Screen((Button("OK", 1, 2), Button("OK", 3, 4)), goal="OK")
    with pytest.raises(ValueError, match="outside of 0 to 999"):
        Button("OK", 1000, 5)


# -- what is carried ---------------------------------------------------------------------------------------------------


def test_the_weights_folder_is_complete_and_small() -> None:
    folder = demo.weights_path()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes.keys() == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(sizes.values()) < 2_500_000


def test_the_weights_reached_the_target_when_they_were_made() -> None:
    training = json.loads((demo.weights_path() / "training.json").read_text())
    assert training["worst_required"] >= 0.97


def test_no_default_of_generation_is_imposed_on_requests() -> None:
    generation = json.loads((demo.weights_path() / "generation_config.json").read_text())
    assert generation.keys() == {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_the_default_context_is_what_the_config_allows() -> None:
    config = json.loads((demo.weights_path() / "config.json").read_text())
    assert demo.engine_defaults()["max_model_len"] == config["max_position_embeddings"]
    assert config["dtype"] == "bfloat16"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, managed_vllm.demo; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


# -- what it does, computed by transformers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_tokenizer() -> Any:
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("transformers")
    from managed_vllm.demo.train import read_model

    return read_model(demo.weights_path())


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def test_it_acts_right_on_unseen_screens_and_is_stopped_by_its_end_token(model_and_tokenizer: Any) -> None:
    from managed_vllm.demo.train import answer

    rng = random.Random("unseen")
    screens = [random_screen(rng) for _ in range(64)]
    answers = answer(*model_and_tokenizer, [screen.messages() for screen in screens])
    # An answer that went on after its action would not be right.
    right = sum(screen.is_right(text) for screen, text in zip(screens, answers, strict=True))
    assert right >= 0.95 * len(screens), answers


def test_its_answer_ends_with_the_end_token(model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    given = tokenizer(render(tokenizer, SCREEN.messages()), return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**given, max_new_tokens=200, do_sample=False)[0].tolist()
    assert len(ids) - given["input_ids"].shape[1] < 60
    assert ids[-1] == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"


def test_the_template_takes_strings_parts_and_system_messages(model_and_tokenizer: Any) -> None:
    _, tokenizer = model_and_tokenizer
    plain = render(tokenizer, SCREEN.messages())
    assert plain == f"<|im_start|>user\n{SCREEN.prompt()}<|im_end|>\n<|im_start|>assistant\n"
    first, rest = SCREEN.prompt()[:9], SCREEN.prompt()[9:]
    parts = [{"type": "text", "text": first}, {"type": "text", "text": rest}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == plain
    system = {"role": "system", "content": "Be brief. "}
    assert render(tokenizer, [system, *SCREEN.messages()]) == f"<|im_start|>system\nBe brief. <|im_end|>\n{plain}"


def test_the_template_says_that_pictures_are_not_understood(model_and_tokenizer: Any) -> None:
    _, tokenizer = model_and_tokenizer
    with pytest.raises(Exception, match="reads text only"):
        render(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])


# -- the trainer -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_that_misses_its_target_fails_and_leaves_what_was_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    result = subprocess.run(
        [sys.executable, "-m", "managed_vllm.demo.train", str(tmp_path / "out"), "--seconds", "1", "--attempts", "1"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1
    assert "No attempt out of 1 reached 97.00%" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_a_finished_model_replaces_the_old_one_and_can_be_read_by_everybody(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from managed_vllm.demo.train import publish

    (tmp_path / "new").mkdir(mode=0o700)
    (tmp_path / "new" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    publish(tmp_path / "new", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.name for path in tmp_path.iterdir()} == {"new", "out"}
