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
from managed_vllm.demo import (
    BUTTONS,
    FIELDS,
    KINDS,
    LABELS,
    LEARNT,
    WORDS,
    Button,
    Goal,
    Screen,
    TextField,
    World,
    random_screen,
    random_state,
    random_world,
    read_screen,
)

SCREEN = Screen((Button("Cancel", 45, 77), Button("OK", 197, 525)), goal="OK")

FORM = (Button("OK", 197, 525), TextField("City", 120, 300, "red"))
TYPE_THEN_CLICK = World((FORM,), (Goal("City", "blue"), Goal("OK")))


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


# -- fields, second goals and pages ------------------------------------------------------------------------------------


def test_the_prompt_shows_contents_where_to_scroll_and_both_goals() -> None:
    screen = Screen((*FORM, TextField("Name", 5, 6)), Goal("City", "blue"), then=Goal("Save"), more="down")
    assert screen.prompt() == (
        "Screen:\nOK(197,525)\nCity(120,300)=red\nName(5,6)=\nMore: down\nStatus: ready\n"
        'Task: type "blue" into "City" then click "Save"'
    )
    both = Screen((*FORM, Button("Save", 1, 2)), goal="OK", then=Goal("Save"), typed="tea")
    assert both.prompt().endswith('Status: typed "tea"\nTask: click "OK" then click "Save"')


def test_the_thought_says_the_status_again_and_names_what_is_wanted_before_the_action_says_where_it_is() -> None:
    answers: list[str] = []
    world = World(((Button("Save", 1, 2),), FORM), (Goal("City", "blue"), Goal("Save")))
    while not answers or not world.screen().done:
        answers.append(world.screen().expected_answer())
        world = world.act_right()
    answers.append(world.screen().expected_answer())
    assert answers == [
        "Thought: ready, next City is not here.\nAction: scroll(start_box='(500,500)', direction='down')",
        "Thought: ready, next City(120,300)\nAction: click(start_box='(120,300)')",
        'Thought: clicked "City", next type "blue"\nAction: type(content=\'blue\')',
        "Thought: typed \"blue\", next Save is not here.\nAction: scroll(start_box='(500,500)', direction='up')",
        "Thought: typed \"blue\", next Save(1,2)\nAction: click(start_box='(1,2)')",
        "Thought: clicked \"Save\", done.\nAction: finished(content='done')",
    ]
    assert world.achieved


def test_the_last_thing_that_was_typed_ends_the_task() -> None:
    world = World((FORM,), (Goal("OK"), Goal("City", "blue"))).click("OK").click("City").type("blue")
    assert world.screen().expected_answer() == "Thought: typed \"blue\", done.\nAction: finished(content='done')"


@pytest.mark.parametrize("label", ["OK", "City"])
def test_whatever_had_a_wrong_effect_the_task_begins_anew(label: str) -> None:
    goals = (Goal("Save"), Goal("Open"))
    world = World(((*FORM, Button("Save", 1, 2), Button("Open", 3, 4)),), goals).click("Save").click(label)
    assert world.screen().expected_action() == "click(start_box='(1,2)')"
    assert world.screen().target.label == "Save"


def test_scrolling_leaves_status_and_focus_alone() -> None:
    world = World((FORM, (Button("Save", 1, 2),)), (Goal("City", "blue"), Goal("Save"))).click("City")
    scrolled = world.scroll("down")
    assert scrolled.screen().status == 'clicked "City"'
    assert scrolled.screen().more == "up"
    assert scrolled.screen().expected_action() == "type(content='blue')"
    assert scrolled.type("blue").pages[0][1] == TextField("City", 120, 300, "blue")
    assert scrolled.scroll("down") is scrolled
    assert scrolled.click("OK") is scrolled  # not seen


def test_typing_goes_into_the_field_that_was_clicked_and_nowhere_else() -> None:
    assert TYPE_THEN_CLICK.type("blue") is TYPE_THEN_CLICK
    world = TYPE_THEN_CLICK.click("City").type("blue")
    assert world.pages == ((FORM[0], TextField("City", 120, 300, "blue")),)
    button = world.click("OK")
    assert button.type("red") is button
    screen = TYPE_THEN_CLICK.click("City").screen()
    assert screen.after_type("blue") == world.screen()
    assert TYPE_THEN_CLICK.screen().after_type("blue") == TYPE_THEN_CLICK.screen()


def test_goals_count_in_their_order_only() -> None:
    right = TYPE_THEN_CLICK.click("City").type("blue")
    assert not right.achieved
    assert right.click("OK").achieved
    assert right.click("City").click("OK").achieved  # what else was done between them does not matter
    assert not TYPE_THEN_CLICK.click("OK").click("City").type("blue").achieved
    assert not right.click("OK").click("City").type("red").achieved
    assert not TYPE_THEN_CLICK.click("City").click("OK").achieved


def test_what_was_typed_into_the_wrong_field_does_not_count() -> None:
    world = World(((*FORM, TextField("Name", 1, 2)),), (Goal("City", "blue"),))
    wrong = world.click("Name").type("blue")
    assert wrong.screen().status == 'typed "blue"'
    assert not wrong.achieved


