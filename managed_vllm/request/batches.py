"""The requests of one call, run side by side; their outputs in order, their errors, and a progress bar."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from managed_vllm.errors import ManagedVLLMError, RequestError, RequestTimeoutError
from managed_vllm.request.arguments import ProgressBar
from managed_vllm.request.bounds import NOT_SENT
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.standard_error import StandardError

T = TypeVar("T")


async def run_batch(
    one: Callable[[int], Awaitable[T]],
    count: int,
    *,
    single: bool,
    at_once: int,
    return_exceptions: bool,
    use_tqdm: ProgressBar,
    instance: Callable[[], str | None],
    deadline: float | None = None,
) -> list[T]:
    """The results of `one(index)`, in order.

    Args:
        one: makes one request.
        count: how many there are.
        single: whether the caller asked for one, not for a list; its error has no index then.
        at_once: how many run side by side, at most.
        return_exceptions: put errors in their places. Otherwise the first is raised when all requests are done, with
            the outcome of each in its `results`.
        use_tqdm: whether to show a progress bar, or a function that makes one.
        instance: the server's short id, for errors.
        deadline: on the monotonic clock: what has not begun by then is not prepared any more.
    """
    results: list[Any] = [None] * count
    indices = iter(range(count))
    failed: list[int] = []

    async def work() -> None:
        for index in indices:
            try:
                with named(None if single else index, instance):
                    _check(deadline)
                    results[index] = await one(index)
            except ManagedVLLMError as error:
                results[index] = error
                failed.append(index)
            if bar is not None:
                bar.add(results[index])

    with _Bar.of(use_tqdm, count) as bar:
        if count == 1:
            await work()
        else:
            await _side_by_side(work, min(count, at_once))
    if failed and not return_exceptions:
        first: ManagedVLLMError = results[min(failed)]
        first.results = None if single else results
        raise first
    return results


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise RequestTimeoutError(NOT_SENT)


@contextlib.contextmanager
def named(index: int | None, instance: Callable[[], str | None]) -> Iterator[None]:
    """Adds to a `RequestError` which request of a batch it is of, and which server."""
    try:
        yield
    except RequestError as error:
        error.index = index if error.index is None else error.index
        error.instance = error.instance or instance()
        raise


async def _side_by_side(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    tasks = [asyncio.create_task(work()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Bar:
    """A progress bar with token rates, as vLLM shows it."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._started = time.monotonic()
        self._tokens = [0, 0]

    @classmethod
    @contextlib.contextmanager
    def of(cls, use_tqdm: ProgressBar, count: int) -> Iterator[_Bar | None]:
        if not use_tqdm:
            yield None
            return
        make: Any = use_tqdm
        if not callable(use_tqdm):
            from tqdm.auto import tqdm

            make = functools.partial(tqdm, file=StandardError())
        with contextlib.closing(make(total=count, desc="Processed prompts", dynamic_ncols=True)) as bar:
            yield cls(bar)

    def add(self, result: Any) -> None:
        if isinstance(result, RequestOutput):
            self._tokens[0] += len(result.prompt_token_ids)
            self._tokens[1] += sum(len(one.token_ids) for one in result.outputs)
            took = max(1e-3, time.monotonic() - self._started)
            speed = [tokens / took for tokens in self._tokens]
            if hasattr(self._bar, "set_postfix_str"):
                rates = f"est. speed input: {speed[0]:.2f} toks/s, output: {speed[1]:.2f} toks/s"
                self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(1)
