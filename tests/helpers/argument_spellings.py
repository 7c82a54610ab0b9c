"""Engine arguments that vLLM reads as the same, spelt as keywords (a dict) and as command-line words (a list)."""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

SAME: list[tuple[list[str] | Arguments, ...]] = [
    ({"max_model_len": 512}, {"max_model_len": "512"}, {"max_model_len": 512.0}, {"max-model-len": 512}),
    (["--max-model-len", "512"], ["--max_model_len=512"], {"max_model_len": 512}),
    ({"max_model_len": "4k"}, {"max_model_len": 4000}, ["--max-model-len", "4k"]),
    ({"max_model_len": "4K"}, {"max_model_len": 4096}),
    ({"max_model_len": "auto"}, {"max_model_len": -1}),
    ({"kv_cache_memory_bytes": "1.5g"}, {"kv_cache_memory_bytes": 1_500_000_000}),
    ({"gpu_memory_utilization": 0.9}, {"gpu_memory_utilization": "0.90"}, ["--gpu-memory-utilization", ".9"]),
    ({"gpu_memory_utilization": 0.9}, ["--device-memory-utilization", "0.9"]),
    ({}, {"tensor_parallel_size": 1}, {"enforce_eager": False}, {"no_enforce_eager": True}, {"dtype": None}),
    ({}, ["--no-enforce-eager", "--seed=0", "-tp", "1"], {"limit_mm_per_prompt": {}}, {"lora_modules": []}),
    (["-tp", "2"], ["-tp=2"], {"tensor_parallel_size": 2}),
    (["-ep"], {"enable_expert_parallel": True}),
    (["-O3"], ["-O", "3"], ["-O=3"], {"optimization_level": 3}),
    (["--limit-mm-per-prompt.image", "2"], ["--limit-mm-per-prompt", '{"image": 2}'], {"limit_mm_per_prompt.image": 2}),
    ({"limit_mm_per_prompt": {"image": 2, "video": 0}}, {"limit_mm_per_prompt": '{"video": 0, "image": 2}'}),
    (["-cc.mode", "3", "-cc.splitting_ops+", "a,b"], {"compilation_config": {"mode": 3, "splitting_ops": ["a", "b"]}}),
    (["--a.b.c", "80g", "--a.b.d=x"], {"a": {"b": {"c": 80_000_000_000, "d": "x"}}}),
    ({"lora_modules": ["a=/b"]}, {"lora_modules": "a=/b"}, ["--lora-modules", "a=/b"]),
    ({"allowed_origins": ["*"]}, {"allowed_origins": '["*"]'}, ["--allowed-origins", '["*"]']),
]
