"""Which images a server holds: learned from answers, corrected by misses, and forgotten with each epoch."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from managed_vllm.request.bodies import RequestBody
from managed_vllm.request.server_images import ServerImages, is_miss

NO_CACHE = "Failed to apply Qwen2_5_VLProcessor on data={'images': [None]} with kwargs={'return_tensors': 'pt'}"
EVICTED = "Cache miss for image at index 3 but data is not provided."


@pytest.mark.parametrize(
    ("status", "message", "miss"),
    [
        (400, EVICTED, True),
        (400, NO_CACHE, True),
        (400, NO_CACHE.replace("[None]", "[<PIL.Image.Image image mode=RGB size=640x360>, None]"), True),
        (400, "1 validation error …\nimage_url\n  Input should be a valid dictionary [input_value=None", True),
        (500, EVICTED, False),
        (400, "At most 4 image(s) may be provided in one prompt. (parameter=image)", False),
        (400, "Failed to load image: cannot identify image file <_io.BytesIO object>", False),
        (400, NO_CACHE.replace("[None]", "[<PIL.Image.Image image mode=RGB size=1x1>]"), False),
        (500, "Internal server error", False),
    ],
)
def test_a_miss_is_told_from_other_errors(status: int, message: str, miss: bool) -> None:
    assert is_miss(status, message) is miss


def test_each_epoch_knows_what_it_was_given() -> None:
    images = ServerImages()
    assert "a" not in images.known(("url", 1))
    images.learn(("url", 1), ["a", "b"])
    assert "a" in images.known(("url", 1))
    assert "a" not in images.known(("url", 2))
    images.missed(("url", 1), ["a"], EVICTED)
    assert ("a" in images.known(("url", 1)), "b" in images.known(("url", 1))) == (False, True)
    images.missed(("url", 3), ["a"])
    assert "a" not in images.known(("url", 3))


def test_ids_and_epochs_are_bounded() -> None:
    images = ServerImages(max_images=3, max_servers=2)
    for epoch in range(4):
        images.learn(epoch, "abcd")
        images.learn(epoch, "b")
    assert [sum(uuid in images.known(epoch) for uuid in "abcd") for epoch in range(4)] == [0, 0, 3, 3]
    images.learn(3, "e")
    assert [uuid in images.known(3) for uuid in "bcde"] == [True, False, True, True]


def test_a_server_that_keeps_nothing_is_not_asked_again() -> None:
    images = ServerImages()
    images.learn(1, ["a"])
    images.missed(1, ["a"], NO_CACHE)
    images.learn(1, ["a", "b"])
    assert "b" not in images.known(1)
    images.learn(2, ["a"])
    assert "a" in images.known(2)


class Server:
    """Forgets the least recently used, as vLLM's cache does."""

    def __init__(self, holds: int) -> None:
        self._has: OrderedDict[str, None] = OrderedDict()
        self._holds = holds

    def answers(self, encoded: RequestBody) -> bool:
        if any(uuid not in self._has for uuid in encoded.as_ids):
            return False
        for uuid in encoded.uuids:
            self._has[uuid] = None
            self._has.move_to_end(uuid)
        while len(self._has) > self._holds:
            self._has.popitem(last=False)
        return True


def episodes(conversations: int, steps: int, *, others: int = 0, flushed_at: int | None = None) -> tuple[float, float]:
    """Each conversation has its last five images in view; returns the share of requests that missed, and of images
    that were sent as ids. `others` show the server so many other images between two requests."""
    rng = random.Random(5)
    server, images = Server(745), ServerImages()
    at = [0] * conversations
    misses = total = as_ids = 0
    for turn in range(conversations * steps):
        shown = 745 if turn == flushed_at else others
        server.answers(RequestBody((), tuple(f"of another {turn} {number}" for number in range(shown))))
        mine = rng.randrange(conversations)
        at[mine] += 1
        uuids = [f"{mine}-{step}" for step in range(max(0, at[mine] - 5), at[mine])]
        known = images.known(1)
        sent = RequestBody((), tuple(u for u in uuids if u not in known), tuple(u for u in uuids if u in known))
        if not server.answers(sent):
            misses += 1
            images.missed(1, sent.as_ids, EVICTED)
            sent = RequestBody((), tuple(uuids))
            assert server.answers(sent)
        images.learn(1, sent.uuids)
        total, as_ids = total + len(uuids), as_ids + len(sent.as_ids)
    return misses / (conversations * steps), as_ids / total


def test_what_fits_into_the_server_goes_as_ids() -> None:
    missed, named = episodes(40, 50)
    assert missed == 0
    assert named > 0.77  # of five in view, the newest is new


def test_a_server_that_has_lost_all_costs_one_miss_or_two() -> None:
    missed, named = episodes(40, 50, flushed_at=1000)
    assert 0 < missed <= 3 / 2000
    assert named > 0.75


@pytest.mark.parametrize("conversations", [200, 1000])
def test_with_more_in_use_than_the_server_holds_few_requests_miss(conversations: int) -> None:
    missed, named = episodes(conversations, 30)
    assert missed < 0.015
    assert named > 0.05


def test_ids_are_seldom_tried_where_others_use_up_the_server() -> None:
    missed, _ = episodes(1, 300, others=800)
    assert missed < 0.1


def test_misses_that_were_on_their_way_together_count_once() -> None:
    images = ServerImages()
    images.learn(1, [f"{number}" for number in range(1000)])
    for _ in range(50):
        images.missed(1, ["100", "101"], EVICTED)
    known = images.known(1)
    assert sum(f"{number}" in known for number in range(1000)) == 449
    assert "999" in known
