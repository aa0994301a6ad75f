#!/usr/bin/env bash
# Pretrains a small sparse early-fusion model on real handwritten digits and reports what it learned.
# `bash tools/quickstart.sh dense` trains its dense twin of equal FLOPs. More arguments are overrides: train.steps=500
set -eu
. "$(dirname "$0")/setup.sh"
recipe=recipes/quickstart.yaml
if [ "${1:-}" = dense ]; then
    recipe=recipes/quickstart_dense.yaml
    shift
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m tools.examples.make_digits data/digits
deepspeed --num_accelerators 2 --module pretrain.train "$recipe" "$@"
python -m tools.examples.evaluate_digits "$recipe" "$@"
