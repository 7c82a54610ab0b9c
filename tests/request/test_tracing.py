"""OpenTelemetry spans of requests, episodes and steps, each within what it belongs to; none where nobody asks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
from acting_server import acting
from counting_world import CountingWorld, right, tasks
from processes import INSTANT
from scripted_server import ANSWER, Script, client_of, says

from managed_vllm import ManagedVLLM
from managed_vllm.agent import run_episode, ui_tars
from managed_vllm.errors import BadRequestError

otel = pytest.importorskip("opentelemetry.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
sdk = pytest.importorskip("opentelemetry.sdk.trace")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What is exported by a provider that is the program's for as long as the test runs."""
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(otel, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def test_a_request_is_a_span_and_the_server_is_told_of_it(spans: Any) -> None:
    server = Script(says({**ANSWER, "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}))
    with client_of(server) as client, otel.get_tracer_provider().get_tracer("t").start_as_current_span("mine") as mine:
        client.generate("x", {"max_tokens": 7, "temperature": 0})
    span, outer = spans.get_finished_spans()
    assert (span.name, span.kind) == ("text_completion m", otel.SpanKind.CLIENT)
    assert span.parent.span_id == outer.context.span_id
    assert outer.context.span_id == mine.get_span_context().span_id
    told = dict(span.attributes)
    assert told["gen_ai.operation.name"] == "text_completion"
    assert (told["gen_ai.request.model"], told["gen_ai.request.max_tokens"]) == ("m", 7)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 1)
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert (told["server.address"], told["managed_vllm.attempts"]) == ("127.0.0.1", 1)
    assert not [value for value in told.values() if value == "x"]
    (headers,) = server.headers
    assert (
        headers["traceparent"]
        == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
    )
    server.close()


def test_a_generation_that_goes_on_after_a_loss_has_an_event_of_it(spans: Any, home: Path, tmp_path: Path) -> None:
    env = standin.orders(faults=str(tmp_path))
    (tmp_path / "1-halfstream").touch()
    with ManagedVLLM("stand-in", command=standin.command(), env=env, keep_alive=INSTANT) as llm:
        (output,) = llm.generate("go on", {"max_tokens": 200, "temperature": 0}, resume=True)
    assert output.resumed_tokens > 0
    (span,) = spans.get_finished_spans()
    assert [event.name for event in span.events] == ["managed_vllm.response_lost", "managed_vllm.resumed"]
    assert span.events[1].attributes["managed_vllm.kept_tokens"] == output.resumed_tokens
    assert span.attributes["managed_vllm.attempts"] == output.attempts
    assert span.status.is_ok


def test_an_error_is_recorded(spans: Any) -> None:
    server = Script(says({"error": {"message": "no such thing", "code": 400}}, 400))
    with client_of(server) as client, pytest.raises(BadRequestError):
        client.chat([{"role": "user", "content": "x"}])
    (span,) = spans.get_finished_spans()
    assert (span.name, span.status.status_code) == ("chat m", otel.StatusCode.ERROR)
    assert span.attributes["error.type"] == "BadRequestError"
    assert [event.name for event in span.events] == ["exception"]
    server.close()


def test_requests_are_within_steps_within_their_episode(spans: Any) -> None:
    async def play(server: Any) -> None:
        async with server.client() as client:
            agent = ui_tars("absolute", show_text=True)
            await run_episode(client, CountingWorld(), tasks(1)[0], agent=agent, sampling_params={"max_tokens": 200})

    with acting(right) as server:
        asyncio.run(play(server))
    found = spans.get_finished_spans()
    (episode,) = [span for span in found if span.name.startswith("invoke_agent")]
    steps = [span for span in found if span.name == "step"]
    asked = [span for span in found if span.name.startswith("chat ")]
    assert {step.parent.span_id for step in steps} == {episode.context.span_id}
    assert {one.parent.span_id for one in asked} == {step.context.span_id for step in steps}
    assert [step.attributes["managed_vllm.step"] for step in steps] == [0, 1, 2]
    told = episode.attributes
    assert (told["managed_vllm.reward"], told["managed_vllm.stop_reason"]) == (1.0, "finished")


def test_an_episode_that_fails_is_marked(spans: Any) -> None:
    def fault(world: Any, call: str) -> None:
        if call == "step":
            raise RuntimeError("broken")

    async def play(server: Any) -> None:
        async with server.client() as client:
            await run_episode(client, CountingWorld(fault), tasks(1)[0], agent=ui_tars("absolute", show_text=True))

    with acting(right) as server:
        asyncio.run(play(server))
    (episode,) = [span for span in spans.get_finished_spans() if span.name.startswith("invoke_agent")]
    assert episode.attributes["error.type"] == "RuntimeError"
    assert "broken" in episode.status.description


@pytest.mark.parametrize("imported", ["", "import opentelemetry.trace\n"])
def test_without_a_provider_nothing_is_imported_and_nothing_is_made(imported: str, script: Any) -> None:
    server = script(says(ANSWER))
    code = f"""
import sys
{imported}from managed_vllm import VLLMClient
with VLLMClient({server.url!r}, "key", "m") as client:
    client.generate("x")
print([name for name in sys.modules if name.startswith("opentelemetry.sdk") or name == "opentelemetry.propagate"])
print("opentelemetry.trace" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["[]", str(bool(imported))], done.stderr
    assert "traceparent" not in server.headers[0]
