#!/usr/bin/env bash
# Every worker of a Cloud TPU VM runs the same command; JAX finds the other workers by itself.
#
#   launch/tpu_vm.sh --name=my-tpu --zone=us-central2-b [--directory=gptjax] [--dry_run] -- \
#       --config=configs/llama_1b.py --workdir=/mnt/shared/runs/llama
#
# The clone must be in the home folder of each worker, under --directory, with its virtual
# environment in .venv.
set -euo pipefail
name= zone= directory=gptjax dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --directory=*) directory=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) echo "error: unknown flag $1; flags of gptjax.train come after --" >&2; exit 2 ;;
    esac
    shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
    echo "error: --name and --zone of the TPU VM are needed" >&2
    exit 2
fi
remote="cd $directory && .venv/bin/python -m gptjax.train --distributed$(printf ' %q' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
