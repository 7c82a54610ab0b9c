"""dart-gui's own test script and later scripts, from a checkout, on a stage of stand-ins: only imports are changed.

The stage is a folder in which its scripts are run: data files of the checkout, its modules that they need, and
stand-ins for what is not here (verl's trainer, Ray, its cloud of desktops, the model's processor).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = "tests/osworld/test_streaming_task_sampling.py"
IMPORTS = {
    "from transformers import AutoProcessor": "from stand_ins import AutoProcessor",
    "from vllm import SamplingParams": "from managed_vllm import SamplingParams",
    "from verl.utils.dataset.osworld_dataset import OSWorldDataset": "from osworld_dataset import OSWorldDataset",
    "from verl.workers.rollout.osworld_env.streaming_task_scheduler_with_service import": (
        "from managed_vllm.agent.service_scripts import"
    ),
    "from tests.osworld.test_dataset_k8s import release_env": "from stand_ins import release_env",
    "from openai import OpenAI": "from stand_ins import OpenAI",
}
"""What is changed in the script, and nothing else."""

_STAND_INS = '''
import io, os
import openai

class AutoProcessor:
    """The model's processor: the scripts only hand it on, and ask it for the ids of special tokens."""
    tokenizer = None
    @classmethod
    def from_pretrained(cls, *arguments, **options):
        return cls()

def release_env():
    """There is no cloud of desktops to be cleared."""

class OpenAI(openai.OpenAI):
    """At the address of the test, whatever the script has."""
    def __init__(self, base_url=None, api_key=None):
        super().__init__(base_url=os.environ["STAND_IN_URL"], api_key=os.environ.get("STAND_IN_KEY") or api_key)
'''

_RUNNER = '''
import io
from PIL import Image

class TrajectoryRunner:
    """A desktop whose picture changes with each action; what it is asked for is in its log."""
    def __init__(self, task_config=None, max_images=5):
        self.task_config, self.log = task_config, []
    def get_obs(self):
        file = io.BytesIO()
        Image.new("RGB", (280, 196), (len(self.log) * 10 % 256, 80, 120)).save(file, "PNG")
        return {"screenshot": file.getvalue(), "accessibility_tree": None}
    def execute_action(self, code):
        self.log.append(code)
    def get_task_config(self):
        return self.task_config
    def evaluate(self):
        return 1.0 if self.log else 0.0
    def close(self):
        pass
'''

_LATER = '''
import importlib.util, json, os, sys, types
from pathlib import Path
from unittest import mock

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

class Anything(types.ModuleType):
    """In the place of heavy modules that a script imports and these parts of it don't use."""
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()

checkout, out = sys.argv[1:]
for name in ("ray", "verl", "verl.utils", "verl.utils.torch_functional", "verl.models", "verl.models.transformers",
             "verl.models.transformers.qwen2_vl", "verl.utils.dataset", "verl.utils.dataset.vision_utils",
             "verl.utils.database", "verl.utils.database.mysql_bak"):
    sys.modules[name] = Anything(name)
sys.modules["verl.utils.osworld"] = load("verl.utils.osworld", f"{checkout}/verl/utils/osworld.py")

analyze = load("analyze", f"{checkout}/data/staistic/analyze_uitars_trajectories.py")
loader = load("loader", f"{checkout}/tests/osworld/test_dataload.py")
filtering = load("filtering", f"{checkout}/data/script/filter_150.py")
splitter = load("splitter", f"{checkout}/verl/trainer/ppo/trajectory_splitter.py")

root = Path("runs")
root.mkdir(exist_ok=True)
if not (root / "1").exists():
    (root / "1").symlink_to(Path(out).absolute())
found = {"analysed": [], "loaded": 0, "split": 0, "images": 0}
for result in analyze.analyze_uitars_trajectories(str(root)):
    if not result["is_task_summary"]:
        found["analysed"].append([result["task_id"], result["step_count"], result["reward"]])
filtering.extract_valid_tasks_by_domain(str(root), "filtered.json")
found["filtered"] = {domain: len(tasks) for domain, tasks in json.loads(Path("filtered.json").read_text()).items()}
made = splitter.StepwiseTrajectorySplitter.__new__(splitter.StepwiseTrajectorySplitter)
made.limit_messages, made.limit_images = 35, 5
for task in sorted(Path(out).iterdir()):
    for folder in sorted(task.glob("runner_*")):
        found["loaded"] += loader.is_valid_dataset_folder(folder)[0]
        made.root_dir = str(task)
        for messages, config in made.split_dataset_id(folder.name):
            found["split"] += 1
            assert messages[-1]["role"] == "assistant" and messages[0]["role"] == "system"
            for message in messages:  # as its _get_inputs opens them
                for part in message["content"] if isinstance(message["content"], list) else ():
                    if part["type"] == "image":
                        splitter.Image.open(os.path.join(made.root_dir, folder.name, f"{part['image']}.png")).load()
                        found["images"] += 1
print(json.dumps(found))
'''


def set_stage(checkout: Path, stage: Path, tasks: int | None = None) -> Path:
    """Makes the stage; returns the script, its imports changed. `tasks`: only so many of its dataset."""
    import json

    for name in ("examples/config_debug.yml", "evaluation_examples", "mm_agents/prompts.py"):
        source, target = checkout / name, stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    shutil.copyfile(checkout / "verl/utils/dataset/osworld_dataset.py", stage / "osworld_dataset.py")
    if tasks is not None:
        path = stage / "evaluation_examples/test_simple_task_v3.json"
        given = [(kind, each) for kind, some in json.loads(path.read_text()).items() for each in some][:tasks]
        path.write_text(json.dumps({kind: [each for it, each in given if it == kind] for kind, _ in given}))
    (stage / "stand_ins.py").write_text(_STAND_INS)
    runner = stage / "verl/workers/rollout/osworld_env/run_agent_loop.py"
    runner.parent.mkdir(parents=True)
    runner.write_text(_RUNNER)
    text = (checkout / SCRIPT).read_text(encoding="utf-8")
    for before, after in IMPORTS.items():
        text, changed = re.subn(rf"^(\s*){re.escape(before)}", rf"\1{after}", text, flags=re.MULTILINE)
        assert changed == 1, f"the script has no {before!r} any more"
    script = stage / "the_script.py"
    script.write_text(text, encoding="utf-8")
    return script


def run_script(script: Path, environ: dict[str, str], timeout_s: float = 500) -> str:
    """Runs the script as its own `__main__`; what it prints. Raises `AssertionError`: it failed."""
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, env=environ, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def read_back(checkout: Path, script: Path, environ: dict[str, str]) -> str:
    """What its later scripts find in the folders that the run has left, as JSON."""
    (script.parent / "later.py").write_text(_LATER)
    done = subprocess.run(
        [sys.executable, "later.py", str(checkout.absolute()), "tmp_streaming_test_v3"],
        cwd=script.parent, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]
