#!/usr/bin/env bash
#SBATCH --job-name=managed-vllm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# One server a node, and a program that uses all of them:
#
#   sbatch examples/slurm.sh Qwen/Qwen3-8B --tensor-parallel-size 8 -- python train.py
#
# Before -- stands what each `managed-vllm serve` is told. The program runs on the first node, once all of them serve,
# with VLLM_SERVER_URL and VLLM_API_KEY: a bare ManagedVLLM() takes these. The servers end with it, or with the job.
# They are found through a folder that all nodes must share: SHARED, by default the current one. Nobody else may read
# what is made in there, since it has the key, which goes over the cluster's network as plain HTTP.
#
# PORT (8000): where each listens; LISTEN (0.0.0.0): on which of its addresses.
set -euo pipefail
umask 077

serve=()
while (($#)) && [[ $1 != -- ]]; do serve+=("$1") && shift; done
if (($# < 2)) || ((!${#serve[@]})) || [[ -z ${SLURM_JOB_ID:-} ]]; then
    sed -n '/^# One/,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
fi
shift

export SHARED=${SHARED:-$PWD}/servers-$SLURM_JOB_ID PORT=${PORT:-8000} LISTEN=${LISTEN:-0.0.0.0}
mkdir "$SHARED" "$SHARED/urls"
trap 'rm -rf "$SHARED"' EXIT
od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$SHARED/key"

one_server() {
    # A state directory of the job's own: no other job of yours on the node shares the server, whose GPUs are not its.
    MANAGED_VLLM_HOME=${TMPDIR:-/tmp}/managed-vllm-$SLURM_JOB_ID-$SLURM_LOCALID
    export MANAGED_VLLM_HOME
    local port=$((PORT + SLURM_LOCALID))
    managed-vllm serve "$@" --host "$LISTEN" --port $port --api-key-file "$SHARED/key" --keep-alive 0 &
    local server=$!
    until managed-vllm check "http://$SLURMD_NODENAME:$port" --api-key-file "$SHARED/key" > /dev/null 2>&1; do
        kill -0 $server 2> /dev/null || exit 1 # it has said why
        sleep 1
    done
    echo "http://$SLURMD_NODENAME:$port" > "$SHARED/.$SLURM_PROCID"
    mv "$SHARED/.$SLURM_PROCID" "$SHARED/urls/$SLURM_PROCID" # whole, or not there
    # Not by a signal: srun takes SIGTERM for an order to kill all at once.
    while [[ ! -e $SHARED/over ]] && kill -0 $server 2> /dev/null; do sleep 1; done
    kill $server 2> /dev/null || true
    wait $server || true
    managed-vllm down --all --force > /dev/null 2>&1 || true # waits until it is gone
    rm -rf "$MANAGED_VLLM_HOME"
}
export -f one_server

srun --kill-on-bad-exit=1 bash -c 'one_server "$@"' one_server "${serve[@]}" &
servers=$!
while (($(find "$SHARED/urls" -type f | wc -l) < SLURM_NTASKS)); do
    kill -0 $servers 2> /dev/null || { wait $servers || exit $?; exit 1; } # one did not start: its exit code
    sleep 1
done

code=0
VLLM_SERVER_URL=$(cat "$SHARED"/urls/* | paste -sd,) VLLM_API_KEY=$(cat "$SHARED/key") "$@" || code=$?
touch "$SHARED/over"
wait $servers || true
exit $code
