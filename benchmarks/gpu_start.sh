#!/bin/sh
# benchmarks/start.py for models of a real size on one GPU, with dummy weights, and the tests that need a GPU.
#
#   sh benchmarks/gpu_start.sh MODELS [ROUNDS]
#
# MODELS is a folder with config and tokenizer of each model in a folder of its own: qwen25vl7b and qwen3_8b_dummy. The
# kills run under 64 requests; a model without weights says nonsense, at the same speed. Every part is bounded, and runs
# whether or not the one before it has succeeded. About twelve minutes with one round.
models=${1:?the folder of the models}
rounds=${2:-1}
here=$(dirname "$0")
out=${OUT:-.}
status=0

start() {
    timeout 400 python3 "$here/start.py" --rounds "$rounds" --model "$models/$1" --engine "$2" --recovery 0.6 \
        --json "$out/gpu_start_$1.json" || status=1
}

start qwen3_8b_dummy '{"load_format": "dummy", "enforce_eager": true, "max_model_len": 4096, "gpu_memory_utilization": 0.6}'
start qwen25vl7b '{"load_format": "dummy", "enforce_eager": true, "max_model_len": 4096, "gpu_memory_utilization": 0.6}'
timeout 300 python3 -m pytest -q -m gpu "$here/../tests/real" || status=1
exit $status
