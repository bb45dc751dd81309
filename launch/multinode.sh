#!/usr/bin/env bash
# Trains on several nodes through the deepspeed launcher, and starts again from the last checkpoint when it has to.
#
#   bash launch/multinode.sh --hostfile hostfile RECIPE [section.key=value ...]                   # from one node, over ssh
#   bash launch/multinode.sh --no-ssh NODE_RANK --master-addr HOST0 --hostfile hostfile RECIPE    # the same line on every node, but its rank
#   bash launch/multinode.sh --ranks 8 RECIPE ...                                                 # this node alone
#
#   --hostfile F      a line a node: NAME slots=RANKS (launch/hostfile.example)
#   --ssh             plain ssh instead of pdsh: one --no-ssh start on each node of the hostfile
#   --restarts N      starts again after a failure at most N times (default 3); after a signal (exit 75) as often as it happens
#   --master-addr A   address of the first node, where it is not its name in the hostfile
#   --master-port P   default 29500
#
# Exit codes: 0 finished; 2 a mistake in the recipe or the data, not tried again; 75 this script was told to stop and everything is saved:
# the same command goes on; anything else: failed more than N times. Environment for the other nodes: launch/README.md.
set -uo pipefail
script=$(realpath "$0")
root=$(dirname "$(dirname "$script")")
# A checkout need not be installed; paths stay relative to where the script is called.
[ ! -f "$root/pyproject.toml" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit "$1"
}
fail() {
  echo "error: $*" >&2
  exit 2
}
hostfile="" ssh=pdsh node_rank="" ranks="" restarts=3 address="" port="${MASTER_PORT:-29500}"
while [ $# -gt 0 ]; do
  case "$1" in
    --hostfile) hostfile=$2; shift ;;
    --ssh) ssh=ssh ;;
    --no-ssh) node_rank=$2; shift ;;
    --ranks) ranks=$2; shift ;;
    --restarts) restarts=$2; shift ;;
    --master-addr) address=$2; shift ;;
    --master-port) port=$2; shift ;;
    -h | --help) usage 0 ;;
    -*) fail "unknown option $1; see --help" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || usage 2
