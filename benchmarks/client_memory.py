"""What the client holds in memory: over 100,000 requests, and with 1,000 conversations full of screenshots in flight.

    python benchmarks/client_memory.py                       both, with AsyncVLLMClient (about three minutes)
    python benchmarks/client_memory.py --client aiohttp      the same with bare aiohttp and json, to compare
    python benchmarks/client_memory.py --skip-long

Each measurement is a fresh process against a `stub_server.py` of its own; RSS and its peak are the kernel's (`VmRSS`,
`VmHWM`), of that process only.

Long: 256 requests are in flight all the time; RSS is noted every 10,000 answers. Between the second sample and the last
one it must not grow by more than `FLAT_MIB`.

Images: 1,000 conversations, each with five screenshots of 1920 × 1080 as PNG bytes, are asked for at once; the stub
answers so late that all are in flight together, and counts whether they were. The screenshots are drawn by Pillow
beforehand, in another process: pages with text, forms, tables and a picture. There are `DRAWN` of them; each of the
5,000 gets a PNG text chunk of its own, so that no two are the same bytes. Each conversation is a call of its own, or
all are one batch. The caller holds its conversations, so their bytes are a part of the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import itertools
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from client import BATCHES, ONE_BY_ONE, Messages, conversations, missing
from stub_server import raise_open_files, running, stats_of

IN_FLIGHT = 256
REQUESTS = 100_000
SAMPLES = 10
FLAT_MIB = 4.0
"""Over 80,000 requests: 52 bytes each. What is kept by mistake is larger."""
CONVERSATIONS = 1000
SCREENSHOTS = 5
PEAK_GB = 1.5
DRAWN = 40

_IHDR_END = 33
_MIB = 1 << 20


def memory_mib(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process. Not `ru_maxrss`: a child starts with its parent's."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# -- screenshots -------------------------------------------------------------------------------------------------------

_WORDS = (
    *("account", "address", "amount", "approve", "archive", "balance", "billing", "branch", "cancel", "change", "city"),
    *("checkout", "comment", "confirm", "contact", "continue", "country", "customer", "dashboard", "date", "delete"),
    *("delivery", "department", "details", "discount", "document", "download", "edit", "email", "employee", "export"),
    *("filter", "first", "form", "help", "history", "import", "invoice", "item", "last", "manager", "message", "month"),
    *("number", "open", "order", "page", "password", "payment", "phone", "price", "print", "product", "quantity"),
    *("record", "report", "request", "return", "review", "save", "search", "select", "send", "settings", "shipped"),
    *("status", "street", "submit", "summary", "ticket", "total", "update", "upload", "user", "value", "warehouse"),
)


def screenshot(seed: int) -> bytes:
    """A page of 1920 × 1080 in a browser's window, as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    chance = random.Random(seed)
    page = Image.new("RGB", (1920, 1080), (246, 247, 249))
    draw = ImageDraw.Draw(page)
    small, usual, large = (ImageFont.load_default(size) for size in (14, 16, 28))

    def words(least: int, most: int) -> str:
        return " ".join(chance.choice(_WORDS) for _ in range(chance.randint(least, most))).capitalize()

    draw.rectangle((0, 0, 1920, 44), fill=(222, 225, 230))
    for tab in range(chance.randint(2, 6)):
        draw.rounded_rectangle((12 + tab * 230, 8, 232 + tab * 230, 44), 8, fill=(255, 255, 255) if tab == 0 else None)
        draw.text((28 + tab * 230, 16), words(2, 3), font=small, fill=(60, 64, 67))
    draw.rounded_rectangle((150, 52, 1700, 84), 16, fill=(255, 255, 255), outline=(200, 204, 209))
    draw.text(
        (170, 58), f"https://shop.example/{words(1, 1)}/{chance.getrandbits(40):x}", font=usual, fill=(32, 33, 36)
    )

    draw.rectangle((0, 96, 260, 1080), fill=(31, 41, 55))
    for line in range(18):
        draw.text((28, 130 + line * 48), words(1, 2), font=usual, fill=(209, 213, 219))

    draw.text((300, 120), words(3, 6), font=large, fill=(17, 24, 39))
    for row in range(20):  # a table
        top = 180 + row * 28
        draw.rectangle((300, top, 1240, top + 27), fill=(255, 255, 255) if row % 2 else (239, 242, 246))
        for column in range(6):
            text = f"{chance.random() * 1000:.2f}" if column > 3 else words(1, 2)
            draw.text((312 + column * 156, top + 5), text, font=small, fill=(55, 65, 81))
    for line in range(10):  # a paragraph
        draw.text((300, 770 + line * 27), words(10, 14), font=usual, fill=(55, 65, 81))
    for place in range(6):  # a form
        top = 180 + place * 74
        draw.text((1290, top), words(1, 2), font=small, fill=(75, 85, 99))
        draw.rounded_rectangle((1290, top + 20, 1860, top + 56), 6, fill=(255, 255, 255), outline=(156, 163, 175))
        draw.text((1302, top + 28), words(1, 4), font=usual, fill=(17, 24, 39))
    colour = tuple(chance.randint(20, 180) for _ in range(3))
    draw.rounded_rectangle((1290, 640, 1470, 684), 8, fill=colour)
    draw.text((1330, 652), words(1, 1), font=usual, fill=(255, 255, 255))

    # A picture, in all the colours that a palette does not have.
    tiny = Image.new("RGB", (10, 6))
    tiny.putdata([tuple(chance.randint(0, 255) for _ in range(3)) for _ in range(60)])
    page.paste(tiny.resize((240, 144), Image.Resampling.BICUBIC), (1290, 740))

    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def distinct(png: bytes, number: int) -> bytes:
    """The same picture with a text chunk of its own behind the header."""
    kind_and_text = b"tEXt" + f"Comment\0screenshot {number}".encode()
    chunk = struct.pack(">I", len(kind_and_text) - 4) + kind_and_text + struct.pack(">I", zlib.crc32(kind_and_text))
    return png[:_IHDR_END] + chunk + png[_IHDR_END:]


