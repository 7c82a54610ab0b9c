"""Policies are checked when they are made, and reach the supervisor as they were given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import standin

from managed_vllm import ManagedVLLM
from managed_vllm.errors import ConfigError, StartupTimeoutError
from managed_vllm.policies import HangPolicy, RestartPolicy, SupervisionPolicy


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        (HangPolicy, {"stall_s": 0}),
        (HangPolicy, {"answer_s": -1}),
        (HangPolicy, {"stopped_s": math.nan}),
        (RestartPolicy, {"not_retried": frozenset({"wrker"})}),
        (RestartPolicy, {"max_restarts": -1}),
        (RestartPolicy, {"window_s": -1}),
        (RestartPolicy, {"backoff_factor": 0.5}),
        (SupervisionPolicy, {"startup_timeout_s": 0}),
        (SupervisionPolicy, {"startup_silence_s": math.nan}),
        (SupervisionPolicy, {"first_request_timeout_s": -1}),
        (SupervisionPolicy, {"stop_grace_s": -1}),
        (SupervisionPolicy, {"stop_grace_s": math.inf}),
        (SupervisionPolicy, {"gpu_release_timeout_s": math.inf}),
    ],
)
def test_a_wrong_number_is_refused_by_its_field(policy: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(**wrong)
    assert caught.value.field == next(iter(wrong))


def test_a_cause_that_does_not_exist_is_named_beside_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"no such cause: wrker; there are: .*worker_died"):
        RestartPolicy(not_retried=frozenset({"wrker", "killed"}))


def test_a_policy_survives_json() -> None:
    policy = SupervisionPolicy(
        hang=HangPolicy.never(), restart=RestartPolicy(not_retried=frozenset({"killed"})), stop_grace_s=0
    )
    assert SupervisionPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_the_back_off_grows_to_its_limit() -> None:
    policy = RestartPolicy(backoff_initial_s=0.5, backoff_factor=2, backoff_max_s=3)
    assert [policy.delay_s(restarts) for restarts in (0, 1, 2, 3, 4, 10_000)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_first_request_that_takes_too_long_fails_the_start(home: Path) -> None:
    llm = ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(token_s=3600),
        keep_alive=0,
        first_request_timeout=0.5,
    )
    with pytest.raises(StartupTimeoutError, match="raise first_request_timeout"):
        llm.start()
    llm.close()


def test_a_server_deaf_to_sigterm_is_ended_after_its_grace(home: Path) -> None:
    llm = ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(ignore_sigterm=True),
        keep_alive=0,
        stop_grace=0.1,
    )
    with llm:
        assert llm.generate("x")
    # `home` waits until nothing is left of it.
