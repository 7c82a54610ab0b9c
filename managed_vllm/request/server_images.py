"""Which images a server has already, so that they are sent as ids alone.

`ServerImages` remembers that for each epoch of a server. For each request, in this order:

1. `encode_body(body, known=images.known(server))`.
2. After an answer: `images.learn(server, body.uuids)`; not before, since the server must have taken the pictures in.
3. After a miss (`is_miss(status, message)`): `images.missed(server, body.as_ids, message)`, and the request is sent
   once more with `known=()`. Any other attempt after a lost answer is made with `known=()`, too.

The id is vLLM's `uuid` of a content part. What version 0.32 does with it, tried with the model of
`managed_vllm.demo.random_vlm` on two CPU cores:

- `{"type": "image_url", "image_url": null, "uuid": …}` gives the same tokens as the picture itself if the API server's
  multimodal processor cache (`--mm-processor-cache-gb`, 4 GiB by default) has the id. `image_url` must be present.
- If the cache does not have it: HTTP 400 within 4 ms, "Cache miss for image at index 1 but data is not provided." It
  harms nothing, with other images beside it or not. One request may mix pictures of both kinds. A picture that the
  server does not have must come with data in each of its places, since all are looked up before any is stored.
- Without that cache (0 GiB): HTTP 400, "Failed to apply …Processor on data={'images': [None]}". Each of several API
  servers has its own cache, so only one of them knows an id (by vLLM's source; not tried).
- The cache holds prepared pixels, not files: 1.4 MB for 640x360 (299 tokens). 4 GiB hold 3,000 of these, or 750 of 1280
  tokens, which 1,000 conversations with five each exceed. The least recently used go first, and are misses then.
- The engine has a copy of that cache, which can differ: a request that was refused late (for an invalid regex) has left
  its pictures in one of them only. The next request with such an id gets HTTP 500, "Internal server error", with data
  or without; the one after it works, with data. 450 requests, eight at a time, with a cache of eight pictures and
  twelve in use, were answered or were plain misses.
- Pictures of one request that don't fit into the cache together, some of them known, are HTTP 500, "Expected a cached
  item", with ids or without. One that does not fit by itself is served, and never known.
- An id that stands for two pictures gives wrong answers in silence. So ours is a hash of the content.

In none of these cases did the server die. With an id it neither decodes nor hashes the picture: one of 1080p took 45 ms
as an id, 65 ms with data beside a known id, 320 to 500 ms when it was new.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable

_MISS = re.compile(r"Cache miss for \w+ at index \d+ but data is not provided")
_KEEPS_NONE = re.compile(
    r"Failed to apply \w*Processor on data=.*\bNone\b|image_url\b.*\b(NoneType|None|null)\b", re.DOTALL
)


def is_miss(status: int, message: str) -> bool:
    """Whether the server says that it does not have an image that was sent as an id (see the top of this module).

    For a server with other words than vLLM 0.32, any 4xx to a request with `as_ids` may safely be taken for a miss.
    """
    return status in (400, 422) and (_MISS.search(message) or _KEEPS_NONE.search(message)) is not None


_SLOWEST = 7
"""As a power of two: how many images must be learned for one more to be expected."""


class ServerImages:
    """The images that each epoch of a server holds, as far as this client knows. Thread-safe.

    `server` is a key for one epoch of one server: nothing survives an epoch. The server evicts the least recently used
    images, and other clients use it, too; so a miss shows how much it holds. Images older than a missed one are taken
    for evicted, and from then on only half as many are expected as are newer, or as many as were missed together. Each
    learned image raises that number by one; after several misses in a row it starts lower and rises more slowly. With
    more images in use than the server holds, most are then sent with data, and few requests have to be sent twice.

    Args:
        max_images: ids for each epoch; all of them take 8 MB.
        max_servers: the most recently used epochs that are remembered.
    """

    def __init__(self, max_images: int = 32_768, max_servers: int = 16) -> None:
        self._max_images = max_images
        self._max_servers = max_servers
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, server: Hashable) -> Container[str]:
        """The ids that this server holds: a view, which changes with what is learned."""
        with self._lock:
            held = self._held.get(server)
            return () if held is None else held.order

    def learn(self, server: Hashable, uuids: Iterable[str]) -> None:
        """The server has answered a request with these."""
        uuids = list(uuids)
        if not uuids:
            return
        with self._lock:
            held = self._held.setdefault(server, _Held(self._max_images))
            self._held.move_to_end(server)
            while len(self._held) > self._max_servers:
                self._held.popitem(last=False)
            if held.keeps_none:
                return
            if not held.order.keys().isdisjoint(uuids):
                held.misses = 0
            held.expected = min(self._max_images, held.expected + len(uuids) / 2**held.misses)
            for uuid in uuids:
                held.order[uuid] = None
                held.order.move_to_end(uuid)
            held.cut(int(held.expected))

    def missed(self, server: Hashable, as_ids: Iterable[str], message: str = "") -> None:
        """The server refused these (`is_miss`) with that message."""
        missed = set(as_ids)
        with self._lock:
            held = self._held.get(server)
            if held is None:
                return
            if _KEEPS_NONE.search(message):
                held.keeps_none = True
                held.order.clear()
                return
            if missed.isdisjoint(held.order):
                return  # another request in flight has missed them already
            while held.order.popitem(last=False)[0] not in missed:
                pass
            held.expected = min(held.expected, max(len(held.order) / 2, len(missed) / 2**held.misses))
            held.misses = min(held.misses + 1, _SLOWEST)
            for uuid in missed:
                held.order.pop(uuid, None)
            held.cut(int(held.expected))


class _Held:
    """The images of one epoch, least recently used first."""

    def __init__(self, most: int) -> None:
        self.order: OrderedDict[str, None] = OrderedDict()
        self.expected: float = most
        self.misses = 0
        self.keeps_none = False

    def cut(self, most: int) -> None:
        """Drops the least recently used ones beyond `most`."""
        while len(self.order) > most:
            self.order.popitem(last=False)
