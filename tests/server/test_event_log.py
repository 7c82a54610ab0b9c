"""events.jsonl: every event on a line of its own, and an end to its size."""

from __future__ import annotations

import json
from pathlib import Path

from managed_vllm.server import event_log


def test_events_are_lines_and_a_full_file_becomes_the_older_one(tmp_path: Path) -> None:
    path, older = tmp_path / "events.jsonl", tmp_path / "events.jsonl.1"
    text = "x" * (event_log.KEPT_BYTES // 8)
    for number in range(20):
        event_log.append(path, {"number": number, "text": text})
    assert older.stat().st_size < 1.5 * event_log.KEPT_BYTES
    kept = [json.loads(line)["number"] for file in (older, path) for line in file.read_text().splitlines()]
    assert kept == list(range(kept[0], 20))
    assert len(list(tmp_path.iterdir())) == 2


def test_an_event_that_cannot_be_written_is_lost(tmp_path: Path) -> None:
    event_log.append(tmp_path / "nowhere" / "events.jsonl", {"state": "ready"})
    event_log.append(Path("/dev/null"), {"state": "ready"})
    assert list(tmp_path.iterdir()) == []
