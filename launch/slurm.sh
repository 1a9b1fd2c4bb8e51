#!/usr/bin/env bash
# Submits m2mkd_jax.main to SLURM: the jobs of a phase side by side, or one run over several nodes.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/slurm.sh array -j PHASE -a RANGE [-r RESTARTS] [-s OPTION]... [--print] -- FLAGS...
       launch/slurm.sh nodes -n NODES [-r RESTARTS] [-s OPTION]... [--print] -- FLAGS...

array  every element of an array job runs one job of a phase by itself, with --only=PHASE/ELEMENT:
       the pairs of student and teacher side by side (their workdir is one, on a shared disk). The
       phases before it must be done: --only=pt; array -j mt; --only=ft; array -j m2mkd;
       --only=e2e,eval, chained by -s --dependency=afterok:ID
nodes  one run over several nodes, one process per node, which has all devices of its node

  -j PHASE   mt or m2mkd
  -a RANGE   of the array, e.g. 0-9 or 0-9%4 (four at a time)
  -n NODES   how many
  -r RESTARTS  how often to start again, from the last checkpoint, when a process has died or hung
             (default 3); never after wrong input (exit code 2)
  -s OPTION  passed to sbatch, e.g. -s --partition=gpu -s --gpus-per-node=8 -s --time=8:00:00
  --print    show the batch script and how it would be submitted
  --help     this text

Two minutes before its time limit a run is told to save (SIGUSR1; another time with -s
--signal=USR1@SECONDS); it then goes back into the queue and goes on from there. $PYTHON names the interpreter (default: python).

  launch/slurm.sh array -j m2mkd -a 0-9 -s --gpus-per-node=1 -- --config=configs/nac_imnet.py \
      --workdir=DIR
  launch/slurm.sh nodes -n 4 -s --gpus-per-node=8 -- --config=configs/vmoe_imnet.py \
      --config.mesh.expert=8 --config.vmoe.dispatch=capacity --workdir=DIR
END
}

refuse() {
  echo "launch/slurm.sh: $1; see launch/slurm.sh --help" >&2
  exit 2
}

mode=${1:-}
case $mode in
  array | nodes) shift ;;
  -h | --help) usage; exit 0 ;;
  *) refuse "the first word must be array or nodes, not '$mode'" ;;
esac

phase='' range='' nodes='' restarts=3 print='' options=()
while (($#)); do
  case $1 in
    -j | -a | -n | -r | -s)
      (($# > 1)) || refuse "$1 needs a value"
      case $1 in
        -j) phase=$2 ;;
        -a) range=$2 ;;
        -n) nodes=$2 ;;
        -r) restarts=$2 ;;
        -s) options+=("$2") ;;
      esac
      shift 2
      ;;
    --print) print=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) refuse "unknown option '$1' (flags of the program come after --)" ;;
  esac
done
(($#)) || refuse "no flags for m2mkd_jax.main after --"

[[ $restarts =~ ^[0-9]+$ ]] || refuse "-r needs a number, not '$restarts'"

if [[ $mode == array ]]; then
  [[ $phase == mt || $phase == m2mkd ]] || refuse "array needs -j mt or -j m2mkd"
  [[ $range =~ ^[0-9][-0-9,:]*(%[1-9][0-9]*)?$ ]] || refuse "array needs -a RANGE, e.g. 0-9"
  [[ -z $nodes ]] || refuse "-n belongs to nodes"
  name=$phase
  options=(--array="$range" --ntasks=1 "${options[@]}")
else
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "nodes needs -n NODES, a number above 0"
  [[ -z $phase$range ]] || refuse "-j and -a belong to array"
  name=m2mkd_jax
  options=(--nodes="$nodes" --ntasks-per-node=1 "${options[@]}")
fi
options=(--job-name="$name" --requeue --open-mode=append --signal=USR1@120 "${options[@]}")

# What the node runs. Words that are known now are quoted now; $SLURM_... is the node's to fill in.
program=$(printf '%q ' "${PYTHON:-python}" -m m2mkd_jax.main "$@")
program=${program% }
# shellcheck disable=SC2016
if [[ $mode == array ]]; then
  line="M2MKD_PROCESSES=1 srun $program --only=$phase/"'$SLURM_ARRAY_TASK_ID'
  job='${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID'
else
  line="srun --kill-on-bad-exit=1 $program"
  job='$SLURM_JOB_ID'
fi
script="#!/usr/bin/env bash
for ((again = 0; ; again++)); do
  code=0
  $line || code=\$?
  # 3: told to stop, state saved. 2: wrong input. Others: a process has died or hung.
  if ((code == 3)); then scontrol requeue $job; fi
  ((code != 0 && code != 2 && code != 3 && again < $restarts)) || exit \$code
  echo \"exit code \$code; restart \$((again + 1)) of $restarts\" >&2
done"

if [[ -n $print ]]; then
  printf '%q ' sbatch "${options[@]}"
  printf "<<'END'\n%s\nEND\n" "$script"
else
  sbatch "${options[@]}" <<<"$script"
fi
