"""Recorded runs of agents: `managed-vllm view` looks at one, `managed-vllm export` hands one to a trainer."""

from __future__ import annotations

import argparse
import contextlib
import sys
import webbrowser
from pathlib import Path

from managed_vllm.agent import export as exports
from managed_vllm.agent.report import printable, summary_table
from managed_vllm.agent.store import RunStore
from managed_vllm.agent.viewer import RunServer, write_html
from managed_vllm.cli.running import console
from managed_vllm.cli.serve import terminable
from managed_vllm.errors import ConfigError


def view(given: argparse.Namespace) -> int:
    """`managed-vllm view`."""
    if given.serve:
        return _serve(given)
    if given.against is not None:
        raise ConfigError("--against compares runs in the browser: give --serve, too", field="against")
    folder = Path(given.folder)
    with RunStore.open(folder) as store:
        out = folder / "view.html" if given.out is None else Path(given.out)
        title = folder.absolute().name if given.title is None else given.title
        page = write_html(store, out, title=title, max_bytes=given.max_mb * 10**6, success_at=given.success_at)
    console().print(summary_table(page.rows, by=given.by, success_at=given.success_at, title=title))
    print(printable(str(page)))
    if given.open and not webbrowser.open(page.path.absolute().as_uri()):
        print(f"error: no browser was found here; open {page.path} yourself", file=sys.stderr)
        return 1
    return 0


def _serve(given: argparse.Namespace) -> int:
    with (
        RunStore.open(given.folder) as store,
        contextlib.nullcontext() if given.against is None else RunStore.open(given.against) as against,
        contextlib.closing(
            RunServer(store, port=given.port, title=given.title, success_at=given.success_at, against=against)
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
    with RunStore.open(given.folder) as store:
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
