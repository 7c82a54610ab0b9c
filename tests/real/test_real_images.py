"""Images against the real vLLM: every way to give one is the same to the model, and each is sent once to a server."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import own_state

from managed_vllm import ManagedVLLM
from managed_vllm.client import VLLMClient
from managed_vllm.demo.random_vlm import make_random_vlm
from managed_vllm.errors import BadRequestError
from managed_vllm.request.images import Image
from managed_vllm.request.outputs import RequestOutput

pillow = pytest.importorskip("PIL.Image")
draw = pytest.importorskip("PIL.ImageDraw")
pytest.importorskip("torchvision", exc_type=ImportError)  # vLLM needs it for this model

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

SIZE = (640, 360)
HELD = 8
"""Images of that size that the server's cache holds: 1.4 MB each (see managed_vllm/media.py)."""
PARAMS = {"temperature": 0, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedVLLM]:
    """One server of the random vision-language model, with a small cache of images."""
    model = make_random_vlm(tmp_path_factory.mktemp("vlm") / "model")
    with own_state():
        with ManagedVLLM(
            str(model),
            keep_alive=0,
            enforce_eager=True,
            max_model_len=8192,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=2**28,
            limit_mm_per_prompt={"image": 5},
            mm_processor_cache_gb=HELD * 1.41e6 / 2**30,
        ) as handle:
            yield handle


def screenshot(seed: int) -> Any:
    rng = random.Random(seed)
    image = pillow.new("RGB", SIZE, tuple(rng.choices(range(256), k=3)))
    pen = draw.Draw(image)
    for _ in range(40):
        x, y = rng.randrange(SIZE[0]), rng.randrange(SIZE[1])
        color = tuple(rng.choices(range(256), k=3))
        pen.rectangle((x, y, x + rng.randrange(10, 200), y + rng.randrange(10, 100)), fill=color)
    return image


def png(seed: int) -> bytes:
    file = io.BytesIO()
    screenshot(seed).save(file, "PNG")
    return file.getvalue()


def asking(*images: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": "What is there?"}]}]


def told(output: RequestOutput) -> tuple[list[int], list[int]]:
    return list(output.prompt_token_ids), list(output.outputs[0].token_ids)


def without_ids(llm: ManagedVLLM) -> VLLMClient:
    return VLLMClient(llm.base_url, llm.api_key, llm.model, media_ids=False)


def answer(llm: ManagedVLLM, *images: Any) -> tuple[list[int], list[int]]:
    """What the server answers to the images in full, without ids."""
    full = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    client = without_ids(llm)
    try:
        return told(client.chat(asking(*full), PARAMS)[0])
    finally:
        client.close()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def sending(llm: ManagedVLLM, ask: Callable[[], list[RequestOutput]]) -> tuple[list[RequestOutput], int]:
    """The outputs, and the bytes that were sent for them."""
    before = llm.client.bytes_sent
    outputs = ask()
    return outputs, llm.client.bytes_sent - before


def test_every_way_to_give_an_image_is_the_same_to_the_model(llm: ManagedVLLM, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    data, picture, path = png(1), screenshot(1), tmp_path / "a screen.png"
    path.write_bytes(data)
    url = data_url(data)
    shapes = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image_url", "image_url": data},
        {"type": "image_url", "image_url": picture},
        {"type": "image", "image": picture},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path},
        {"type": "image_pil", "image_pil": picture},
        {"type": "image", "image": numpy.asarray(picture)},
        {"type": "image_url", "image_url": {"url": url}, "uuid": "an id of the caller's"},
        picture,
        data,
        Image.of(path),
    ]
    expected = answer(llm, data)
    assert expected[0].count(max(expected[0], key=expected[0].count)) == 299  # a place for each patch
    for shape in shapes:
        assert told(llm.chat(asking(shape), PARAMS)[0]) == expected, shape


def test_other_images_get_other_answers(llm: ManagedVLLM) -> None:
    """Else the other tests would show nothing."""
    answers = {tuple(told(llm.chat(asking(screenshot(seed)), PARAMS)[0])[1]) for seed in range(6)}
    assert len(answers) > 3


