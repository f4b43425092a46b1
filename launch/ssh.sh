#!/usr/bin/env bash
# Start one node on each HOST over ssh; the first one is the head:
#
#     GLOBAL_WORLD_SIZE=16 launch/ssh.sh MODEL HOST HOST...
#
# GLOBAL_WORLD_SIZE is the number of GPUs on all hosts. HEAD_PORT (7100), TPDIST_KEY_FILE (a path on every host) and
# SERVE_OPTIONS (more options of tpdist serve) may be set. tpdist must be on the PATH of each host, MODEL at the same
# place. Ctrl-C stops all nodes. Ends with the code of the head.
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${GLOBAL_WORLD_SIZE:-}" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
model=$1 head=$2
shift 2
head_port=${HEAD_PORT:-7100}

start() { # HOST VARIABLE=VALUE...: start a node there, with these variables
    local host=$1
    shift
    if [ -n "${TPDIST_KEY_FILE:-}" ]; then set -- "$@" "TPDIST_KEY_FILE=$TPDIST_KEY_FILE"; fi
    # -tt: the node gets a terminal of its own, and so a hangup when this ssh ends.
    # shellcheck disable=SC2029,SC2086
    ssh -tt "$host" "env MISTRALRS_MN_GLOBAL_WORLD_SIZE=$GLOBAL_WORLD_SIZE $(printf '%q ' "$@")" \
        "tpdist serve $(printf '%q' "$model") ${SERVE_OPTIONS:-}" </dev/null
}

id=0
for host in "$@"; do
    start "$host" "MISTRALRS_MN_WORKER_ID=$id" "MISTRALRS_MN_WORKER_SERVER_ADDR=${head#*@}:$head_port" &
    id=$((id + 1))
done
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
start "$head" "MISTRALRS_MN_HEAD_NUM_WORKERS=$#" "MISTRALRS_MN_HEAD_PORT=$head_port"
wait
