"""`RetryPolicy`, applied to one request: pauses, what counts as a death, and when there is no further attempt."""

from __future__ import annotations

import pytest

from managed_vllm import RetryPolicy
from managed_vllm.errors import DeadlyRequestError, ServerBusyError, ServerDiedError
from managed_vllm.request.retry import ResponseLostError, Retries, ServerFaultError


def test_pauses_double_with_full_jitter_and_waiting_for_a_new_epoch_is_spread() -> None:
    policy = RetryPolicy(max_lost=100, max_deaths=100)
    pauses: list[list[float]] = [[] for _ in range(9)]
    for _ in range(300):
        retries = Retries(policy)
        for each in pauses:
            each.append(retries.add_loss(ResponseLostError("x"), progressed=False))
    for number, each in enumerate(pauses):
        longest = min(2.0, 0.05 * 2**number)
        assert 0.9 * longest < max(each) <= longest
        assert min(each) < 0.1 * longest
    spread = [Retries(policy).add_epoch() for _ in range(1000)]
    assert 0.18 < max(spread) <= 0.2
    in_one_ms = max(sum(1 for value in spread if int(value * 1000) == ms) for ms in range(200))
    assert in_one_ms < 30


def test_losses_in_a_row_exhaust_it_and_progress_starts_the_count_anew() -> None:
    retries = Retries(RetryPolicy(max_lost=3))
    for progressed in (False, False, True, False):
        retries.add_loss(ResponseLostError("broken"), progressed=progressed)
        retries.raise_if_exhausted()
    retries.add_loss(ResponseLostError("broken", status=503), progressed=False)
    assert retries.exhausted
    with pytest.raises(ServerDiedError, match=r"lost 3 times in a row.*At last: broken") as caught:
        retries.raise_if_exhausted()
    assert caught.value.status == 503


def test_deaths_under_the_request_exhaust_it_unless_it_never_reached_the_server() -> None:
    retries = Retries(RetryPolicy(max_deaths=2))
    for sent in (True, False):
        retries.add_loss(ResponseLostError("gone", sent=sent), progressed=False)
        assert retries.sent == sent
        retries.add_epoch()
        assert (retries.lost, retries.sent, retries.exhausted) == (0, False, False)
    retries.deaths = (1, 3)
    error = retries.error()
    assert isinstance(error, DeadlyRequestError)
    assert "died 2 times under this request; it may be what kills it" in str(error)
    assert error.epochs == (1, 3)
    retries.add_loss(ResponseLostError("gone"), progressed=True)
    assert not retries.exhausted


def test_a_server_that_takes_nothing_is_busy_not_dead() -> None:
    retries = Retries(RetryPolicy(max_lost=1))
    loss = ResponseLostError("HTTP 429: slow down", status=429)
    retries.add_loss(loss, progressed=False)
    error = retries.error(loss)
    assert (type(error), error.status, error.__cause__) == (ServerBusyError, 429, loss)


def test_the_same_fault_counts_as_repeated_whatever_addresses_and_numbers_it_names() -> None:
    retries = Retries(RetryPolicy())
    told = ["no image at 0x7f01", "no image at 0xa9", "no text", "no image at 0x7f01"]
    seen = []
    for words in told:
        retries.add_loss(ServerFaultError(words), progressed=False)
        seen.append(retries.repeated)
    assert seen == [False, True, False, False]
    retries.add_epoch()
    retries.add_loss(ServerFaultError("no image at 0x1"), progressed=False)
    assert not retries.repeated
    retries.add_loss(ResponseLostError("no image at 0x1"), progressed=False)
    assert not retries.repeated


def test_a_wait_that_the_server_asks_for_is_heeded_up_to_a_minute() -> None:
    retries = Retries(RetryPolicy(backoff_max_s=0))
    for asked, waited in ((None, 0), (5.0, 5), (86400.0, 60)):
        assert retries.add_loss(ResponseLostError("busy", status=429, retry_after_s=asked), progressed=False) == waited
