#!/usr/bin/env bash
# A server in the background for work in the shell: the successor of start_vllm_service.sh.
#
#   examples/service.sh start [--tensor-parallel-size 2 …]   every flag of vLLM is passed through
#   examples/service.sh status | check | logs | stop
#
# MODEL (default: demo) says what is served, CUDA_VISIBLE_DEVICES on which GPUs. `up` keeps a lease of its own, so the
# server stays until `stop`; Python programs on this machine share it by asking for the same model and arguments.
set -euo pipefail

MODEL=${MODEL:-demo}
NAME=${NAME:-service}

case ${1:-} in
    start) exec managed-vllm up --model "$MODEL" --name "$NAME" "${@:2}" ;;
    status) exec managed-vllm status ;;
    # Without a URL: the server found by the rules of ManagedVLLM(); with VLLM_SERVER_URL set: that one.
    check) exec managed-vllm check "${@:2}" ;;
    logs) exec managed-vllm logs -f "$NAME" ;;
    stop) exec managed-vllm down "$NAME" ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
        exit 2
        ;;
esac
