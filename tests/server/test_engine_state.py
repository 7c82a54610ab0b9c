"""The state of an engine, and its way through a record."""

from __future__ import annotations

import json

import pytest

from managed_vllm.engine_state import EngineState

FULL = EngineState(1, "keep", {"a": "/lora"}, "/ck", "v2", "abc", weights_unsaved=True)


@pytest.mark.parametrize("state", [FULL, EngineState()])
def test_a_record_holds_all_of_it(state: EngineState) -> None:
    assert EngineState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize(
    "broken", [None, [], {"sleep_level": 7}, {"paused": "maybe"}, {"loras": ["a"]}, {"weights_unsaved": "no"}]
)
def test_what_can_not_be_read_does_not_pass_for_an_engine_as_it_starts(broken: object) -> None:
    with pytest.raises(ValueError, match="no state of an engine"):
        EngineState.from_dict(broken)


def test_it_serves_unless_it_is_paused_or_sleeps() -> None:
    assert EngineState(loras={"a": "/lora"}).serves
    assert not EngineState(sleep_level=0).serves
    assert not EngineState(paused="wait").serves
