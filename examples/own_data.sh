#!/usr/bin/env bash
# From a folder of one's own images, and a vision transformer from elsewhere, to a network on the hub.
#
#   bash examples/own_data.sh DATA TEACHER REPOSITORY WORKDIR [--config.KEY=VALUE ...]
#
# DATA        train/CLASS/* and val/CLASS/*
# TEACHER     a checkpoint of timm (.pth, .safetensors) or of Google (.npz) with a head of these classes
# REPOSITORY  OWNER/NAME on the Hugging Face hub ($HF_TOKEN; $HF_ENDPOINT: another hub)
# WORKDIR     directory of the run
#
# It takes the python of an active environment, with the extras convert, report and hub; further
# flags go to m2mkd_jax.main (examples/own_data.py has the config).
set -euo pipefail
(($# >= 4)) || { sed -n '2,14p' "$0" >&2; exit 2; }
data=$1 teacher=$2 repository=$3 workdir=$4
shift 4
classes=$(find "$data/train" -mindepth 1 -maxdepth 1 -type d | wc -l)

echo "== the images"
python -m m2mkd_jax.data.check "$data"

echo "== training"
python -m m2mkd_jax.main --config=examples/own_data.py --workdir="$workdir" \
  --config.data.root="$data" --config.data.classes="$((classes))" \
  --config.init.teacher="$teacher" "$@"

echo "== the report"
python -m m2mkd_jax.report "$workdir" --no_analysis

echo "== what the network says of the validation images"
python -m m2mkd_jax.predict "$workdir" "$data/val" --quiet --csv="$workdir/predictions.csv"

echo "== for other programs"
python -m m2mkd_jax.export "$workdir" "$workdir/network.stablehlo" --format=stablehlo --overwrite

echo "== the hub"
python -m m2mkd_jax.push "$workdir" "$repository"

echo "== a fresh process"
python - "$workdir" "$repository" <<'PYTHON'
import sys

import numpy as np

import m2mkd_jax

here, there = m2mkd_jax.load(sys.argv[1]), m2mkd_jax.load(f"hf://{sys.argv[2]}")
size = here.image_size
images = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
assert (np.asarray(here(images)) == np.asarray(there(images))).all(), "other logits"
print(f"equal logits; classes: {', '.join(there.class_names)}")
PYTHON
