"""A hook of mkdocs: links to files outside of docs/ lead to the source repository.

The pages are read in two places. In the repository `../benchmarks/README.md` is right as it stands; the site has only
what is in docs/, so there the same link becomes one to the file on the server of the repository.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<=\]\()(\.\./[^)\s]*)(?=\))")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text before it is rendered."""
    return with_source_links(markdown, page.file.src_uri, config["extra"]["source_url"])


def with_source_links(markdown: str, page: str, source_url: str) -> str:
    """The text with links out of docs/ made absolute. `page` is the path of its file within docs/."""

    def target(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[1]))
        return match[1] if path.startswith("docs/") else source_url + path

    return _LINK.sub(target, markdown)
