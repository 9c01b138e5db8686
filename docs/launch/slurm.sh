#!/usr/bin/env bash
# GPUs under SLURM, one process per GPU: the processes find each other through SLURM's variables.
#
#   sbatch --nodes 4 docs/launch/slurm.sh tnl-1b --mesh.fsdp 8 --mesh.seq 4 --out /shared/runs/tnl-1b
#
# --out must lie on a file system that all nodes see. Two minutes before its time ends every
# process gets SIGTERM: all save after the same step, and the job goes back into the queue, where
# the same command resumes.
#SBATCH --job-name=longctx
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# If one process dies, the others end by themselves; --kill-on-bad-exit spares the wait.
srun --kill-on-bad-exit=1 longctx train "$@"
code=$?
if [ "$code" -eq 143 ]; then # stopped by the signal, with everything saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
