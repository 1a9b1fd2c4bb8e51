#!/usr/bin/env bash
# Runs m2mkd_jax.main as several processes on this machine, each with simulated CPU devices.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [-n PROCESSES] [-d DEVICES] [-p PORT] [-r RESTARTS] [--print] -- FLAGS...

Runs `python -m m2mkd_jax.main FLAGS...` in several processes that form one run.

  -n PROCESSES  how many (default 2)
  -d DEVICES    simulated CPU devices of each process (default 1)
  -p PORT       of process 0 (default: a free one)
  -r RESTARTS   how often to start again, from the last checkpoint, when a process has died or hung
                (default 0); never after wrong input (exit code 2) or a signal (3)
  --print       show what would run
  --help        this text

SIGTERM, SIGINT and SIGUSR1 are passed on. When a process fails, the others have 15 seconds to say
which one and to end (60 when it was preempted, exit code 3); the exit code is that of the first to
fail. $PYTHON names the interpreter (default: python).

  launch/local.sh -n 2 -d 4 -- --config=configs/vmoe_digits.py --config.mesh.expert=4 --workdir=DIR
END
}

refuse() {
  echo "launch/local.sh: $1; see launch/local.sh --help" >&2
  exit 2
}

number() {  # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || refuse "$1 needs a number above 0, not '$2'"
}

processes=2 devices=1 port='' restarts=0 print=''
while (($#)); do
  case $1 in
    -r)
      [[ ${2:-} =~ ^[0-9]+$ ]] || refuse "-r needs a number, not '${2:-}'"
      restarts=$2
      shift 2
      ;;
    -n | -d | -p)
      (($# > 1)) || refuse "$1 needs a number above 0"
      number "$1" "$2"
      case $1 in
        -n) processes=$2 ;;
        -d) devices=$2 ;;
        -p) ((${#2} < 6 && $2 < 65536)) || refuse "-p needs a port below 65536, not '$2'"; port=$2 ;;
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

python=${PYTHON:-python}
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
pids=() told=''

start() {
  local at=${port:-PORT} i command
  if [[ -z $port$print ]]; then at=$("$python" -c "$free_port"); fi
  pids=()
  for ((i = 0; i < processes; i++)); do
    command=(
      env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "M2MKD_COORDINATOR=localhost:$at"
      "M2MKD_PROCESSES=$processes" "M2MKD_PROCESS=$i" "$python" -m m2mkd_jax.main "$@"
    )
    if [[ -n $print ]]; then
      printf '%q ' "${command[@]}"
      echo '&'
    else
      "${command[@]}" &
      pids[i]=$!
    fi
  done
}

pass_on() {
  told=1
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
for name in TERM INT; do trap 'pass_on TERM' "$name"; done
trap 'pass_on USR1' USR1

# Waits for all processes; `status` is the code of the first to fail.
finish() {
  local deadline=0 code
  status=0
  # A trap interrupts `wait`, so what it returns says nothing about who has ended: look.
  while ((${#pids[@]})); do
    if ((deadline)); then sleep 0.2; else wait -n "${pids[@]}" || true; fi
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      code=0
      wait "${pids[i]}" || code=$?
      unset "pids[i]"
      if ((code && !status)); then
        status=$code
        deadline=$((SECONDS + (code == 3 ? 60 : 15)))
      fi
    done
    if ((deadline && SECONDS >= deadline)); then
      for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    fi
  done
}

for ((again = 0; ; again++)); do
  start "$@"
  [[ -z $print ]] || exit 0
  finish
  ((status != 0 && status != 2 && status != 3 && again < restarts)) || exit "$status"
  [[ -z $told ]] || exit "$status"
  echo "launch/local.sh: ended with exit code $status; restart $((again + 1)) of $restarts" >&2
done
