"""Recorded runs of agents: `managed-vllm view` looks at one, `export` hands one to a trainer, `rescore` scores one."""

from __future__ import annotations

import argparse
import contextlib
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from managed_vllm.agent import export as exports
from managed_vllm.agent import rescoring
from managed_vllm.agent.imports import imported
from managed_vllm.agent.report import Row, entry_row, passes, printable, summary_table
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.viewer import RunServer, write_html
from managed_vllm.cli.running import console
from managed_vllm.cli.serve import terminable


def view(given: argparse.Namespace) -> int:
    """`managed-vllm view`."""
    if given.serve:
        return _serve(given)
    folder = Path(given.folder)
    with RunStore.open(folder, score=given.score) as store:
        out = folder / "view.html" if given.out is None else Path(given.out)
        title = _title(given)
        with _other(given) as against:
            options = {"title": title, "success_at": given.success_at, "against": against}
            page = write_html(store, out, max_bytes=given.max_mb * 10**6, **options)
    console().print(summary_table(page.rows, by=given.by, success_at=given.success_at, title=title))
    _print_passes(page.rows, given.success_at)
    print(printable(str(page)))
    if given.open and not webbrowser.open(page.path.absolute().as_uri()):
        print(f"error: no browser was found here; open {page.path} yourself", file=sys.stderr)
        return 1
    return 0


def _other(given: argparse.Namespace) -> contextlib.AbstractContextManager[RunStore | None]:
    return contextlib.nullcontext() if given.against is None else RunStore.open(given.against)


def _title(given: argparse.Namespace) -> str:
    """Of the page; the score that stands in the rewards' place is named in it."""
    if given.title is not None:
        return str(given.title)
    name = Path(given.folder).absolute().name
    return name if given.score is None else f"{name}, scored by {given.score}"


def _print_passes(made: Iterable[Row], success_at: float) -> None:
    found = passes(made, success_at)
    if found and found[-1][0] > 1:
        print("  ".join(f"pass@{k} {share:.1%}" for k, share in found))


def _serve(given: argparse.Namespace) -> int:
    with (
        RunStore.open(given.folder, score=given.score) as store,
        _other(given) as against,
        contextlib.closing(
            RunServer(store, port=given.port, title=_title(given), success_at=given.success_at, against=against)
        ) as server,
        terminable(),
    ):
        print(f"serving {len(store)} attempts at {server.url}", flush=True)
        print("  for whoever has this address, on this machine; Ctrl-C ends it", flush=True)
        if given.open:
            webbrowser.open(server.url)
        server.serve_forever()
    return 0


def export(given: argparse.Namespace) -> int:
    """`managed-vllm export`."""
    with RunStore.open(given.folder, score=given.score) as store:
        report = exports.export(
            store, given.to, given.out, per=given.per, logprobs=given.logprobs, include=given.include
        )
    print(
        f"{report.path}: {report.trajectories} trajectories as {report.samples} samples for {report.format}, "
        f"{report.images} images"
    )
    for why, number in report.cuts.items():
        print(f"  not joined: {number} times: {why}")
    for why, number in report.left_out.items():
        print(f"  left out: {number} {printable(why)}")
    if not report.trajectories:
        print("error: nothing of this run could be exported; `managed-vllm view` shows why", file=sys.stderr)
        return 1
    return 0


def rescore(given: argparse.Namespace) -> int:
    """`managed-vllm rescore`. 1: some attempts could not be scored."""
    reward = imported(given.reward, field="reward")
    folder = Path(given.folder)
    with RunStore.open(folder) as store, _progress() as on_scored:
        report = rescoring.rescore(
            store,
            reward,
            name=given.name,
            overwrite=given.overwrite,
            max_concurrency=given.max_concurrency,
            timeout_s=given.timeout,
            on_scored=on_scored,
        )
        before = store.summary().mean_reward
    with RunStore.open(folder, score=report.name) as store:
        made = [entry_row(entry) for entry in store.counting()]
        now = store.summary().mean_reward
    title = f"{folder.absolute().name}, scored by {report.name}"
    console().print(summary_table(made, by="task", success_at=given.success_at, max_rows=20, title=title))
    _print_passes(made, given.success_at)
    print(f"mean reward {_shown(now)}, recorded {_shown(before)}")
    print(
        f"{report.path}: {report.scored} attempts scored, {report.kept} kept; {report.left_out} left out, they failed"
    )
    print(f"  look:  managed-vllm view {folder} --score {report.name}")
    for failure in report.failures:
        print(f"error: {printable(failure)}", file=sys.stderr)
    if report.failed:
        print(f"error: {report.failed} attempts have no score; the same command tries them again", file=sys.stderr)
    return 1 if report.failed else 0


def _shown(reward: float | None) -> str:
    return "unknown" if reward is None else f"{reward:.3f}"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar, where somebody sees it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
