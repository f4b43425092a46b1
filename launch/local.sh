#!/usr/bin/env bash
# Start a cluster of NODES nodes on this machine, for trying things out:
#
#     launch/local.sh NODES MODEL [option of tpdist serve]...
#
# RANKS_PER_NODE (1), HEAD_PORT (7100) and HTTP_PORT (8000: node n answers on HTTP_PORT + n) may be set.
# Ctrl-C stops all nodes. Ends with the code of the first node, head first, that failed.
set -euo pipefail
# Each node has a process group of its own: a signal to all of this script's reaches it once, through the trap.
set -m

if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
nodes=$1 model=$2
shift 2
ranks=${RANKS_PER_NODE:-1} head_port=${HEAD_PORT:-7100} http_port=${HTTP_PORT:-8000}

export MISTRALRS_MN_GLOBAL_WORLD_SIZE=$((nodes * ranks)) MISTRALRS_MN_LOCAL_WORLD_SIZE=$ranks
pids=()
for name in INT TERM HUP; do
    # shellcheck disable=SC2064
    trap "kill -$name \"\${pids[@]}\" 2>/dev/null || true" "$name"
done

MISTRALRS_MN_HEAD_NUM_WORKERS=$((nodes - 1)) MISTRALRS_MN_HEAD_PORT=$head_port \
    tpdist serve "$model" --port "$http_port" "$@" &
pids+=($!)
for ((id = 0; id < nodes - 1; id++)); do
    MISTRALRS_MN_WORKER_ID=$id MISTRALRS_MN_WORKER_SERVER_ADDR=127.0.0.1:$head_port \
        tpdist serve "$model" --port $((http_port + id + 1)) "$@" &
    pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
    # A signal to this script interrupts `wait`: wait again until the node itself has ended.
    while true; do
        wait "$pid" && ended=0 || ended=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    if [ "$code" = 0 ]; then code=$ended; fi
done
exit "$code"
