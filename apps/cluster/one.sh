#!/usr/bin/env bash
# One run of a job: the optimizer of its task number, resumed if there is a checkpoint. Called by the *.sbatch files,
# from the root of the repository; arguments are passed to the trainer.
#
# TRAINER  train_cnn, train_mlp or train_autoencoder        OPTIMS  one for each task: "sgd adam kfac lanczos"
# RUN      prefix of the result names                       SEED    random seed, 0
# DEVICE   cuda, or cpu                                     PYTHON  .venv/bin/python
# RESULTS  folder for results
set -euo pipefail

if [[ " $*" == *" --result"[-_]* ]]; then
    echo "give RESULTS and RUN instead of --result_dir and --result_name" >&2
    exit 2
fi
trainer=${TRAINER:-train_cnn}
read -r -a optims <<<"${OPTIMS:-sgd adam kfac lanczos}"
optim=${optims[${SLURM_PROCID:-0}]}
seed=${SEED:-0}
results=${RESULTS:-results}
name=${RUN:-cluster}-$optim-$seed

start=--overwrite # a folder without a checkpoint is that of a run that was stopped before its first
if [[ -f $results/$trainer/$name/checkpoint.pt ]]; then
    start=--resume
fi
exec "${PYTHON:-.venv/bin/python}" "apps/$trainer.py" --optim "$optim" --seed "$seed" --device "${DEVICE:-cuda}" \
    --result_dir "$results" --result_name "$name" --save_every 100 "$start" "$@"
