"""Multi-turn rollouts: environments that run at their own pace, exact records, and runs that can be resumed.

    from managed_vllm import ManagedVLLM
    from managed_vllm.agent import Limits, RunStore, StreamingTaskScheduler

    with ManagedVLLM("ByteDance-Seed/UI-TARS-1.5-7B") as llm, RunStore.create("run-1", {"model": llm.model}) as store:
        scheduler = StreamingTaskScheduler(llm, make_environment, n=8, max_concurrency=64, store=store)
        for trajectory in scheduler.run_all(tasks):
            print(trajectory.key, trajectory.reward, trajectory.stop_reason)

The public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME_OF = {
    "AgentFormat": "managed_vllm.agent.format",
    "History": "managed_vllm.agent.prompting",
    "DesktopEnvironment": "managed_vllm.agent.environments.desktop",
    "Environment": "managed_vllm.agent.environment",
    "Failure": "managed_vllm.agent.types",
    "FailureClass": "managed_vllm.agent.types",
    "Group": "managed_vllm.agent.types",
    "GroupPolicy": "managed_vllm.agent.rollout_policies",
    "GymnasiumEnvironment": "managed_vllm.agent.environments.gymnasium",
    "ImageRef": "managed_vllm.agent.types",
    "ImageStore": "managed_vllm.agent.image_store",
    "Limits": "managed_vllm.agent.types",
    "MiniWoBEnvironment": "managed_vllm.agent.environments.miniwob",
    "OSWorldEnvironment": "managed_vllm.agent.environments.osworld",
    "OpenEnvEnvironment": "managed_vllm.agent.environments.openenv",
    "Observation": "managed_vllm.agent.types",
    "ParseErrorPolicy": "managed_vllm.agent.format",
    "ProcessEnvironment": "managed_vllm.agent.environments.process_environment",
    "RecordedEpisode": "managed_vllm.agent.recording.episodes",
    "RecordingGateway": "managed_vllm.agent.recording.gateway",
    "RetryRollouts": "managed_vllm.agent.rollout_policies",
    "RunStore": "managed_vllm.agent.store",
    "Step": "managed_vllm.agent.types",
    "StepResult": "managed_vllm.agent.types",
    "StepTimings": "managed_vllm.agent.types",
    "StopReason": "managed_vllm.agent.types",
    "StreamingTaskScheduler": "managed_vllm.agent.scheduler",
    "Task": "managed_vllm.agent.types",
    "ThenWhat": "managed_vllm.agent.format",
    "ThreadEnvironment": "managed_vllm.agent.environments.thread_environment",
    "Trajectory": "managed_vllm.agent.types",
    "embedded": "managed_vllm.agent.format",
    "json_actions": "managed_vllm.agent.format",
    "python_code": "managed_vllm.agent.model_formats",
    "autoglm": "managed_vllm.agent.model_formats",
    "glm_v": "managed_vllm.agent.model_formats",
    "qwen_vl": "managed_vllm.agent.model_formats",
    "android_world": "managed_vllm.agent.model_formats",
    "hosted": "managed_vllm.agent.model_formats",
    "holo": "managed_vllm.agent.model_formats",
    "scalecua": "managed_vllm.agent.model_formats",
    "seed": "managed_vllm.agent.model_formats",
    "recorder": "managed_vllm.agent.recording.gateway",
    "rescore": "managed_vllm.agent.rescoring",
    "run_agent_loop": "managed_vllm.agent.runners",
    "run_episode": "managed_vllm.agent.episode",
    "run_on_ray": "managed_vllm.agent.ray_rollouts",
    "tool_calls": "managed_vllm.agent.format",
    "ui_tars": "managed_vllm.agent.format",
}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from managed_vllm.agent.environment import Environment as Environment
    from managed_vllm.agent.environments.desktop import DesktopEnvironment as DesktopEnvironment
    from managed_vllm.agent.environments.gymnasium import GymnasiumEnvironment as GymnasiumEnvironment
    from managed_vllm.agent.environments.miniwob import MiniWoBEnvironment as MiniWoBEnvironment
    from managed_vllm.agent.environments.openenv import OpenEnvEnvironment as OpenEnvEnvironment
    from managed_vllm.agent.environments.osworld import OSWorldEnvironment as OSWorldEnvironment
    from managed_vllm.agent.environments.process_environment import ProcessEnvironment as ProcessEnvironment
    from managed_vllm.agent.environments.thread_environment import ThreadEnvironment as ThreadEnvironment
    from managed_vllm.agent.episode import run_episode as run_episode
    from managed_vllm.agent.format import AgentFormat as AgentFormat
    from managed_vllm.agent.format import ParseErrorPolicy as ParseErrorPolicy
    from managed_vllm.agent.format import ThenWhat as ThenWhat
    from managed_vllm.agent.format import embedded as embedded
    from managed_vllm.agent.format import json_actions as json_actions
    from managed_vllm.agent.format import tool_calls as tool_calls
    from managed_vllm.agent.format import ui_tars as ui_tars
    from managed_vllm.agent.image_store import ImageStore as ImageStore
    from managed_vllm.agent.model_formats import android_world as android_world
    from managed_vllm.agent.model_formats import autoglm as autoglm
    from managed_vllm.agent.model_formats import glm_v as glm_v
    from managed_vllm.agent.model_formats import holo as holo
    from managed_vllm.agent.model_formats import hosted as hosted
    from managed_vllm.agent.model_formats import python_code as python_code
    from managed_vllm.agent.model_formats import qwen_vl as qwen_vl
    from managed_vllm.agent.model_formats import scalecua as scalecua
    from managed_vllm.agent.model_formats import seed as seed
    from managed_vllm.agent.prompting import History as History
    from managed_vllm.agent.ray_rollouts import run_on_ray as run_on_ray
    from managed_vllm.agent.recording.episodes import RecordedEpisode as RecordedEpisode
    from managed_vllm.agent.recording.gateway import RecordingGateway as RecordingGateway
    from managed_vllm.agent.recording.gateway import recorder as recorder
    from managed_vllm.agent.rescoring import rescore as rescore
    from managed_vllm.agent.rollout_policies import GroupPolicy as GroupPolicy
    from managed_vllm.agent.rollout_policies import RetryRollouts as RetryRollouts
    from managed_vllm.agent.runners import run_agent_loop as run_agent_loop
    from managed_vllm.agent.scheduler import StreamingTaskScheduler as StreamingTaskScheduler
    from managed_vllm.agent.store import RunStore as RunStore
    from managed_vllm.agent.types import Failure as Failure
    from managed_vllm.agent.types import FailureClass as FailureClass
    from managed_vllm.agent.types import Group as Group
    from managed_vllm.agent.types import ImageRef as ImageRef
    from managed_vllm.agent.types import Limits as Limits
    from managed_vllm.agent.types import Observation as Observation
    from managed_vllm.agent.types import Step as Step
    from managed_vllm.agent.types import StepResult as StepResult
    from managed_vllm.agent.types import StepTimings as StepTimings
    from managed_vllm.agent.types import StopReason as StopReason
    from managed_vllm.agent.types import Task as Task
    from managed_vllm.agent.types import Trajectory as Trajectory


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME_OF))
