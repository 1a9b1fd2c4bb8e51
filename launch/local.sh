#!/usr/bin/env bash
# Runs m2mkd_jax.main as several processes on this machine, each with simulated CPU devices.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [-n PROCESSES] [-d DEVICES] [-p PORT] [--print] -- FLAGS...

Runs `python -m m2mkd_jax.main FLAGS...` in several processes that form one run.

  -n PROCESSES  how many (default 2)
  -d DEVICES    simulated CPU devices of each process (default 1)
  -p PORT       of process 0 (default: a free one)
  --print       show what would run
  --help        this text

SIGTERM and SIGINT are passed on. When a process fails, the others have 5 seconds to end (60 when
it was preempted, exit code 3); the exit code is that of the first to fail. $PYTHON names the
interpreter (default: python).

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

processes=2 devices=1 port='' print=''
while (($#)); do
  case $1 in
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
if [[ -z $port ]]; then
  if [[ -n $print ]]; then
    port=PORT
  else
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  fi
fi

flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
pids=()
for ((i = 0; i < processes; i++)); do
  command=(
    env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "M2MKD_COORDINATOR=localhost:$port"
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
[[ -z $print ]] || exit 0

pass_on() {
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
}
trap pass_on TERM INT

# A trap interrupts `wait`, so what it returns says nothing about who has ended: look.
status=0 deadline=0
while ((${#pids[@]})); do
  if ((deadline)); then sleep 0.2; else wait -n "${pids[@]}" || true; fi
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    if ((code && !status)); then
      status=$code
      deadline=$((SECONDS + (code == 3 ? 60 : 5)))
    fi
  done
  if ((deadline && SECONDS >= deadline)); then
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  fi
done
exit "$status"