[ -n "$hostfile" ] || [ -n "$ranks" ] || fail "name --hostfile F (several nodes) or --ranks N (this one)"
if [ -n "$hostfile" ]; then
  [ -f "$hostfile" ] || fail "$hostfile: no such hostfile; $root/launch/hostfile.example shows one"
  mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | tr -d '\r' | awk 'NF {print $1}')
  mapfile -t slots < <(sed 's/#.*//' "$hostfile" | tr -d '\r' | awk 'NF {split($2, s, "="); print $1 ":" s[2]}')
  [ ${#hosts[@]} -gt 0 ] || fail "$hostfile names no node; $root/launch/hostfile.example shows how"
  address=${address:-${hosts[0]}}
fi

# The launcher, in a process group of its own so that a signal reaches every process of this node, and no more.
launcher=(deepspeed --master_port "$port")
if [ -n "$ranks" ]; then
  launcher+=(--num_accelerators "$ranks")
elif [ -n "$node_rank" ]; then
  launcher+=(--hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$address")
elif [ $ssh = pdsh ]; then
  command -v pdsh >/dev/null || fail "pdsh is not installed: apt install pdsh, or use --ssh"
  launcher+=(--hostfile "$hostfile" --master_addr "$address" --no_ssh_check)
  [ ${#hosts[@]} -gt 1 ] || launcher+=(--force_multi)
fi
# Ranks that wait for others name the nodes by this.
[ -z "$hostfile" ] || export RINGLIP_HOSTS="${slots[*]}"
launcher+=(--module trainer.train "$@")

over_ssh() { # the same script on every node; the first node to fail takes the others along, through the watchdog
  local rank pids=() code=0 one
  for rank in "${!hosts[@]}"; do
    # shellcheck disable=SC2029,SC2086  (expanded here on purpose; RINGLIP_SSH holds options)
    ssh ${RINGLIP_SSH:-} -tt -o BatchMode=yes "${hosts[rank]}" \
      "cd $(printf %q "$PWD") && PATH=$(printf %q "$PATH") ${variables//$'\n'/ } bash $(printf %q "$script") --no-ssh $rank --restarts 0 \
      --master-addr $address --master-port $port --hostfile $(printf %q "$hostfile") $(printf '%q ' "$@")" </dev/null &
    pids+=($!)
  done
  for one in "${pids[@]}"; do
    wait "$one"
    # What tells most wins: a mistake, then a failure, then a stop.
    case "$code:$?" in *:0 | 2:*) ;; *:2) code=2 ;; 0:* | 75:*) code=$? ;; esac
  done
  return "$code"
}
quoted() { # for a shell; pdsh: DeepSpeed puts values between double quotes, and pdsh takes % for its own
  local value=$1
  if [ "$messenger" = pdsh ]; then
    value=${value//\\/\\\\} value=${value//\"/\\\"} value=${value//\$/\\\$} value=${value//\`/\\\`}
    printf '%s' "${value//%/%%}"
  else
    printf "'%s'" "${value//\'/\'\\\'\'}"
  fi
}
environment() { # lines NAME=VALUE, quoted for a shell: what .deepspeed_env says in the home and then here, as DeepSpeed reads it
  local name=${DS_ENV_FILE:-.deepspeed_env} file line number
  [ -z "${RINGLIP_HOSTS:-}" ] || echo "RINGLIP_HOSTS=$(quoted "$RINGLIP_HOSTS")"
  case "$name" in /*) set -- "$name" ;; *) set -- "$HOME/$name" "$PWD/$name" ;; esac
  [ "${2:-}" != "$1" ] || set -- "$1" # at home
  for file in "$@"; do
    [ -f "$file" ] || continue
    number=0
    while IFS= read -r line || [ -n "$line" ]; do
      number=$((number + 1)) line=${line%$'\r'}
      case "$line" in
        "" | \#*) ;;
        [A-Za-z_]*=*) echo "${line%%=*}=$(quoted "${line#*=}")" ;;
        *) fail "$file:$number: '$line' is not NAME=VALUE" ;;
      esac
    done <"$file"
  done
}
messenger=$ssh
[ -z "$ranks$node_rank" ] || messenger=none
variables=$(environment) || exit 2
if [ $messenger = none ]; then # what starts here needs no messenger
  while IFS= read -r line; do
    [ -z "$line" ] || eval "export $line"
  done <<<"$variables"
fi

stopped="" child=""
stop() { # a queue or a person ends the job: ranks finish their step and save
  stopped=$1
  [ -z "$child" ] || kill -TERM -- "-$child" 2>/dev/null
}
trap 'stop TERM' TERM
trap 'stop USR1' USR1
trap 'stop INT' INT
trap 'stop HUP' HUP

output=$(mktemp)
forwarded=$(mktemp)
trap 'rm -f "$output" "$forwarded"' EXIT
if [ $messenger = pdsh ]; then
  echo "$variables" >"$forwarded"
  export DS_ENV_FILE=$forwarded
fi
copy() { # to the terminal and into $output, until the last rank is gone
  trap '' TERM INT USR1 HUP
  exec tee "$output" >&2
}
attempt() { # runs it once; its exit code. Waits again when a signal interrupts the waiting.
  : >"$output"
  local code waited=0
  set -m # a process group for the job
  if [ $messenger = ssh ]; then
    over_ssh "$@" > >(copy) 2>&1 &
  else
    "${launcher[@]}" > >(copy) 2>&1 &
  fi
  child=$!
  set +m
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  # Ranks whose launcher died before them finish their step, save and go.
  while kill -0 -- "-$child" 2>/dev/null; do
    sleep 0.2
    waited=$((waited + 1))
    [ "$waited" -lt 600 ] || kill -KILL -- "-$child" 2>/dev/null
  done
  child=""
  # DeepSpeed's launcher exits with 0 when what it started was killed by a signal: only the last line of a run counts.
  if [ "$code" -eq 0 ] && ! grep -q ': finished at ' "$output"; then code=1; fi
  return "$code"
}

pause() { # ends at once with a signal, which a plain sleep would outlast
  local sleeper
  sleep "$1" &
  sleeper=$!
  wait "$sleeper" || kill "$sleeper" 2>/dev/null
}
tells_stop() {
  echo "stopped by SIG$stopped (ranks are told by SIGTERM); the same command goes on from the last checkpoint" >&2
  exit 75
}
failures=0
while true; do
  [ -z "$stopped" ] || tells_stop # while it paused
  attempt "$@"
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then exit "$code"; fi
  [ -z "$stopped" ] || tells_stop
  if [ "$code" -eq 126 ] || [ "$code" -eq 127 ]; then
    where=$([ -z "$hostfile" ] || echo " on a node of $hostfile")
    echo "error: a command was not found$where (exit code $code; see above): the repository and its .venv must be at one path everywhere" >&2
    exit "$code"
  fi
  if [ "$code" -eq 75 ]; then
    echo "stopped by a signal with everything saved: starting again" >&2
    continue
  fi
  failures=$((failures + 1))
  if [ "$failures" -gt "$restarts" ]; then
    echo "error: failed with exit code $code, $failures time(s) in all: giving up" >&2
    exit "$code"
  fi
  echo "failed with exit code $code: starting again, from the last checkpoint if there is one ($failures of $restarts)" >&2
  pause "${RINGLIP_RESTART_SECONDS:-5}"
done
