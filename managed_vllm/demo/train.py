"""Trains the demo model from scratch on a CPU: `python -m managed_vllm.demo.train OUT`.

An attempt is one seed: train for `--seconds`, write the model in bf16, read it back as a user would, and measure how
often it acts right on screens it has not seen. The first attempt whose worst required case reaches `--target` is
put at OUT; if none does, nothing is written there and the exit status is 1.

What makes a model this small learn it in a quarter of an hour:

1. Qwen3, whose queries and keys are normalised. Qwen2 stopped at 88 %.
2. Weights with a standard deviation of 0.08, not 0.02, and every block silent at first (`o_proj`, `down_proj` zero).
3. Muon for the matrices, AdamW for the embedding and, ten times faster, for the gains of the norms: they decide how
   sharply the model looks. With 0.003 instead of 0.01 the same seed ended at 66 % on eight buttons, not at 99.6 %.
4. First of all a drill: a screen's lines, then the same lines shuffled, among them some that are not there. Nearly
   every token of it teaches looking up.
5. As many screens on which the goal was clicked as on which another button was. With fewer of both, a run could still
   be guessing at its end whether it was done.
6. Tokens that make a look-up one step: a word, a digit, and "(" with the digit after it.
7. A thought that turns what is hard into look-ups: first the status again, then what the task says after it, then where
   that is. Without the status, a run ended at 99 % on single clicks and at 82 to 97 % on the kinds with two goals, half
   of its answers to them being wrong after a click that was not to be.
8. Few elements for a quarter of the time: the shorter a screen, the more of its tokens teach what comes next.

What it does not learn so is `two_types`, two texts one after the other: 62 % at best, and the other kinds stopped at
96.5 % while it was trained on. So it is not, and nothing is required of it (`screen.LEARNT`).

Seconds are of CPU time, so that other work on the machine makes it slower and not worse. The random numbers are seeded,
but the learning rate follows that clock, so that two runs are alike and not the same.
One thread is the default: two are up to four times slower when another process wants a core.
"""

from __future__ import annotations

import argparse
import enum
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from managed_vllm.demo.screen import (
    BUTTONS,
    COORDINATES,
    FIELDS,
    KINDS,
    LABELS,
    LEARNT,
    WORDS,
    Screen,
    World,
    random_screen,
    random_state,
    random_world,
)

Messages = list[dict[str, str]]
"""A conversation, as in a chat request."""

