"""What it saves to send an image that the server has as an id: bytes on the wire and time, in an agent's episode.

    python benchmarks/images.py                                    three minutes: one server of a random model
    python benchmarks/images.py --size 1280x720 --episodes 4

An episode is a conversation of 15 turns with the last five screenshots in view, which differ from turn to turn, and
answers of a few tokens: what a GUI agent sends. The model is `managed_vllm.demo.random_vlm`, of Qwen2.5-VL's
architecture and tiny: what is measured is the way of the images into the engine, not the engine. Variants take turns
with the same screenshots; the server does not find what it has under another name (an id, or a hash of its own of the
pixels), neither prepared nor in its prefix cache. The first episode of each is not counted.
What is measured, and what follows from it, stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from attach import own_state_directory
from PIL import Image as pillow
from PIL import ImageDraw

from managed_vllm import ManagedVLLM
from managed_vllm.client import VLLMClient
from managed_vllm.config import installed_vllm
from managed_vllm.demo.random_vlm import make_random_vlm
from managed_vllm.request.images import Image

IN_VIEW = 5
TURNS = 15
PARAMS = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
_WORDS = "File Edit View Insert Format Tools Help Open Save Close Search Settings Account Next Back Cancel Apply"


@dataclass
class Turn:
    """One turn of an episode. CPU times are the API server's and the client's, in seconds."""

    variant: str
    number: int
    bytes_sent: int
    wall_s: float
    client_s: float
    api_server_s: float


def screenshots(seed: int, size: tuple[int, int], count: int) -> list[Image]:
    """A desktop with windows, texts and a photograph, and another dialog and pointer in each."""
    rng = random.Random(seed)
    width, height = size
    desk = pillow.new("RGB", size, (58, 110, 165))
    noise = pillow.frombytes("RGB", (48, 27), rng.randbytes(48 * 27 * 3))
    desk.paste(noise.resize((width // 3, height // 3), pillow.Resampling.BICUBIC), (width // 2, height // 2))
    for _ in range(4):
        window(desk, rng, (rng.randrange(width // 2), rng.randrange(height // 2)), (width // 2, height // 2), 40)
    found = []
    for _ in range(count):
        shot = desk.copy()
        window(shot, rng, (rng.randrange(width // 2), rng.randrange(height // 2)), (width // 3, height // 3), 12)
        x, y = rng.randrange(width), rng.randrange(height)
        ImageDraw.Draw(shot).polygon([(x, y), (x, y + 18), (x + 12, y + 12)], fill="white", outline="black")
        found.append(Image.of(shot))
    return found


def window(image: Any, rng: random.Random, at: tuple[int, int], size: tuple[int, int], texts: int) -> None:
    pen = ImageDraw.Draw(image)
    (x, y), (width, height) = at, size
    pen.rectangle((x, y, x + width, y + height), fill=(240, 240, 240), outline=(90, 90, 90))
    pen.rectangle((x, y, x + width, y + 24), fill=tuple(rng.choices(range(60, 200), k=3)))
    for _ in range(texts):
        place = (x + rng.randrange(width), y + 30 + rng.randrange(max(1, height - 40)))
        pen.text(place, " ".join(rng.choices(_WORDS.split(), k=4)), fill=(20, 20, 20))


def episode(llm: ManagedVLLM, client: VLLMClient, variant: str, shots: list[Image]) -> list[Turn]:
    pid = llm.status().server_pid
    assert pid is not None
    api_server = psutil.Process(pid)
    turns = []
    answers: list[str] = []
    for number in range(len(shots)):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "You are a GUI agent. " * 20}]
        for step in range(number + 1):
            if step > number - IN_VIEW:
                messages.append({"role": "user", "content": [{"type": "image", "image": shots[step]}]})
            if step < number:
                messages.append({"role": "assistant", "content": answers[step]})
        before = client.bytes_sent, time.process_time(), cpu_s(api_server), time.perf_counter()
        output = client.chat(messages, PARAMS)[0]
        wall = time.perf_counter() - before[3]
        sent, ours = client.bytes_sent - before[0], time.process_time() - before[1]
        turns.append(Turn(variant, number, sent, wall, ours, cpu_s(api_server) - before[2]))
        answers.append(output.outputs[0].text)
    return turns


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def show(turns: list[Turn], variants: list[str]) -> None:
    """Of the turns with all images in view: those before are cheaper for both."""
    print(f"\n{'a turn, five images in view':30} {variants[0]:>14} {variants[1]:>14} {'ratio':>9}")
    full = [turn for turn in turns if turn.number >= IN_VIEW - 1]
    rows = [
        ("bytes sent", "bytes_sent", 1e-3, "kB"),
        ("time, median", "wall_s", 1e3, "ms"),
        ("CPU time of the client", "client_s", 1e3, "ms"),
        ("CPU time of the API server", "api_server_s", 1e3, "ms"),
    ]
    for what, name, scale, unit in rows:
        middle = statistics.median if name == "wall_s" else statistics.fmean  # CPU times come in hundredths of seconds
        one, other = (middle(getattr(turn, name) for turn in full if turn.variant == variant) for variant in variants)
        print(f"{what:30} {one * scale:11.1f} {unit} {other * scale:11.1f} {unit} {one / other:8.1f}x")
    for variant in variants:
        walls = sorted(1e3 * turn.wall_s for turn in full if turn.variant == variant)
        print(f"{variant}: {len(walls)} turns, {walls[0]:.0f} to {walls[-1]:.0f} ms")
    whole = [sum(turn.bytes_sent for turn in turns if turn.variant == variant) for variant in variants]
    episodes = sum(turn.number == 0 for turn in turns) / 2
    print(
        f"an episode of {TURNS} turns sends {whole[0] / episodes / 1e6:.2f} MB, {whole[1] / episodes / 1e6:.2f} MB: "
        f"{whole[0] / whole[1]:.1f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1920x1080", help="of the screenshots (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=3, help="of each variant, counted (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    machine = {
        "vllm": installed_vllm(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "size": arguments.size,
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    options: dict[str, Any] = {
        "max_model_len": 8192,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 2**29,
        "limit_mm_per_prompt": {"image": IN_VIEW},
    }
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as folder, own_state_directory():
        model = make_random_vlm(Path(folder) / "model")
        with ManagedVLLM(str(model), progress=False, keep_alive=0, **options) as llm:
            variants = {"in full": False, "as ids": True}
            clients = {
                name: VLLMClient(llm.base_url, llm.api_key, llm.model, media_ids=ids) for name, ids in variants.items()
            }
            for number in range(arguments.episodes + 1):
                shots = screenshots(number, (width, height), TURNS)
                for name in sorted(clients, reverse=bool(number % 2)):
                    made = episode(llm, clients[name], name, shots)
                    turns += made if number else []
            for client in clients.values():
                client.close()
    show(turns, list(variants))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "turns": [asdict(turn) for turn in turns]}, indent=1))


if __name__ == "__main__":
    main()
