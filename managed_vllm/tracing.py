"""OpenTelemetry spans of requests, episodes and steps, where the program has given OpenTelemetry a tracer provider.

Nothing of OpenTelemetry is imported here: whoever sets a provider has imported it. Names and attributes are those of
its conventions for generative AI; what these have no name for begins with `managed_vllm.`. None of them has prompts,
answers or keys.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/inference/v1/generate": "text_completion",
    "/v1/embeddings": "embeddings",
}
_PARAMETERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "stream": "gen_ai.request.stream",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}
"""What is told of a request's body, where it is a number."""


def is_on() -> bool:
    """Whether the program has set a tracer provider."""
    return _provider() is not None


def headers() -> dict[str, str]:
    """What goes with an HTTP request so that the server's span becomes a child of the current one: `traceparent`."""
    if _provider() is None:
        return {}
    found: dict[str, str] = {}
    importlib.import_module("opentelemetry.propagate").inject(found)
    return found


class RequestSpan:
    """The span of one request, from before its turn to its answer, whatever is lost in between. Enter it."""

    def __init__(self, tracer: Any) -> None:
        self._span = tracer.start_span("request", kind=_trace().SpanKind.CLIENT)
        self._current = _trace().use_span(self._span, record_exception=False, set_status_on_exception=False)

    def __enter__(self) -> Self:
        self._current.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _record(self._span, error)
        self._current.__exit__(kind, error, traceback)
        self._span.end()

    def sending(self, path: str, body: Mapping[str, Any] | None, model: str, base_url: str) -> None:
        """An HTTP request is about to be sent: for the first time, or after a loss."""
        url = urlsplit(base_url)
        told: dict[str, Any] = {"server.address": url.hostname, "server.port": url.port}
        if body is None:
            self._span.update_name(f"GET {path.partition('?')[0]}")
        else:
            model, operation = str(body.get("model") or model), _OPERATIONS.get(path) or path.rpartition("/")[2]
            self._span.update_name(f"{operation} {model}")
            told |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm", "gen_ai.request.model": model}
            numbers = {name: body.get(field) for field, name in _PARAMETERS.items()}
            told |= {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        self._span.set_attributes({name: value for name, value in told.items() if value is not None})

    def lost(self, error: Exception, kept: int) -> None:
        """A response was lost after `kept` tokens, which are not generated again."""
        event = {"error.type": type(error).__name__, "exception.message": str(error), "managed_vllm.kept_tokens": kept}
        self._span.add_event("managed_vllm.response_lost", event)

    def resumed(self, attempt: int, epoch: int, kept: int) -> None:
        """It is sent again, for what follows the `kept` tokens."""
        event = {"managed_vllm.attempt": attempt, "managed_vllm.epoch": epoch, "managed_vllm.kept_tokens": kept}
        self._span.add_event("managed_vllm.resumed" if kept else "managed_vllm.sent_again", event)

    def answered(self, answer: Mapping[str, Any], attempts: int, epoch: int, first_token_s: float | None) -> None:
        """The answer is complete."""
        usage, choices = answer.get("usage"), answer.get("choices")
        told: dict[str, Any] = {
            "gen_ai.response.id": answer.get("id"),
            "gen_ai.response.model": answer.get("model"),
            "gen_ai.response.time_to_first_chunk": first_token_s,
            "managed_vllm.attempts": attempts,
            "managed_vllm.epoch": epoch,
        }
        if isinstance(usage, Mapping):
            told["gen_ai.usage.input_tokens"] = usage.get("prompt_tokens")
            told["gen_ai.usage.output_tokens"] = usage.get("completion_tokens")
        if isinstance(choices, list):
            reasons = [str(one.get("finish_reason")) for one in choices if isinstance(one, Mapping)]
            told["gen_ai.response.finish_reasons"] = reasons
        self._span.set_attributes({name: value for name, value in told.items() if value is not None})


def request_span() -> RequestSpan | None:
    """A request's span; None where nobody wants it."""
    tracer = _tracer()
    return None if tracer is None else RequestSpan(tracer)


class _Told:
    """What an episode or a step tells of itself."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def tell(self, error: tuple[str, str] | None = None, **attributes: Any) -> None:
        """Attributes, without `managed_vllm.`; `error` (class and message) marks the span as failed."""
        told = {f"managed_vllm.{name}": value for name, value in attributes.items() if value is not None}
        self._span.set_attributes(told)
        if error is not None:
            self._span.set_attribute("error.type", error[0])
            self._span.set_status(_trace().StatusCode.ERROR, error[1])


class _Untold:
    """Where nobody wants to know."""

    def tell(self, error: tuple[str, str] | None = None, **attributes: Any) -> None:
        """Nothing."""


_NOBODY: AbstractContextManager[_Told | _Untold] = nullcontext(_Untold())


def episode_span(task: str, rollout: int, attempt: int) -> AbstractContextManager[_Told | _Untold]:
    """The span of an episode, in which those of its steps and requests are."""
    told = {"gen_ai.operation.name": "invoke_agent", "gen_ai.conversation.id": f"{task}/{rollout}/{attempt}"}
    numbers = {"managed_vllm.task": task, "managed_vllm.rollout": rollout, "managed_vllm.attempt": attempt}
    return _span(f"invoke_agent {task}", {**told, **numbers})


def step_span(index: int) -> AbstractContextManager[_Told | _Untold]:
    """The span of one step: an answer, and what is done with it."""
    return _span("step", {"managed_vllm.step": index})


def _span(name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[_Told | _Untold]:
    tracer = _tracer()
    return _NOBODY if tracer is None else _entered(tracer, name, attributes)


@contextlib.contextmanager
def _entered(tracer: Any, name: str, attributes: Mapping[str, Any]) -> Iterator[_Told]:
    with tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        yield _Told(span)


def _record(span: Any, error: BaseException | None) -> None:
    """Marks a span as failed by its error; a task that was cancelled has no error."""
    if error is None:
        return
    span.set_attribute("error.type", type(error).__name__)
    if isinstance(error, Exception):
        span.record_exception(error)
        span.set_status(_trace().StatusCode.ERROR, str(error))


def _tracer() -> Any:
    provider = _provider()
    return None if provider is None else provider.get_tracer("managed_vllm")


def _provider() -> Any:
    """The tracer provider; None as long as the program has not set one, or not even imported OpenTelemetry."""
    trace = _trace()
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider


def _trace() -> Any:
    return sys.modules.get("opentelemetry.trace")
