"""Claims of a run's writers: which of them plays a rollout, so that no two do.

    claims/ab/<digest of task and rollout>.0    the first claim, a hard link to its writer's token
    claims/ab/<…>.1                             the second, made after the writer of the first had died or let go
    claims/ab/<…>.0.free, <…>.0.failed          its writer let go; or will not play it any more, it failed for good

A rollout belongs to its claim of the highest number. Claims are only ever added, each by one `link`, which one writer
gets; none is removed or renamed, so that nobody can take away a claim other than the one that was looked at.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
from pathlib import Path

from managed_vllm.agent.image_store import unusable
from managed_vllm.agent.run_writers import RunWriter, read_token

CLAIMS = "claims"
_FREE, _FAILED = ".free", ".failed"

Key = tuple[str, int]


class Claim(enum.Enum):
    """What became of a wish to play a rollout."""

    OURS = enum.auto()
    """Nobody has ever claimed it: play it."""

    INHERITED = enum.auto()
    """Ours now, after another one's: look first whether that one has finished it."""

    HELD = enum.auto()
    """Another living writer plays it."""

    FAILED = enum.auto()
    """Another living writer has played it as often as it may; it failed for good."""


class Claims:
    """One writer's claims. Thread-safe. Raises `RunStoreError` where the folder can't be used."""

    def __init__(self, run: Path, writer: RunWriter) -> None:
        self._folder = run / CLAIMS
        self._writer = writer
        self._mutex = threading.Lock()
        self._held: dict[Key, tuple[Path, int]] = {}

    @property
    def token(self) -> Path:
        """The writer's own file, see `RunWriter.token`."""
        return self._writer.token

    def take(self, key: Key) -> Claim:
        """Claims a rollout. It stays ours until `finished`, `failed` or `let_go`."""
        with self._mutex:
            if key in self._held:
                return Claim.HELD
            stem = self._stem(key)
            number = 0
            while True:
                lapses = self._writer.lapses
                claim = stem.with_name(f"{stem.name}.{number}")
                if self._writer.link(claim):
                    self._held[key] = claim, lapses
                    return Claim.INHERITED if number else Claim.OURS
                found = self._look(key, claim)
                if found is not None:
                    return found
                number += 1

    def _look(self, key: Key, claim: Path) -> Claim | None:
        """What a claim that is there means for us; None: its writer has gone, or let go of it."""
        owner = read_token(claim)
        if owner is None or _marked(claim, _FREE):
            return None
        if owner.writer == self._writer.id:  # of an earlier run in this process
            if _marked(claim, _FAILED) or _marked(_next(claim)):
                return None
            self._held[key] = claim, self._writer.lapses
            return Claim.INHERITED
        if self._writer.is_gone(owner):
            return None
        return Claim.FAILED if _marked(claim, _FAILED) else Claim.HELD

    def still_ours(self, key: Key) -> bool:
        """Whether nobody has taken the rollout over. Costs nothing as long as the lease was renewed in time."""
        with self._mutex:
            held = self._held.get(key)
            if held is None:
                return True  # appended by hand
            claim, lapses = held
            if self._writer.lapses != lapses and _marked(_next(claim)):
                del self._held[key]
                return False
            return True

    def finished(self, key: Key) -> None:
        """It is in the store, and need not be played again."""
        with self._mutex:
            self._held.pop(key, None)

    def failed(self, key: Key) -> None:
        """It will not be played again here; others need not wait for it."""
        self._mark(key, _FAILED)

    def let_go(self, key: Key | None = None) -> None:
        """Others may have it at once; None: all that is held."""
        with self._mutex:
            keys = list(self._held) if key is None else [key]
        for each in keys:
            self._mark(each, _FREE)

    def _mark(self, key: Key, mark: str) -> None:
        with self._mutex:
            held = self._held.pop(key, None)
        if held is not None:
            self._writer.link(Path(f"{held[0]}{mark}"))

    def _stem(self, key: Key) -> Path:
        # Without the surrogates that a task's id may have: as JSON it is ASCII.
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]
        return self._folder / digest[:2] / digest[2:]


def _next(claim: Path) -> Path:
    return claim.with_suffix(f".{int(claim.suffix[1:]) + 1}")


def _marked(claim: Path, mark: str = "") -> bool:
    """By opening it: NFS asks its server then."""
    path = Path(f"{claim}{mark}")
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unusable(path, error) from error
    return True
