"""What follows an end of the server that nobody asked for."""

from __future__ import annotations

import pytest

from managed_vllm.policies import RestartPolicy
from managed_vllm.server.restarts import ENDED_FROM_OUTSIDE, GiveUp, Restarts, StartAgain
from managed_vllm.status import Cause, Diagnosis

POLICY = RestartPolicy(max_restarts=2, window_s=100, backoff_initial_s=1, backoff_factor=2, backoff_max_s=10)


def ended(cause: Cause = Cause.UNKNOWN, *, permanent: bool = False) -> Diagnosis:
    return Diagnosis(cause, "it ended", permanent=permanent)


def serving(policy: RestartPolicy = POLICY, *, chooses_port: bool = True) -> Restarts:
    """Of a server that was ready once."""
    restarts = Restarts(policy, chooses_port=chooses_port, has_served=False)
    restarts.record_ready()
    return restarts


@pytest.mark.parametrize("cause", sorted(set(Cause) - ENDED_FROM_OUTSIDE - {Cause.PORT_IN_USE}))
def test_a_first_start_that_says_why_it_failed_is_not_repeated(cause: Cause) -> None:
    decision = Restarts(POLICY, chooses_port=True, has_served=False).decide(ended(cause))
    assert decision == GiveUp(ended(cause))


@pytest.mark.parametrize("cause", sorted(ENDED_FROM_OUTSIDE))
def test_a_first_start_that_was_ended_from_outside_is_repeated(cause: Cause) -> None:
    assert isinstance(Restarts(POLICY, chooses_port=True, has_served=False).decide(ended(cause)), StartAgain)


def test_the_first_start_of_a_successor_is_a_restart() -> None:
    assert isinstance(Restarts(POLICY, chooses_port=True, has_served=True).decide(ended()), StartAgain)


def test_crashes_are_counted_within_the_window_only() -> None:
    restarts = serving()
    assert restarts.decide(ended(), 0) == StartAgain(0.0)
    assert restarts.decide(ended(), 50) == StartAgain(1.0)
    given_up = restarts.decide(ended(Cause.KILLED), 100)
    assert isinstance(given_up, GiveUp)
    assert given_up.diagnosis.cause is Cause.CRASH_LOOP
    assert given_up.diagnosis.facts["last_cause"] == Cause.KILLED
    assert restarts.decide(ended(), 101) == StartAgain(1.0)  # the first is out of the window


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (POLICY, ended(permanent=True)),
        (RestartPolicy(not_retried=frozenset({"worker_died"})), ended(Cause.WORKER_DIED)),
        (RestartPolicy(max_restarts=0), ended()),
    ],
)
def test_what_the_policy_or_the_cause_rules_out_is_given_up_at_once(policy: RestartPolicy, reason: Diagnosis) -> None:
    assert serving(policy).decide(reason) == GiveUp(reason)


def test_a_lost_port_costs_no_restart_but_not_for_ever() -> None:
    restarts = Restarts(POLICY, chooses_port=True, has_served=False)
    lost = ended(Cause.PORT_IN_USE)
    assert [restarts.decide(lost) for _ in range(6)] == [*5 * [StartAgain(0.0, crashed=False)], GiveUp(lost)]


def test_a_port_that_was_asked_for_is_not_replaced() -> None:
    lost = ended(Cause.PORT_IN_USE)
    assert Restarts(POLICY, chooses_port=False, has_served=False).decide(lost) == GiveUp(lost)


def test_deaths_that_are_laid_to_one_request_are_left_out_of_the_count() -> None:
    restarts = serving(RestartPolicy(max_restarts=2))
    for epoch in (1, 2):
        assert isinstance(restarts.decide(ended(), epoch=epoch), StartAgain)
    assert restarts.forgive([1, 2, 7]) == [1, 2]
    assert [restarts.decide(ended(), epoch=epoch) for epoch in (3, 4)] == [StartAgain(0.0), StartAgain(0.5)]
    assert isinstance(restarts.decide(ended(), epoch=5), GiveUp)


def test_one_death_alone_is_counted_whatever_request_was_in_flight() -> None:
    restarts = serving(RestartPolicy(max_restarts=1))
    restarts.decide(ended(), epoch=1)
    assert restarts.forgive([1]) == [1]
    assert isinstance(restarts.decide(ended(), epoch=2), GiveUp)


def test_a_server_that_every_request_kills_is_given_up() -> None:
    restarts = serving(RestartPolicy(max_restarts=2))
    for epoch in range(1, 20):
        if isinstance(restarts.decide(ended(), epoch=epoch), GiveUp):
            break
        restarts.forgive([epoch - 1, epoch])
    assert epoch == 7