def with_screenshots(folder: Path, number: int) -> tuple[list[Messages], int]:
    """Conversations with five screenshots each, and how many bytes their images are."""
    drawn = [file.read_bytes() for file in sorted(folder.glob("*.png"))]
    numbers = itertools.count()
    made: list[Messages] = []
    size = 0
    for text in conversations(number):
        asked: Messages = [text[0]]
        for step in range(SCREENSHOTS):
            which = next(numbers)
            image = distinct(drawn[which % len(drawn)], which)
            size += len(image)
            if step:
                asked.append({"role": "assistant", "content": f"Step {step}: I click into the next field."})
            words = {"type": "text", "text": text[-1]["content"]}
            asked.append({"role": "user", "content": [words, {"type": "image", "image": image}]})
        made.append(asked)
    return made, size


def as_data_urls(messages: Messages) -> Messages:
    """For a client that does not take images as bytes."""

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        url = "data:image/png;base64," + base64.b64encode(given["image"]).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [
        one if isinstance(one["content"], str) else {**one, "content": [part(each) for each in one["content"]]}
        for one in messages
    ]


# -- measurements, each in a process of its own ------------------------------------------------------------------------


async def long(client: str, address: str, requests: int) -> dict[str, Any]:
    """RSS in MiB after each tenth of the requests, with garbage collected."""
    asked = itertools.cycle(conversations())
    left = iter(range(requests))
    samples: list[float] = []
    errors: list[str] = []
    done = 0
    started = time.perf_counter()
    async with ONE_BY_ONE[client](address, IN_FLIGHT) as ask:

        async def worker() -> None:
            nonlocal done
            for _ in left:
                try:
                    await ask(next(asked))
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
                done += 1
                if done % (requests // SAMPLES) == 0:
                    gc.collect()
                    samples.append(memory_mib("VmRSS"))

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return {"samples": samples, "errors": errors[:3], "seconds": time.perf_counter() - started}


async def images(client: str, way: str, address: str, number: int, folder: Path) -> dict[str, Any]:
    """RSS in MiB before the first request, and at its highest."""
    asked, size = with_screenshots(folder, number)
    gc.collect()
    before = memory_mib("VmRSS")
    _forget_peak()
    started, cpu_s = time.perf_counter(), time.process_time()
    errors: list[str] = []
    seen: list[float] = []
    watching = asyncio.create_task(_watch(seen))
    async with AsyncExitStack() as stack:
        calls: Iterable[Awaitable[Any]]
        if way == "batch":
            ask_many = await stack.enter_async_context(BATCHES[f"{client}-batch"](address, number))
            calls = [_listed(ask_many, asked)]
        else:
            ask = await stack.enter_async_context(ONE_BY_ONE[client](address, number))
            calls = [_one(ask, messages, client) for messages in asked]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                errors.append(f"{type(outcome).__name__}: {outcome}"[:300])
    watching.cancel()
    return {
        "image_mib": size / _MIB,
        "before_mib": before,
        "peak_mib": memory_mib("VmHWM"),
        "usual_mib": statistics.median(seen),
        "errors": errors[:3],
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu_s,
    }


async def _watch(seen: list[float]) -> None:
    while True:
        seen.append(memory_mib("VmRSS"))
        await asyncio.sleep(0.25)


async def _one(ask: Callable[[Messages], Awaitable[float]], messages: Messages, client: str) -> float:
    return await ask(messages if client == "ours" else as_data_urls(messages))


async def _listed(ask: Callable[[list[Messages]], Awaitable[Iterable[float]]], many: list[Messages]) -> list[float]:
    return list(await ask(many))


def in_fresh_process(address: str, words: Sequence[str]) -> dict[str, Any]:
    argv = [sys.executable, str(Path(__file__).resolve()), "--address", address, *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the measurement failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


def show_long(client: str, requests: int) -> dict[str, Any]:
    with running() as address:
        told = in_fresh_process(address, ["--measure", "long", "--client", client, "--requests", str(requests)])
    samples = told["samples"]
    growth = told["growth_mib"] = samples[-1] - samples[1]
    told["met"] = growth <= FLAT_MIB and not told["errors"]
    print(f"\n{client}: RSS over {requests:,} requests, {IN_FLIGHT} in flight, {told['seconds']:.0f} s")
    for number, sample in enumerate(samples, 1):
        print(f"  {requests * number // SAMPLES:8,} {sample:8.1f} MiB")
    for error in told["errors"]:
        print(f"  {error}")
    verdict = "flat: met" if told["met"] else "flat: NOT met"
    print(f"  from the second sample to the last: {growth:+.1f} MiB (target ≤ {FLAT_MIB:g} MiB)   {verdict}")
    return told


def show_images(client: str, way: str, number: int, delay_s: float, folder: Path) -> dict[str, Any]:
    words = ["--measure", way, "--client", client, "--conversations", str(number), "--folder", str(folder)]
    with running(delay_s) as address:
        told = in_fresh_process(address, words)
        seen = stats_of(address)
    how = "one call for all" if way == "batch" else "one call each"
    own, before, peak = told["image_mib"], told["before_mib"], told["peak_mib"]
    print(f"\n{client}, {how}: {number:,} conversations with {SCREENSHOTS} screenshots each")
    print(f"  images' own bytes  {own:8.0f} MiB, {own * 1024 / number / SCREENSHOTS:.0f} KiB each")
    print(f"  RSS before         {before:8.0f} MiB, {before - own:+.0f} MiB")
    usual = told["usual_mib"]
    print(f"  RSS while they wait{usual:8.0f} MiB, {usual - before:+.0f} MiB (the median)")
    print(f"  highest RSS        {peak:8.0f} MiB, {peak - before:+.0f} MiB")
    print(f"  sent               {seen.body_bytes / _MIB:8.0f} MiB; {told['cpu_s']:.1f} s CPU, {told['seconds']:.1f} s")
    told["in_flight"] = seen.most_in_flight
    all_at_once = seen.most_in_flight == number
    advice = "" if all_at_once else "   NOT all: the client holds some back, or the --delay is too short"
    print(f"  in flight at once  {seen.most_in_flight:8,}{advice}")
    for error in told["errors"]:
        print(f"  {error}")
    peak_gb = peak * _MIB / 1e9
    told["met"] = peak_gb < PEAK_GB and all_at_once and not told["errors"]
    print(f"  {peak_gb:.2f} GB (target < {PEAK_GB:g} GB)   {'met' if told['met'] else 'NOT met'}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--client", choices=("ours", "aiohttp"), default="ours", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="default: %(default)s")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS, help="default: %(default)s")
    parser.add_argument("--delay", type=float, default=20.0, help="seconds to the answers with images (%(default)s)")
    parser.add_argument("--skip-long", action="store_true", help="only the images")
    parser.add_argument("--skip-images", action="store_true", help="only the many requests")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    # What follows is what this program gives itself.
    parser.add_argument("--measure", choices=("long", "each", "batch"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    raise_open_files()
    if given.measure:
        if given.measure == "long":
            told = asyncio.run(long(given.client, given.address, given.requests))
        else:
            told = asyncio.run(images(given.client, given.measure, given.address, given.conversations, given.folder))
        print(json.dumps(told))
        return

    if reason := missing(given.client):
        raise SystemExit(f"{given.client} can't be measured: {reason}")
    print(f"cpus: {len(os.sched_getaffinity(0))}, load: {os.getloadavg()[0]:.2f}", flush=True)
    results = {}
    if not given.skip_long:
        results["long"] = show_long(given.client, given.requests)
    if not given.skip_images:
        with tempfile.TemporaryDirectory(prefix="mvllm-bench-") as folder:
            for number in range(DRAWN):
                (Path(folder) / f"{number:03}.png").write_bytes(screenshot(number))
            for way in ("each", "batch") if f"{given.client}-batch" in BATCHES else ("each",):
                results[way] = show_images(given.client, way, given.conversations, given.delay, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
