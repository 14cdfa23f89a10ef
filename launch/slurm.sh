#!/usr/bin/env bash
# A SLURM job: one process per node, all of its GPUs in the mesh. JAX reads the cluster from srun's environment.
#
#   launch/slurm.sh [--nodes=2] [--gpus=8] [--time=24:00:00] [--partition=NAME] [--dry_run] -- --config=configs/gpt2_124m.py --workdir=/shared/runs/gpt2
#
# The workdir must be on a file system that all nodes see. Before the time limit SLURM sends SIGTERM, the run saves, and the job is
# queued again; the same command then goes on.
set -euo pipefail
nodes=2 gpus=8 time=24:00:00 partition= dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) echo "error: unknown flag $1; flags of gptjax.train come after --" >&2; exit 2 ;;
    esac
    shift
done
script=$(
    cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=gptjax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$time
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
${partition:+#SBATCH --partition=$partition}
srun python -m gptjax.train --distributed$(printf ' %q' "$@") || code=\$?
# 130: stopped by the signal, everything saved; the same command goes on in the next allocation
if [ "\${code:-0}" = 130 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\${code:-0}"
JOB
)
if [ -n "$dry_run" ]; then
    echo "$script"
else
    sbatch <<<"$script"
fi
