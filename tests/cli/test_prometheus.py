"""Prometheus itself, where it is installed: it scrapes by the page's configuration, and promtool has nothing to say.

Without it, its own parser in Python reads the same text (`test_looks`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import standin
from free_ports import free_port
from processes import HANG_S, eventually

from managed_vllm import ManagedVLLM
from managed_vllm.cli.metrics import MetricsServer, exposition

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "monitoring.md"


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return found


def test_promtool_has_nothing_to_say_of_our_metrics(home: Path) -> None:
    promtool = program("promtool")
    with ManagedVLLM("m", command=standin.command(), keep_alive=0) as llm:
        llm.generate("x", {"max_tokens": 5})
        llm.restart()
        text = exposition(home)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=HANG_S)
    said = (done.stdout + done.stderr).decode().splitlines()
    # vLLM's own names have colons, and one of its histograms ends in _total.
    assert [line for line in said if not line.startswith("vllm:")] == []


@pytest.fixture
def metrics_server(home: Path) -> Iterator[MetricsServer]:
    with MetricsServer(home, "geheim", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_prometheus_scrapes_by_the_configuration_of_the_page(
    home: Path, metrics_server: MetricsServer, tmp_path: Path
) -> None:
    binary, port = program("prometheus"), free_port()
    with ManagedVLLM("m", command=standin.command(), keep_alive=0) as llm:
        (tmp_path / "key").write_text("geheim\n")
        words = [
            binary,
            f"--config.file={_configuration(tmp_path, metrics_server.server_address[1])}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with open(tmp_path / "prometheus.log", "w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            eventually(lambda: _asked(port, "up") == {"": "1"}, "scraped")
            assert _asked(port, "managed_vllm_leases") == {llm.id: "1"}
            assert _asked(port, "vllm:num_requests_running") == {llm.id: "0"}
        finally:
            process.terminate()
            process.wait(HANG_S)


def _configuration(folder: Path, port: int) -> Path:
    """The page's, with this test's port and key, and without waiting."""
    page = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if ":9464" in text)
    text = page.replace(":9464", f":{port}").replace("/home/me/.metrics-key", str(folder / "key"))
    path = folder / "prometheus.yml"
    path.write_text(f"global: {{scrape_interval: 1s}}\n{text}")
    return path


def _asked(port: int, query: str) -> dict[str, Any]:
    """The value by server."""
    try:
        url = f"http://127.0.0.1:{port}/api/v1/query"
        answer = requests.get(url, {"query": query}, timeout=HANG_S).json()
    except (requests.RequestException, ValueError):  # it has not come up yet
        return {}
    return {one["metric"].get("server", ""): one["value"][1] for one in answer.get("data", {}).get("result", ())}