def test_each_image_is_sent_once(llm: ManagedVLLM) -> None:
    shots = [png(seed) for seed in range(10, 16)]
    first, full = sending(llm, lambda: llm.chat(asking(*shots[:5]), PARAMS))
    again, ids = sending(llm, lambda: llm.chat(asking(*shots[:5]), PARAMS))
    assert told(again[0]) == told(first[0])
    assert full > sum(map(len, shots[:5]))
    assert ids < 1500
    moved, one = sending(llm, lambda: llm.chat(asking(*shots[1:6]), PARAMS))
    assert len(shots[5]) < one < 1500 + 2 * len(shots[5])
    assert told(moved[0]) == answer(llm, *shots[1:6])


def test_the_order_of_known_images_counts(llm: ManagedVLLM) -> None:
    for seed in range(20, 40):  # the random model does not tell every two pictures by their order
        one, other = png(seed), png(seed + 20)
        there, back = answer(llm, one, other), answer(llm, other, one)
        if there != back:
            break
    assert told(llm.chat(asking(one, other), PARAMS)[0]) == there
    (output,), sent = sending(llm, lambda: llm.chat(asking(other, one), PARAMS))
    assert sent < 1000
    assert told(output) == back != there


def test_what_the_server_has_forgotten_is_sent_again_unnoticed(llm: ManagedVLLM) -> None:
    first = png(30)
    expected = told(llm.chat(asking(first), PARAMS)[0])
    other = without_ids(llm)  # another user of the server, of whom this client knows nothing
    try:
        for seed in range(100, 100 + 2 * HELD):
            other.chat(asking(png(seed)), PARAMS)
    finally:
        other.close()
    (output,), sent = sending(llm, lambda: llm.chat(asking(first), PARAMS))
    assert told(output) == expected
    assert output.attempts == 1
    assert sent > len(first)  # by id, and then in full
    (output,), sent = sending(llm, lambda: llm.chat(asking(first), PARAMS))
    assert (told(output), sent < 1000) == (expected, True)


def test_many_at_once_with_more_images_than_the_server_holds_get_their_own_answers(llm: ManagedVLLM) -> None:
    shots = [png(seed) for seed in range(60, 60 + HELD + 4)]
    expected, epoch = [answer(llm, shot) for shot in shots], llm.status().epoch
    rng = random.Random(0)
    chosen = [rng.randrange(len(shots)) for _ in range(80)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda index: llm.chat(asking(shots[index]), PARAMS)[0], chosen))
    assert [told(output) for output in outputs] == [expected[index] for index in chosen]
    assert llm.status().epoch == epoch


def test_a_request_refused_late_does_not_spoil_its_images_for_others(llm: ManagedVLLM) -> None:
    """vLLM 0.32 answers the next request with such an image by HTTP 500, once (see managed_vllm/media.py)."""
    shot = png(80)
    with pytest.raises(BadRequestError):
        llm.chat(asking(shot), {**PARAMS, "structured_outputs": {"regex": "("}})
    assert told(llm.chat(asking(shot), PARAMS)[0]) == answer(llm, shot)


def test_what_the_server_can_not_read_is_said_with_the_servers_words(llm: ManagedVLLM) -> None:
    damaged = png(81)[:60]
    with pytest.raises(BadRequestError, match="image"):
        llm.chat(asking(damaged), PARAMS)
    with pytest.raises(BadRequestError, match="At most 5 image"):
        llm.chat(asking(*[png(82)] * 6), PARAMS)


def test_a_server_that_was_restarted_is_given_the_images_again(llm: ManagedVLLM) -> None:
    shots = [png(90), png(91)]
    first = llm.chat(asking(*shots), PARAMS)[0]
    llm.restart()
    (output,), sent = sending(llm, lambda: llm.chat(asking(*shots), PARAMS))
    assert output.epoch == first.epoch + 1
    assert told(output) == told(first)
    assert sent > sum(map(len, shots))
    (output,), sent = sending(llm, lambda: llm.chat(asking(*shots), PARAMS))
    assert (told(output), sent < 1000) == (told(first), True)
