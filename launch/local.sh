#!/usr/bin/env bash
# Several processes on this machine, each with its part of the mesh: to rehearse a cluster, or one
# process per GPU.
#
#   launch/local.sh [--processes=2] [--devices=1] [--port=12355] [--dry_run] -- \
#       --config=configs/debug.py --workdir=runs/debug
#
# --devices is the number of fake CPU devices per process, for machines without accelerators. With
# --devices=0, process i uses GPU i.
set -euo pipefail
processes=2 devices=1 port=12355 dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) echo "error: unknown flag $1; flags of gptjax.train come after --" >&2; exit 2 ;;
    esac
    shift
done
pids=()
for ((i = 0; i < processes; i++)); do
    environment=(
        JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$i"
    )
    if [ "$devices" -gt 0 ]; then
        environment+=(
            JAX_PLATFORMS=cpu
            JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
            "XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
        )
    else
        environment+=(CUDA_VISIBLE_DEVICES="$i")
    fi
    if [ -n "$dry_run" ]; then
        echo "env ${environment[*]} python -m gptjax.train $*"
    else
        env "${environment[@]}" "${PYTHON:-python}" -m gptjax.train "$@" &
        pids+=($!)
    fi
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
status=0
for _ in ${pids[@]+"${pids[@]}"}; do
    wait -n || { # one failed: the others would wait for it forever
        status=$?
        kill -TERM "${pids[@]}" 2>/dev/null || true
    }
done
exit "$status"
