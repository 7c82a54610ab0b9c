"""supervisor.log has an end to its size, and what is said without the logger is in it, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from managed_vllm.server.supervisor_log import KEPT_BYTES

_SAYS = """
import logging, os, sys
from pathlib import Path
from managed_vllm.server.supervisor_log import BoundedLog, write_output_to
path = Path(sys.argv[1])
write_output_to(path)
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[BoundedLog(path)])
for number in range(int(sys.argv[2])):
    logging.info("%d %s", number, "x" * (1 << 20))
    if path.name == "moved.log":
        path.unlink(missing_ok=True)
        path.write_text("another's")
os.write(2, b"last words")
"""


def say(path: Path, records: int) -> None:
    done = subprocess.run([sys.executable, "-c", _SAYS, str(path), str(records)], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_full_log_becomes_the_older_one(tmp_path: Path) -> None:
    path, older = tmp_path / "supervisor.log", tmp_path / "supervisor.log.1"
    say(path, 14)
    assert sorted(tmp_path.iterdir()) == [path, older]
    assert older.stat().st_size < KEPT_BYTES + (2 << 20)
    lines = (older.read_text() + path.read_text()).splitlines()
    numbers = [int(line.partition(" ")[0]) for line in lines if line != "last words"]
    assert numbers == list(range(numbers[0], 14))
    assert lines[-1] == "last words"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_another_s_is_not_moved(tmp_path: Path) -> None:
    path = tmp_path / "moved.log"
    say(path, 6)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "another's"
