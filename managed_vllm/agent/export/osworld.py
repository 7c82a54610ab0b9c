"""For OSWorld's own scripts: results where and as its runner (`lib_run_single.py`) leaves them.

    pyautogui/screenshot/MODEL/DOMAIN/ID/result.txt                     the reward
                                         traj.jsonl                     a line an action
                                         step_1_20260102@030405….png    what was seen after it
    pyautogui/screenshot/MODEL/args.json                                the model

    python show_result.py --result_dir OUT --model MODEL        # of OSWorld

OSWorld plays each task once: of a group, the first rollout is there; the others are in `rollout-1`, `rollout-2`, …,
each a `--result_dir` of its own. The domain is `Task.data["domain"]` (`osworld_tasks`), else its `snapshot`, else
`other`. With accessibility trees `screenshot` is `screenshot_a11y_tree`, or `a11y_tree` where nothing else was seen.

An attempt that failed has no `result.txt`, so that it counts as not played, and a line `{"Error": …}`, as there. Unlike
there, an answer that is no action has a line, too (`"action": ""`, with its `parse_error`); a run has one screenshot a
turn, so that of several actions in a turn only the last one has a `screenshot_file`.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from managed_vllm.agent.actions import Action, CallUser, Finished, Wait, to_pyautogui
from managed_vllm.agent.export.dart import file_name, write_png
from managed_vllm.agent.export.samples import reward_of
from managed_vllm.agent.image_store import ImageStore
from managed_vllm.agent.types import ImageRef, Step, Trajectory
from managed_vllm.errors import ExportError


class OSWorldWriter:
    """Writes a folder for each trajectory, below one for the model."""

    def __init__(self, folder: Path, images: ImageStore, model: str | None) -> None:
        """`model`: of trajectories without a step."""
        self._folder = folder
        self._images = images
        self._model = model or "model"
        self._there: set[ImageRef] = set()
        self.cuts: Counter[str] = Counter()

    @property
    def images(self) -> int:
        """Distinct images so far."""
        return len(self._there)

    def add(self, trajectory: Trajectory) -> int:
        """Raises `ExportError`: two tasks would have the same folder, or the reward is no number."""
        reward = reward_of(trajectory)
        model = self._model_folder(trajectory)
        folder = model / file_name(domain_of(trajectory)) / file_name(trajectory.task.id)
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            raise ExportError(f"{trajectory.task.id}: another task has the folder {folder.name}, too") from error
        if not (model / "args.json").exists():
            about = {"action_space": "pyautogui", "observation_type": model.parent.name, "model": model.name}
            (model / "args.json").write_text(json.dumps(about, indent=1) + "\n")
        lines = [json.dumps(line, ensure_ascii=False, default=str) for line in self._lines(trajectory, folder)]
        (folder / "traj.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if reward is not None:  # the last: whoever sees it sees all
            (folder / "result.txt").write_text(f"{reward}\n")
        return 1

    def close(self) -> None:
        """Every file is closed already."""

    def _model_folder(self, trajectory: Trajectory) -> Path:
        root = self._folder if trajectory.rollout == 0 else self._folder / f"rollout-{trajectory.rollout}"
        asked = next((step.model for step in trajectory.steps if step.model), self._model)
        return root / "pyautogui" / _seen_by(trajectory) / file_name(asked)

    def _lines(self, trajectory: Trajectory, folder: Path) -> Iterator[dict[str, Any]]:
        for number, step in enumerate(trajectory.steps):
            following = trajectory.steps[number + 1 : number + 2]
            after = following[0].screenshot if following else trajectory.final_screenshot
            yield from self._turn(step, after, folder)
        if trajectory.failure is not None:
            yield {"Error": f"{domain_of(trajectory)}/{trajectory.task.id} - {trajectory.failure}"}

    def _turn(self, step: Step, after: ImageRef | None, folder: Path) -> Iterator[dict[str, Any]]:
        stamp = _stamp(step)
        common = {"step_num": step.index + 1, "action_timestamp": stamp, "response": step.response}
        nothing = {"reward": 0, "done": False, "info": {}, "screenshot_file": None}
        if not step.executed:
            yield {**common, "action": "", **nothing, "parse_error": step.parse_error}
            return
        *earlier, last = step.actions[: step.executed]
        for action in earlier:
            yield {**common, "action": action_source(action), **nothing}
        file = None if after is None else self._picture(after, folder / f"step_{step.index + 1}_{stamp}.png")
        done = step.terminated or step.truncated
        told = {"reward": step.reward or 0, "done": done, "info": dict(step.info), "screenshot_file": file}
        yield {**common, "action": action_source(last), **told}

    def _picture(self, ref: ImageRef, target: Path) -> str:
        write_png(self._images, ref, target)
        self._there.add(ref)
        return target.name


def domain_of(trajectory: Trajectory) -> str:
    """The domain of a trajectory's task."""
    found = (trajectory.task.data.get(key) for key in ("domain", "snapshot"))
    return next((name for name in found if isinstance(name, str) and name), "other")


def action_source(action: Action) -> str:
    """What `DesktopEnv.step` is given for an action; what it does not have (`Swipe`, `Custom`) as it is."""
    match action:
        case Finished():
            return "DONE"
        case CallUser():
            return "FAIL"
        case Wait():
            return "WAIT"
    try:
        return to_pyautogui(action)
    except ValueError:
        return repr(action)


def _seen_by(trajectory: Trajectory) -> str:
    shown = any(step.screenshot is not None for step in trajectory.steps)
    told = any(step.text is not None for step in trajectory.steps)
    return {(True, True): "screenshot_a11y_tree", (False, True): "a11y_tree"}.get((shown, told), "screenshot")


def _stamp(step: Step) -> str:
    """When the answer was there and its actions began, in the runner's notation."""
    times = step.timings
    moment = datetime.datetime.fromtimestamp(times.started_at + times.queue_s + times.model_s)
    return moment.strftime("%Y%m%d@%H%M%S%f")
