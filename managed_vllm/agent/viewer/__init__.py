"""The viewer: a run as one HTML file that needs nothing else, neither a server nor a network.

`write_html` makes it. `page` writes the file, `record` turns trajectories into what it holds, and `template.html.j2`,
`viewer.css` and `viewer.js` are the page. What models and environments say is data in it, never markup: the records are
JSON in `<script type="application/json">`, shown through `textContent`, and the page's content security policy lets no
other script run and nothing be fetched.
"""

from __future__ import annotations

from managed_vllm.agent.viewer.page import MAX_BYTES, WrittenPage, write_html

__all__ = ["MAX_BYTES", "WrittenPage", "write_html"]
