"""Pages of the documentation with tables that are made from the code: how one is written, and checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])


def with_parts(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts made anew, by name. Raises `ValueError` where a marker is missing."""
    for name, text in parts.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have the markers {begin} and {end} once each")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def main(page: Path, tool: str, updated: Callable[[str], str], about: str | None) -> int:
    """The program of a tool: writes the page anew, or says by its exit status (`--check`) that it is out of date."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0] if about else None)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if the page is out of date")
    check = parser.parse_args().check
    now = page.read_text(encoding="utf-8")
    wanted = updated(now)
    if wanted == now:
        return 0
    if check:
        print(f"docs/{page.name} is out of date; run: python tools/{tool}", file=sys.stderr)
        return 1
    page.write_text(wanted, encoding="utf-8")
    return 0
