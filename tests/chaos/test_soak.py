"""A server that runs for long, in short: its supervisor neither grows nor forgets to let go. For hours: `soak.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.soak import Soak, standin_scene


@pytest.mark.slow
def test_a_supervisor_stays_as_small_as_it_was(home: Path, tmp_path: Path) -> None:
    report = Soak(standin_scene(tmp_path, floods=False)).run(9)
    assert report.violations() == [], report.text()
