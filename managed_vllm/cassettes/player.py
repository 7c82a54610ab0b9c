"""Finding the recorded response to a request.

Each test has its own recordings, which it gets in the order in which they were recorded: the second time that it asks
the same it gets the second answer, and after the last one there is none. A request that its test has not recorded may
be that of a fixture, which ran within another test then: so those of all tests count next, in the order of the file. A
GET is of the server rather than of a test, and may be asked any number of times.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence

from managed_vllm.cassettes.cassette import Cassette, Interaction, Response
from managed_vllm.cassettes.requests import difference, key_of, nearest
from managed_vllm.errors import CassetteMissError


class Player:
    """Plays what was recorded of one server. Thread-safe."""

    def __init__(self, cassette: Cassette, server: str, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._played: Counter[tuple[str, str]] = Counter()
        self._by_key: dict[str, list[Interaction]] = defaultdict(list)
        for each in cassette.interactions:
            if each.server == server:
                self._by_key[key_of(each.request)].append(each)

    def begin(self, test: str) -> None:
        """A test begins, perhaps once more: its recordings are played from the first on."""
        with self._lock:
            for played in [each for each in self._played if each[0] == test]:
                del self._played[played]

    def play(self, test: str, request: dict[str, object]) -> Response | None:
        """The response that is next for this request; None: there is none."""
        key = key_of(request)
        recorded = self._by_key.get(key, [])
        own = [each for each in recorded if each.test == test]
        candidates: Sequence[Interaction] = own or recorded
        if not candidates:
            return None
        if request["method"] == "GET":
            return candidates[-1].response
        with self._lock:
            place = self._played[test, key]
            if place >= len(candidates):
                return None
            self._played[test, key] += 1
        return candidates[place].response

    def miss(self, test: str, request: dict[str, object]) -> CassetteMissError:
        """The error for a request that has no response: which recorded one is nearest, and how it differs."""
        asked = f"{request['method']} {request['path']}"
        recorded = self._by_key.get(key_of(request), [])
        if recorded:
            times = len([each for each in recorded if each.test == test] or recorded)
            said = f"{asked} was recorded {times} times in {self._path}, and is asked once more"
            return CassetteMissError(f"{said}{_HINT}")
        everything = [each for several in self._by_key.values() for each in several]
        everything.sort(key=lambda each: each.test != test)
        near = nearest(request, (each.request for each in everything))
        said = f"{asked} of {test or 'no test'} was not recorded in {self._path}{_HINT}"
        if near is None:
            return CassetteMissError(f"{said}\nNothing was recorded for this route.")
        return CassetteMissError(f"{said}\nThe nearest recorded request:\n{difference(request, near)}")


_HINT = "; --managed-vllm-record records it"
