"""A server's /metrics as one typed snapshot, and the rates between two of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import standin
from processes import INSTANT
from scripted_server import Script, client_of, says

from managed_vllm import ManagedVLLM
from managed_vllm.errors import UnsupportedMethodError
from managed_vllm.request.server_metrics import Distribution, ServerMetrics, parse, together

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="m"} 1000.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 7.0
vllm:request_success_total{engine="1",finished_reason="stop",model_name="m"} 1.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 2.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.2",model_name="m"} 8.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.4",model_name="m"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 10.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.8
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="m"} 0.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 0.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 0.0
"""


def test_a_snapshot_adds_up_engines_and_says_none_for_what_is_not_told() -> None:
    found = parse(TEXT, epoch=2)
    assert (found.running, found.waiting, found.epoch) == (5, None, 2)
    assert found.kv_cache_usage == 0.375
    assert found.prefix_cache_hit_rate == 0.25
    assert found.requests == {"stop": 8, "length": 2}
    first = found.time_to_first_token
    assert first is not None
    assert first.count == 10
    assert first.mean == pytest.approx(0.18)
    assert first.quantiles[0.5] == pytest.approx(0.1 + 0.1 * 5 / 8)
    assert first.quantiles[0.9] == pytest.approx(0.3)
    assert found.inter_token_latency is None  # nothing in it yet


def test_beyond_the_last_bound_a_quantile_is_that_bound() -> None:
    text = TEXT.replace('le="0.4",model_name="m"} 10.0', 'le="0.4",model_name="m"} 8.0')
    found = parse(text).time_to_first_token
    assert found is not None
    assert found.quantiles[0.99] == 0.4


def test_rates_are_those_between_two_snapshots_and_since_a_restart() -> None:
    before = parse(TEXT, epoch=1)
    after = dataclasses.replace(
        before, at=before.at + 10, generation_tokens=1500, prefix_cache_queries=300, prefix_cache_hits=150
    )
    rates = after.since(before)
    assert rates.seconds == pytest.approx(10)
    assert rates.generation_tokens_per_s == pytest.approx(50)
    assert rates.prefix_cache_hit_rate == 1.0
    assert rates.requests_per_s == 0
    assert rates.prompt_tokens_per_s is None  # not told
    restarted = dataclasses.replace(after, epoch=2, generation_tokens=100)
    assert restarted.since(before).generation_tokens_per_s == pytest.approx(10)
    assert before.since(before).generation_tokens_per_s is None  # no time


def test_several_are_added_up_and_told_one_by_one() -> None:
    found = together({4: TEXT, 7: TEXT})
    alone = parse(TEXT)
    assert (found.epoch, [one.epoch for one in found.replicas]) == (7, [4, 7])
    assert found.generation_tokens == 2 * (alone.generation_tokens or 0)
    assert found.kv_cache_usage == alone.kv_cache_usage
    assert found.requests == {reason: 2 * count for reason, count in alone.requests.items()}
    first, both = alone.time_to_first_token, found.time_to_first_token
    assert first is not None
    assert both is not None
    assert (both.count, both.quantiles) == (2 * first.count, first.quantiles)


def test_rates_of_several_leave_out_what_ended_with_a_replica() -> None:
    before = together({1: TEXT, 2: TEXT})
    kept, lost = before.replicas
    begun = dataclasses.replace(lost, epoch=3, generation_tokens=20)
    went_on = dataclasses.replace(kept, generation_tokens=(kept.generation_tokens or 0) + 30)
    after = dataclasses.replace(before, at=before.at + 10, epoch=3, replicas=(went_on, begun))
    assert after.since(before).generation_tokens_per_s == pytest.approx(5)


def test_a_histogram_without_buckets_has_no_quantiles() -> None:
    found = parse("# TYPE vllm:request_queue_time_seconds summary\n" + "vllm:request_queue_time_seconds_count 2\n")
    assert isinstance(found.queue_time, Distribution)
    assert all(math.isnan(value) for value in found.queue_time.quantiles.values())


def test_a_handle_has_the_metrics_of_its_server(home: Path) -> None:
    with ManagedVLLM("stand-in", command=standin.command(), keep_alive=INSTANT) as llm:
        before = llm.metrics()
        llm.generate([[1, 2, 3]], max_tokens=20)
        after = llm.metrics()
        assert isinstance(after, ServerMetrics)
        assert (after.running, after.waiting, after.epoch) == (0, 0, 1)
        assert after.generation_tokens is not None
        assert after.generation_tokens - (before.generation_tokens or 0) == 20


def test_a_server_without_metrics_is_said() -> None:
    server = Script(says({"error": {"message": "Not Found", "code": 404}}, 404))
    with client_of(server) as client, pytest.raises(UnsupportedMethodError, match="the server has no /metrics"):
        client.metrics()
    server.close()
