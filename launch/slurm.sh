#!/usr/bin/env bash
# A SLURM job: one process per node, with all of its GPUs in the mesh. JAX learns about the cluster
# from srun's environment variables.
#
#   launch/slurm.sh [--nodes=2] [--gpus=8] [--time=24:00:00] [--partition=NAME] [--dry_run] -- \
#       --config=configs/gpt2_124m.py --workdir=/shared/runs/gpt2
#
# All nodes must see the workdir in their file system. Before the time limit SLURM sends SIGTERM;
# the run saves and stops, the job is queued again, and the same command continues the run.
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
# 130: stopped by the signal, and saved; the same command continues in the next allocation
if [ "\${code:-0}" = 130 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\${code:-0}"
JOB
)
if [ -n "$dry_run" ]; then
    echo "$script"
else
    sbatch <<<"$script"
fi