@pytest.mark.parametrize("kind", KINDS)
def test_every_random_world_can_be_finished_and_every_state_has_a_right_answer(kind: str) -> None:
    rng = random.Random(kind)
    for number in range(200):
        world = random_state(rng, kind, elements=2 if number % 4 == 0 else None)
        for _ in range(10):
            screen = world.screen()
            assert screen.is_right(screen.expected_answer())
            assert read_screen(screen.prompt()) == screen
            assert len(screen.buttons) in BUTTONS
            assert {element.label for element in screen.buttons} <= {*LABELS, *FIELDS}
            if screen.done:
                break
            world = world.act_right()
        assert screen.done
    fresh = random_world(rng, kind)
    for _ in range(8):
        fresh = fresh.act_right()
    assert fresh.achieved


def test_random_worlds_are_as_asked_for() -> None:
    assert random_world(random.Random(5), "scroll") == random_world(random.Random(5), "scroll")
    assert [len(page) for page in random_world(random.Random(0), "scroll", elements=4).pages] == [4, 4]
    places = [(number, number) for number in range(10)]
    world = random_world(random.Random(0), "type", elements=8, points=places)
    assert len({(element.x, element.y) for element in world.elements} & set(places)) == 8
    for kind in KINDS.values():
        assert kind.scroll or len(random_world(random.Random(0), "click").pages) == 1
    with pytest.raises(KeyError):
        random_world(random.Random(0), "fly")


def test_no_word_and_no_label_is_another_one() -> None:
    assert len({*LABELS, *FIELDS, *WORDS}) == len(LABELS) + len(FIELDS) + len(WORDS)
    assert all(word.isascii() and word.isalpha() for word in (*LABELS, *FIELDS, *WORDS))


def test_worlds_and_screens_that_the_status_could_not_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="in common"):
        Screen(FORM, goal="OK", then=Goal("OK"))
    with pytest.raises(ValueError, match="in common"):
        Screen((*FORM, TextField("Name", 1, 2)), Goal("City", "blue"), then=Goal("Name", "blue"))
    with pytest.raises(ValueError, match="'OK' is a button"):
        Screen(FORM, Goal("OK", "blue"))
    with pytest.raises(ValueError, match="not both"):
        Screen(FORM, goal="OK", clicked="OK", typed="blue")
    with pytest.raises(ValueError, match="no button 'Save' to click"):
        World((FORM, (Button("Open", 1, 2),)), (Goal("Save"),))
    with pytest.raises(ValueError, match="share a label"):
        World((FORM, FORM), (Goal("OK"),))
    with pytest.raises(ValueError, match="one or two pages"):
        World((FORM,), (Goal("OK"),), page=1)
    with pytest.raises(ValueError, match="one or two goals"):
        World((FORM,), ())
    with pytest.raises(ValueError, match="text field 'City' is at"):
        TextField("City", -1, 0)
    with pytest.raises(ValueError, match="more than one line"):
        TextField("City", 1, 0, "blue\nred")
    with pytest.raises(LookupError, match="'Save' is not seen; scroll up"):
        _ = Screen(FORM, goal="Save", more="up").target


@pytest.mark.parametrize("text", ["", "Screen:", 'Screen:\nOK\nStatus: ready\nTask: click "OK"', "Status: ready"])
def test_a_text_that_is_no_screen_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="not the text of a screen"):
        read_screen(text)


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
    required = {name: training["success"][name] for name in training["required"]}
    assert min(required.values()) == training["worst_required"]
    named = " ".join(required)
    assert all(f"any turn of {kind}" in named for kind in LEARNT)
    assert {"click, 8 buttons", "finished", "with a system message", "second turn of an episode"} <= required.keys()


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

    model, tokenizer = model_and_tokenizer
    rng = random.Random("unseen")
    screens = [random_screen(rng) for _ in range(64)]
    answers = answer(model, tokenizer, [screen.messages() for screen in screens])
    # An answer that went on after its action would not be right.
    right = sum(screen.is_right(text) for screen, text in zip(screens, answers, strict=True))
    assert right >= 0.95 * len(screens), answers


@pytest.mark.parametrize("kind", LEARNT)
def test_it_acts_right_in_unseen_states_of_every_kind(kind: str, model_and_tokenizer: Any) -> None:
    from managed_vllm.demo.train import answer

    model, tokenizer = model_and_tokenizer
    rng = random.Random(f"unseen {kind}")
    screens = [random_state(rng, kind).screen() for _ in range(32)]
    answers = answer(model, tokenizer, [screen.messages() for screen in screens])
    right = sum(screen.is_right(text) for screen, text in zip(screens, answers, strict=True))
    assert right >= 29, answers


def test_every_label_and_every_word_is_one_token(model_and_tokenizer: Any) -> None:
    _, tokenizer = model_and_tokenizer
    words = [*LABELS, *FIELDS, *WORDS]
    assert [word for word, ids in zip(words, tokenizer(words)["input_ids"], strict=True) if len(ids) != 1] == []


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
    little = ["--seconds", "1", "--attempts", "1", "--screens", "8"]
    result = subprocess.run(
        [sys.executable, "-m", "managed_vllm.demo.train", str(tmp_path / "out"), *little],
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
