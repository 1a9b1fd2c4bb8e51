#!/usr/bin/env bash
# Runs m2mkd_jax.main on all workers of a Cloud TPU pod slice, as one run.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh -t TPU -z ZONE [-p PROJECT] [-d DIRECTORY] [-r RESTARTS] [--print] \
           -- FLAGS...

Starts `python3 -m m2mkd_jax.main FLAGS...` on every worker of the slice, which find each other.

  -t TPU        name of the slice
  -z ZONE       its zone, e.g. us-central2-b
  -p PROJECT    the Cloud project (default: gcloud's)
  -d DIRECTORY  the checkout on the workers, with the package installed (default: m2mKD)
  -r RESTARTS   how often to start again, from the last checkpoint, when a process has died or hung
                (default 0); never after wrong input (exit code 2) or a signal (3)
  --print       show what would run
  --help        this text

The workdir must be one directory that every worker sees (a mounted disk), or gs://BUCKET/...
(docs/buckets.md). $PYTHON names the interpreter on the workers (default: python3).

  launch/tpu_pod.sh -t v4-64 -z us-central2-b -- --config=configs/vmoe_imnet.py \
      --config.mesh.expert=4 --config.vmoe.dispatch=capacity --workdir=/mnt/runs/vmoe
END
}

refuse() {
  echo "launch/tpu_pod.sh: $1; see launch/tpu_pod.sh --help" >&2
  exit 2
}

tpu='' zone='' project='' directory=m2mKD restarts=0 print=''
while (($#)); do
  case $1 in
    -t | -z | -p | -d | -r)
      (($# > 1)) || refuse "$1 needs a value"
      case $1 in
        -t) tpu=$2 ;;
        -z) zone=$2 ;;
        -p) project=$2 ;;
        -d) directory=$2 ;;
        -r) restarts=$2 ;;
      esac
      shift 2
      ;;
    --print) print=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) refuse "unknown option '$1' (flags of the program come after --)" ;;
  esac
done
[[ -n $tpu ]] || refuse "-t TPU is missing"
[[ -n $zone ]] || refuse "-z ZONE is missing"
[[ $restarts =~ ^[0-9]+$ ]] || refuse "-r needs a number, not '$restarts'"
(($#)) || refuse "no flags for m2mkd_jax.main after --"

remote=$(printf '%q ' cd "$directory")
remote+="&& M2MKD_PROCESSES=auto $(printf '%q ' "${PYTHON:-python3}" -m m2mkd_jax.main "$@")"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone")
if [[ -n $project ]]; then command+=(--project="$project"); fi
command+=(--worker=all --command="${remote% }")

if [[ -n $print ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
for ((again = 0; ; again++)); do
  code=0
  "${command[@]}" || code=$?
  ((code != 0 && code != 2 && code != 3 && again < restarts)) || exit "$code"
  echo "launch/tpu_pod.sh: ended with exit code $code; restart $((again + 1)) of $restarts" >&2
done
