"""`managed-vllm doctor`: what keeps servers from starting here, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import sys

from managed_vllm.doctor import examine
from managed_vllm.doctor.findings import Finding, Level

_MARKS = {Level.OK: "ok", Level.WARNING: "warn", Level.ERROR: "ERROR"}
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}


def doctor(given: argparse.Namespace) -> int:
    """`managed-vllm doctor`. 1: a finding is an error that was not fixed."""
    python = os.path.abspath(os.path.expanduser(given.python)) if given.python else None
    findings, fixed = [], {}
    for finding in examine(python, network=not given.offline):
        findings.append(finding)
        if given.fix and finding.fix is not None:
            fixed[id(finding)] = finding.fix()
        if not given.json:
            _print(finding, fixed.get(id(finding)))
    if given.json:
        print(json.dumps([{**each.to_dict(), "fixed": fixed.get(id(each))} for each in findings], indent=2))
    else:
        _print_end(findings, fixed)
    return int(any(each.level is Level.ERROR and id(each) not in fixed for each in findings))


def _print(finding: Finding, fixed: str | None) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), highlight=False)
    mark = Text(f"{_MARKS[finding.level]:>5}", style=_STYLES[finding.level])
    text = Text(f"{finding.topic}: ", style="bold").append(finding.text, style="not bold")
    if sys.stdout.isatty():  # what is too long goes on below the text, not below the mark
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=5)
        grid.add_row(mark, text)
        console.print(grid)
    else:
        console.print(Text("  ").join([mark, text]))
    if fixed is not None:
        console.print(Padding(Text(f"fixed: {fixed}", style="green"), (0, 0, 0, 7)))
    elif finding.remedy:
        console.print(Padding(Text(f"→ {finding.remedy}"), (0, 0, 0, 7)))


def _print_end(findings: list[Finding], fixed: dict[int, str]) -> None:
    open_ones = [each for each in findings if id(each) not in fixed]
    errors = sum(each.level is Level.ERROR for each in open_ones)
    warnings = sum(each.level is Level.WARNING for each in open_ones)
    can = sum(each.fix is not None for each in open_ones)
    print(
        f"\n{_counted(len(findings), 'finding')}: {_counted(errors, 'error')}, {_counted(warnings, 'warning')}"
        + (f", {len(fixed)} fixed" if fixed else "")
    )
    if can:
        print(f"managed-vllm doctor --fix takes care of {can} of them.")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
