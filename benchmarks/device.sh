#!/usr/bin/env bash
# What is measured on a GPU, on a borrowed machine without a network, the most important first.
#
#   benchmarks/device.sh wheels DIR              here: what that machine lacks, as wheels (64 MiB)
#   benchmarks/device.sh run DIR OUT [NAME ...]  there: everything, or the named items alone
#   benchmarks/device.sh rehearsal OUT           here: small sizes, on a CPU, what is installed
#
# The machine has Python 3.12, jax for CUDA 13, flax, optax, orbax, einops, torch and timm. Every
# item is a process with a time limit of its own; all of them end within LIMIT seconds (540), what
# no time is left for is skipped. OUT gets, as they come:
#
#   summary.txt    a line per item: how it ended, seconds
#   log.txt        what the items print
#   results.jsonl  a line per item with numbers, as its --json gives them
#
# Compiled programs are kept in TMPDIR or /tmp, so that a second call on the same machine is faster.
set -euo pipefail
cd "$(dirname "$0")/.."

# What the package needs and that machine has not; promise comes as source alone.
PACKAGES=(grain array_record ml_collections clu tensorflow-datasets tensorflow-metadata
  googleapis-common-protos importlib_resources immutabledict dm-tree simple-parsing
  docstring_parser termcolor toml promise)

usage() { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }

wheels() {  # DIR
  local dir=$1 platforms=() package
  mkdir -p "$dir"
  for version in 2_28 2_27 2_24 2_17 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  platforms+=(--platform manylinux2014_x86_64)
  for package in "${PACKAGES[@]}"; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
      --implementation cp "${platforms[@]}" -d "$dir" "$package" ||
      python3 -m pip wheel -q --no-deps -w "$dir" "$package"
  done
  du -sh "$dir"
}

item() {  # NAME LIMIT COMMAND...: runs a command, unless other items are wanted
  local name=$1 limit=$2 began=$SECONDS left=$((LIMIT - SECONDS)) ended=0 said
  shift 2
  [[ ${#wanted[@]} == 0 || " ${wanted[*]} " == *" $name "* ]] || return 0
  if ((left < 20)); then
    echo "$name: skipped, no time is left" | tee -a "$out/summary.txt"
    return 0
  fi
  ((limit < left)) || limit=$left
  printf '\n== %s: %s\n' "$name" "$*" >>"$out/log.txt"
  timeout -k 5 "$limit" "$@" >>"$out/log.txt" 2>&1 || ended=$?
  case $ended in
    0) said=done ;;
    124 | 137) said="stopped after its $limit s" ;;
    *) said="failed ($ended)" ;;
  esac
  echo "$name: $said, $((SECONDS - began)) s" | tee -a "$out/summary.txt"
  if [[ -s $scratch/$name.json ]]; then
    python3 -c 'import json, sys; print(json.dumps({sys.argv[1]: json.load(open(sys.argv[2]))}))' \
      "$name" "$scratch/$name.json" >>"$out/results.jsonl" || true
  fi
}

speed() {  # NAME LIMIT CASE FLAG...
  item "$1" "$2" python3 -m benchmarks.speed "$3" --json="$scratch/$1.json" "${@:4}"
}

items() {
  item correctness 90 python3 -m benchmarks.correctness --json="$scratch/correctness.json"
  speed nac_tinyimnet 150 nac_tinyimnet --peer
  speed nac_tinyimnet_xla 90 nac_tinyimnet --fused=never
  speed vmoe_imnet 150 vmoe_imnet --peer --compile
  speed mt_vit_large 120 mt_vit_large --peer --compile
  speed nac_imnet 150 nac_imnet --peer
  speed nac_imnet_xla 90 nac_imnet --fused=never
  item attention 60 python3 -m benchmarks.attention
  item dispatch 40 python3 -m benchmarks.dispatch --shape=64,197,8,768 --dtype=bfloat16
  item dispatch_even 40 python3 -m benchmarks.dispatch --shape=64,197,8,768 --dtype=bfloat16 --even
  # What the package goes without (m2mkd_jax/parallel/backend.py): XLA's own products and softmaxes.
  item vmoe_imnet_generated 90 env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=true \
    --xla_disable_hlo_passes=" python3 -m benchmarks.speed vmoe_imnet \
    --json="$scratch/vmoe_imnet_generated.json"
  item nac_digits_run 200 python3 -m m2mkd_jax.main --config=configs/nac_digits.py \
    --workdir="$scratch/nac_digits"
}

rehearsal() {
  export JAX_PLATFORMS=cpu
  item correctness 120 python3 -m benchmarks.correctness --rehearsal \
    --json="$scratch/correctness.json"
  speed nac_digits 120 nac_digits --peer --steps=1 --rounds=1
  speed vmoe_digits 120 vmoe_digits --peer --steps=1 --rounds=1
  item dispatch 60 python3 -m benchmarks.dispatch --shape=4,17,4,48 --rounds=1
  item dispatch_even 60 python3 -m benchmarks.dispatch --shape=4,17,4,48 --rounds=1 --even
  item nac_digits_run 60 python3 -m m2mkd_jax.main --config=configs/nac_digits.py \
    --workdir="$scratch/nac_digits" --dry_run
}

[[ $# -ge 2 ]] || usage
command=$1
case $command in
  wheels)
    wheels "$2"
    exit
    ;;
  run)
    [[ $# -ge 3 ]] || usage
    dir=$2 out=$3 wanted=("${@:4}")
    ;;
  rehearsal) dir='' out=$2 wanted=("${@:3}") ;;
  *) usage ;;
esac

LIMIT=${LIMIT:-540}
scratch=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR="${TMPDIR:-/tmp}/m2mkd_jax_programs"
if [[ -n $dir ]]; then
  site=$scratch/site
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$dir"/*.whl
  PYTHONPATH+=":$site"
fi
{
  date -u
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
  python3 -c 'import jax; print("jax", jax.__version__, jax.devices())'
} >>"$out/summary.txt" 2>&1
if [[ $command == run ]]; then items; else rehearsal; fi
rm -rf "$scratch"
