"""The viewer: a run as one HTML file that needs nothing else, neither a server nor a network; or served, live.

`write_html` makes the file; `RunServer` serves a run of any size page by page, in the same page (`server`, `table`,
`served.js`). `page` writes the file, `record` turns trajectories into what it holds, and `template.html.j2`,
`viewer.css` and `viewer.js` are the page. What models and environments say is data in it, never markup: the records are
JSON in `<script type="application/json">`, shown through `textContent`, and the page's content security policy lets no
other script run and nothing be fetched.
"""

from __future__ import annotations

from managed_vllm.agent.viewer.page import MAX_BYTES, WrittenPage, write_html
from managed_vllm.agent.viewer.server import RunServer

__all__ = ["MAX_BYTES", "RunServer", "WrittenPage", "write_html"]