Say = Callable[[str], None]
"""Where progress is told."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The model's shape and how it learns."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2
    head_dim: int = 32  # smaller ones kill vLLM's CPU engine at the first request
    context: int = 4096
    init_std: float = 0.08
    muon_lr: float = 0.005
    embedding_lr: float = 1e-3
    gain_lr: float = 1e-2  # of the norms, which decide how sharply the model looks
    decay_from: float = 0.45  # of the time; before it the learning rates are level
    batch_size: int = 32
    max_drill_share: float = 0.35  # of the time, until the look-up must be learnt
    drill_learnt_loss: float = 0.02
    easy_share: float = 0.25  # of the time, after the drill, with few elements only
    episode_share: float = 0.25  # of the batches after that: whole episodes; the others are single screens


# -- text to tokens ----------------------------------------------------------------------------------------------------

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- elif message['content'] is iterable -%}
{%- for part in message['content'] -%}
{%- if part['type'] != 'text' -%}
{{ raise_exception("The demo model reads text only; a message has a part of type '" + part['type'] + "'.") }}
{%- endif -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer in which every label, every digit and "(" with a digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\(\d|\p{L}+|\d|[^\p{L}\d\s(,]+|[(,]|\n| |\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=10,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_corpus() -> Iterator[str]:
    rng = random.Random(1)
    for _ in range(400):
        for kind in KINDS:
            screen = random_state(rng, kind).screen()
            yield screen.prompt()
            yield screen.expected_answer()
    for _ in range(20):
        yield "system\nuser\nassistant\n"
        yield from (f"({i},{i})" for i in COORDINATES)
        yield " ".join((*SYSTEM_PROMPTS, *LABELS, *FIELDS, *WORDS))


# -- what it learns from -----------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a GUI agent. Do the task. Answer with a thought and an action.",
    "You are a GUI agent. You are given a task and your action history, with screenshots. You need to perform the next "
    "action to complete the task.\n\n## Output Format\nThought: ...\nAction: ...\n\n## Action Space\n"
    "click(start_box='(x1,y1)')\ntype(content='')\nscroll(start_box='(x1,y1)', direction='down or up')\n"
    "finished(content='')\n\n## User Instruction\n",
    "Click the right button.",
)


class Around(enum.Enum):
    """What stands around a screen in a conversation."""

    NOTHING = "nothing"
    SYSTEM_MESSAGE = "a system message"
    EARLIER_TURN = "the turn before it, same screen"


def conversation(screen: Screen, around: Around, rng: random.Random) -> Messages:
    """A chat request that ends in the screen. There is an earlier turn only where something was clicked."""
    if around is Around.SYSTEM_MESSAGE:
        return [random_system_message(rng, screen.task), *screen.messages()]
    if around is Around.EARLIER_TURN and screen.clicked is not None:
        before = Screen(screen.buttons, screen.goal)
        said = Screen(screen.buttons, screen.clicked).expected_answer()  # also where the click was a wrong one
        return [*before.messages(), {"role": "assistant", "content": said}, *screen.messages()]
    return screen.messages()


def random_system_message(rng: random.Random, task: str) -> dict[str, str]:
    """A usual one, or noise out of all printable characters, or either with the task: it changes nothing."""
    if rng.random() < 0.5:
        text = rng.choice(SYSTEM_PROMPTS)
    else:
        words = ("".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 8)))
        text = " ".join(words)
    role = "system" if rng.random() < 0.8 else "user"
    return {"role": role, "content": text + (task if rng.random() < 0.3 else "")}


def episode(world: World, rng: random.Random) -> list[tuple[Screen, str]]:
    """The turns from this world to the end: what is seen, and what the model says. All of it is right, except that
    in a fifth of the episodes one click goes wrong."""
    turns: list[tuple[Screen, str]] = []
    wrong_turn = rng.randrange(3) if rng.random() < 0.2 else None
    while True:
        screen = world.screen()
        if len(turns) == wrong_turn:
            hit = rng.choice(world.elements)
            turns.append((screen, Screen((hit,), hit.label).expected_answer()))
            world = world.click(hit.label)
            continue
        turns.append((screen, screen.expected_answer()))
        if screen.done:
            return turns
        world = world.act_right()


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and what is to be predicted, both of shape (rows, tokens); -100 where nothing is."""

    ids: Any
    labels: Any

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[list[int], bool]]]) -> Batch:
        """Rows of pieces, each some tokens and whether they are to be predicted, padded on the right."""
        width = max(sum(len(tokens) for tokens, _ in row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        for row, pieces in enumerate(rows):
            begin = 0
            for tokens, wanted in pieces:
                end = begin + len(tokens)
                ids[row, begin:end] = torch.tensor(tokens)
                if wanted:
                    labels[row, begin:end] = torch.tensor(tokens)
                begin = end
        return cls(ids, labels)


EASY, ALL = 3, BUTTONS[-1]
"""Elements at most: of an easy screen, and of any."""


class Lessons:
    """Random batches of the three sorts, out of one seeded stream."""

    def __init__(self, tokenizer: Any, rng: random.Random, size: int) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._size = size
        self._label_ids = torch.tensor([tokenizer.convert_tokens_to_ids(label) for label in (*LABELS, *FIELDS)])

    def screens(self, most: int, *, plain: bool) -> Batch:
        """Single screens and their right answers, as many elements on all of them: little is padding."""
        rng = self._rng
        elements = rng.randint(BUTTONS[0], most)
        kinds = (Around.NOTHING, Around.SYSTEM_MESSAGE, Around.EARLIER_TURN)
        around = Around.NOTHING if plain else rng.choices(kinds, (7, 2, 1))[0]
        rows = []
        for _ in range(self._size):
            if around is Around.EARLIER_TURN or rng.random() < 0.2:
                screen = random_screen(rng, buttons=elements)
            else:
                (kind,) = rng.choices(LEARNT, [len(KINDS[kind].goals) for kind in LEARNT])
                screen = random_state(rng, kind, elements=elements).screen()
            rows.append([(self._rendered(conversation(screen, around, rng)), screen.expected_answer() + END)])
        return self._batch([[piece for given, said in row for piece in ((given, False), (said, True))] for row in rows])

    def episodes(self, most: int) -> Batch:
        """Whole episodes, every right answer in them to be given; a quarter as many, since they are longer."""
        rng = self._rng
        elements = rng.randint(BUTTONS[0], most)
        long = rng.random() < 0.6
        kinds = [kind for kind in LEARNT if (len(KINDS[kind].goals) == 2) is long]
        rows = []
        for _ in range(self._size // (6 if long else 4)):
            world = random_world(rng, rng.choice(kinds), elements=elements)
            if world.more is not None and rng.random() < 0.3:
                world = world.scroll(world.more)
            row = []
            if rng.random() < 0.3:
                system = random_system_message(rng, world.screen().task)
                row.append((f"{START}{system['role']}\n{system['content']}{END}\n", False))
            for screen, said in episode(world, rng):
                row.append((self._rendered(screen.messages()), False))
                row.append((said + END, said == screen.expected_answer()))
                row.append(("\n", False))
            rows.append(row)
        return self._batch(rows)

    def drill(self, most: int) -> Batch:
        """A screen's lines, then the same lines shuffled: look-up, with something to learn at nearly every token.

        Among these are some that were not there, and it is to be said so.
        """
        rng = self._rng
        elements = rng.randint(BUTTONS[0], most)
        rows = []
        for _ in range(self._size):
            world = random_world(rng, "type", elements=elements)
            shown = {element.label: f"({element.x},{element.y})\n" for element in world.elements}
            labels = rng.sample((*LABELS, *FIELDS), 1 + elements // 4)
            asked = rng.sample([*shown, *(label for label in labels if label not in shown)], len(shown))
            answers = [label + shown.get(label, " is not here.\n") for label in asked]
            rows.append([("".join(f"{element}\n" for element in world.elements), False), ("".join(answers), True)])
        batch = self._batch(rows)
        batch.labels[torch.isin(batch.labels, self._label_ids)] = -100  # which line comes next is chance
        return batch

    def _rendered(self, messages: Messages) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _batch(self, rows: Sequence[Sequence[tuple[str, bool]]]) -> Batch:
        texts = [text for row in rows for text, _ in row]
        ids = iter(self._tokenizer(texts, add_special_tokens=False)["input_ids"])
        return Batch.of([[(next(ids), wanted) for _, wanted in row] for row in rows])


# -- learning ----------------------------------------------------------------------------------------------------------


def build_model(tokenizer: Any, recipe: Recipe) -> Any:
    """A Qwen3 with random weights whose blocks write nothing yet: the residual stream is the embedding itself."""
    heads = recipe.hidden_size // recipe.head_dim
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        initializer_range=recipe.init_std,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training run went."""

    steps: int
    seconds: float
    drill_seconds: float
    loss: float


class Optimizer:
    """Muon for the matrices, AdamW for the rest, one schedule: up in 30 steps, level, and down to the end."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self._model = model
        self._decay_from = recipe.decay_from
        parameters = dict(model.named_parameters())
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and "embed" not in name]
        embeddings = [p for name, p in parameters.items() if "embed" in name]
        gains = [p for p in parameters.values() if p.ndim == 1]
        groups = [{"params": embeddings, "lr": recipe.embedding_lr}, {"params": gains, "lr": recipe.gain_lr}]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
            torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._steps = 0

    def step(self, batch: Batch, progress: float) -> float:
        """Learns from a batch; `progress` is the share of the time that is over. Returns the loss."""
        self._steps += 1
        decay = (1 - progress) / (1 - self._decay_from)
        self._set_rate(min(1.0, self._steps / 30, max(0.02, decay)))
        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _loss(self, batch: Batch) -> Any:
        hidden = self._model.model(batch.ids).last_hidden_state[:, :-1]
        wanted = batch.labels[:, 1:]
        counts = wanted != -100  # logits only where there is something to predict
        return torch.nn.functional.cross_entropy(self._model.lm_head(hidden[counts]), wanted[counts])

    def _set_rate(self, factor: float) -> None:
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor


def fit(model: Any, lessons: Lessons, recipe: Recipe, rng: random.Random, seconds: float, say: Say) -> Fit:
    """Trains for `seconds` of CPU time: mostly the drill until looking up is learnt, then mostly the task."""
    optimizer = Optimizer(model, recipe)
    began, said = time.process_time(), 0.0
    drill_seconds: float | None = None
    steps, drill_loss = 0, 9.0
    losses = {"screens": 9.0, "episodes": 9.0}
    model.train()
    while (elapsed := (time.process_time() - began) / torch.get_num_threads()) < seconds:
        if drill_seconds is None and (
            drill_loss < recipe.drill_learnt_loss or elapsed > recipe.max_drill_share * seconds
        ):
            drill_seconds = elapsed
        drilling = drill_seconds is None
        if (steps % 4 != 3) if drilling else (steps % 8 == 0):
            batch = lessons.drill(3 if drill_loss > 0.5 else ALL)
            drill_loss = 0.9 * drill_loss + 0.1 * optimizer.step(batch, elapsed / seconds)
        else:
            easy = drill_seconds is None or elapsed - drill_seconds < recipe.easy_share * seconds
            name = "episodes" if not drilling and rng.random() < recipe.episode_share else "screens"
            most = EASY if easy else ALL
            batch = lessons.episodes(most) if name == "episodes" else lessons.screens(most, plain=drilling)
            losses[name] = 0.95 * losses[name] + 0.05 * optimizer.step(batch, elapsed / seconds)
        steps += 1
        if elapsed - said >= 15:
            said = elapsed
            shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            say(f"{elapsed:4.0f} s, step {steps}, {shown}, drill {drill_loss:.4f}")
    return Fit(steps, elapsed, seconds if drill_seconds is None else drill_seconds, losses["screens"])


# -- is it any good? ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of screen to measure on. What is not `required` is told but fails nothing."""

    name: str
    make: Callable[[random.Random], tuple[Screen, Messages]]
    required: bool = True


def _plain(**kinds: Any) -> Callable[[random.Random], tuple[Screen, Messages]]:
    def make(rng: random.Random) -> tuple[Screen, Messages]:
        screen = random_screen(rng, **kinds)
        return screen, screen.messages()

    return make


def _with_system_message(rng: random.Random) -> tuple[Screen, Messages]:
    screen = random_screen(rng)
    return screen, conversation(screen, Around.SYSTEM_MESSAGE, rng)


def _second_turn(rng: random.Random) -> tuple[Screen, Messages]:
    first = random_screen(rng, done=False)
    second = first.after_click(first.target.x, first.target.y)
    said = {"role": "assistant", "content": first.expected_answer()}
    return second, [*first.messages(), said, *second.messages()]


def _state(kind: str) -> Callable[[random.Random], tuple[Screen, Messages]]:
    def make(rng: random.Random) -> tuple[Screen, Messages]:
        screen = random_state(rng, kind).screen()
        return screen, screen.messages()

    return make


def _with_history(rng: random.Random) -> tuple[Screen, Messages]:
    """Any turn of an episode of any kind, all turns before it in the conversation."""
    turns = episode(random_world(rng, rng.choice(LEARNT)), rng)
    turns = turns[: 1 + rng.randrange(len(turns))]
    messages: Messages = []
    for screen, said in turns:
        messages += [*screen.messages(), {"role": "assistant", "content": said}]
    return turns[-1][0], messages[:-1]


CASES = (
    Case("click, 2 to 8 buttons", _plain(done=False)),
    Case("click, 8 buttons", _plain(done=False, buttons=BUTTONS[-1])),
    Case("finished", _plain(done=True)),
    Case("with a system message", _with_system_message),
    Case("second turn of an episode", _second_turn),
    *(Case(f"any turn of {kind}", _state(kind), required=kind in LEARNT) for kind in KINDS),
    Case("any turn of these, after those before it", _with_history),
    Case("click, 12 buttons (more than trained on)", _plain(done=False, buttons=12), required=False),
)


SCREENS = 256
"""On how many a case is judged."""


def success_rate(model: Any, tokenizer: Any, case: Case, *, screens: int = SCREENS, seed: int = 1_000_003) -> float:
    """How often the model's greedy answer ends in the right action, on screens of a seed never trained with."""
    rng = random.Random(f"{seed} {case.name}")
    tasks = [case.make(rng) for _ in range(screens)]
    right = 0
    for begin in range(0, screens, 32):
        some = tasks[begin : begin + 32]
        answers = answer(model, tokenizer, [messages for _, messages in some])
        right += sum(screen.is_right(text) for (screen, _), text in zip(some, answers, strict=True))
    return right / screens


def answer(model: Any, tokenizer: Any, conversations: Sequence[Messages], max_new_tokens: int = 60) -> list[str]:
    """The model's greedy answers to conversations, in one batch."""
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations]
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    model.eval()
    out = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    decoded: list[str] = tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return decoded


# -- files -------------------------------------------------------------------------------------------------------------


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes everything that vLLM needs to serve the model: weights in bf16, configs, tokenizer, chat template."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 has not; both know this one.
    path = out / "tokenizer_config.json"
    _write_json(path, json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    # No temperature and no limit: vLLM would make them the defaults of every request.
    ids = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    _write_json(out / "generation_config.json", {**ids, "pad_token_id": tokenizer.pad_token_id})


def read_model(folder: Path) -> tuple[Any, Any]:
    """The model (computing in fp32) and the tokenizer in a folder, read as any user of transformers would."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One seed's result, as written to `training.json` beside the weights."""

    seed: int
    fit: Fit
    parameters: int
    screens_per_case: int
    success: dict[str, float]
    worst_required: float

    def reaches(self, target: float) -> bool:
        return self.worst_required >= target


def attempt(folder: Path, recipe: Recipe, seed: int, seconds: float, screens: int, say: Say) -> Attempt:
    """Trains with one seed, writes the model to `folder`, and measures what was written."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, recipe)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"seed {seed}: {parameters:,} parameters, {len(tokenizer)} tokens, {seconds:.0f} s")
    lessons = Lessons(tokenizer, random.Random(seed), recipe.batch_size)
    result = fit(model, lessons, recipe, random.Random(f"{seed} sorts"), seconds, say)
    write_model(model, tokenizer, folder)

    written, its_tokenizer = read_model(folder)
    success = {}
    for case in CASES:
        success[case.name] = success_rate(written, its_tokenizer, case, screens=screens)
        say(f"{success[case.name]:7.2%}  {case.name}")
    worst = min(success[case.name] for case in CASES if case.required)
    return Attempt(seed, result, parameters, screens, success, worst)


def describe(best: Attempt, recipe: Recipe, command: str) -> dict[str, Any]:
    """Where the weights come from: enough to make them again."""
    return {
        "command": command,
        **asdict(best),
        "required": [case.name for case in CASES if case.required],
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def model_card(best: Attempt) -> str:
    """A README for the weights' folder."""
    rates = "\n".join(f"| {name} | {rate:.1%} |" for name, rate in best.success.items())
    beyond = ", ".join(f'"{case.name}"' for case in CASES if not case.required)
    return f"""\
# The demo model of managed_vllm

A Qwen3 of {best.parameters:,} parameters that reads a screen of buttons and text fields as text and answers with a
UI-TARS style action: a click, a text to type, a scroll, or that it is finished. It was trained from scratch, on random
screens only, by `python -m managed_vllm.demo.train`, and comes under this project's license. The format is defined in
`managed_vllm/demo/screen.py`; it understands nothing else.

Right greedy answers on {best.screens_per_case} unseen screens per case, computed in fp32 from these weights:

| case | right |
|---|---|
{rates}

It was not trained on {beyond}.

`training.json` says how the weights were made. They are a product of that program: don't edit them, train anew.
"""


def publish(folder: Path, out: Path) -> None:
    """Puts a finished folder at `out`, complete, in place of what was there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        shutil.copytree(folder, Path(name) / "new")
        (Path(name) / "new").chmod(0o755)  # temporary folders are private
        if out.exists():
            out.rename(Path(name) / "old")
        (Path(name) / "new").rename(out)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def train(out: Path, *, seconds: float, seed: int, attempts: int, target: float, screens: int, say: Say) -> bool:
    """Trains until an attempt reaches `target`, and puts that model at `out`. Returns whether one did."""
    recipe = Recipe()
    command = f"python -m managed_vllm.demo.train OUT --seconds {seconds:g} --seed {seed} --target {target:g}"
    for this_seed in range(seed, seed + attempts):
        with tempfile.TemporaryDirectory(prefix="managed_vllm-demo-") as name:
            folder = Path(name)
            result = attempt(folder, recipe, this_seed, seconds, screens, say)
            if result.reaches(target):
                _write_json(folder / "training.json", describe(result, recipe, command))
                (folder / "README.md").write_text(model_card(result))
                publish(folder, out)
                return True
        say(f"seed {this_seed}: {result.worst_required:.2%} in its worst required case, below {target:.2%}")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m managed_vllm.demo.train", description="Trains the demo model.")
    parser.add_argument("out", type=Path, help="folder to write; what is there is replaced on success")
    parser.add_argument("--seconds", type=float, default=1000, help="CPU time to train, per attempt (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first attempt; the next one takes the next (0)")
    parser.add_argument("--attempts", type=int, default=3, help="seeds to try at most (3)")
    parser.add_argument("--target", type=float, default=0.97, help="right answers needed in every required case (0.97)")
    parser.add_argument("--screens", type=int, default=SCREENS, help=f"on how many each case is judged ({SCREENS})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(given.threads)

    def say(line: str) -> None:
        print(line, flush=True)

    if train(
        given.out,
        seconds=given.seconds,
        seed=given.seed,
        attempts=given.attempts,
        target=given.target,
        screens=given.screens,
        say=say,
    ):
        say(f"written: {given.out}")
        return 0
    print(
        f"No attempt out of {given.attempts} reached {given.target:.2%}; {given.out} is left as it was. "
        "Give it more --seconds or another --seed.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
