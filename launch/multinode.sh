#!/usr/bin/env bash
# Trains on several nodes through the deepspeed launcher, and restarts from the last checkpoint after a failure.
#
#   bash launch/multinode.sh --hostfile hostfile RECIPE [section.key=value ...]                   # from one node, over ssh
#   bash launch/multinode.sh --no-ssh NODE_RANK --master-addr HOST0 --hostfile hostfile RECIPE    # on every node
#   bash launch/multinode.sh --ranks 8 RECIPE ...                                                 # this node alone
#
#   --hostfile F      one line per node: NAME slots=RANKS (launch/hostfile.example)
#   --ssh             plain ssh instead of pdsh: starts this script with --no-ssh on each node of the hostfile
#   --restarts N      restarts after a failure at most N times (default 3); after a rank was stopped by a signal (exit code 75), always
#   --master-addr A   address of the first node, if it differs from its name in the hostfile
#   --master-port P   port of the rendezvous on the first node (default: MASTER_PORT, else 29500)
#
# Exit codes: 0 finished; 2 a mistake in the recipe or the data, not retried; 75 this script was stopped by a signal after saving (run the
# same command to resume); anything else: it failed more than N times. Environment variables of the other nodes: launch/README.md.
set -uo pipefail
script=$(realpath "$0")
root=$(dirname "$(dirname "$script")")
# Makes a checkout importable without installing it. The working directory, and so relative paths, stay the caller's.
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
[ -n "$hostfile" ] || [ -n "$ranks" ] || fail "pass --hostfile F (several nodes) or --ranks N (this node alone)"
if [ -n "$hostfile" ]; then
  [ -f "$hostfile" ] || fail "$hostfile: no such file; $root/launch/hostfile.example shows a hostfile"
  wrong=$(tr -d '\r' <"$hostfile" | sed 's/#.*//' | awk -v OFS= '
    NF && (NF != 2 || $2 !~ /^slots=[1-9][0-9]*$/) {print NR, ": expected NAME slots=RANKS, got ", $0; exit}
    NF && seen[$1]++ {print NR, ": ", $1, " is listed twice"; exit}')
  [ -z "$wrong" ] || fail "$hostfile:$wrong"
  mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | tr -d '\r' | awk 'NF {print $1}')
  mapfile -t slots < <(sed 's/#.*//' "$hostfile" | tr -d '\r' | awk 'NF {split($2, s, "="); print $1 ":" s[2]}')
  [ ${#hosts[@]} -gt 0 ] || fail "$hostfile lists no node; $root/launch/hostfile.example shows the format"
  address=${address:-${hosts[0]}}
fi

# The launcher; attempt() runs it in its own process group, so that a signal reaches all of this node's processes and no others.
launcher=(deepspeed --master_port "$port")
if [ -n "$ranks" ]; then
  launcher+=(--num_accelerators "$ranks")
elif [ -n "$node_rank" ]; then
  launcher+=(--hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$address")
elif [ $ssh = pdsh ]; then
  command -v pdsh >/dev/null || fail "pdsh is not installed: apt install pdsh, or pass --ssh"
  launcher+=(--hostfile "$hostfile" --master_addr "$address" --no_ssh_check)
  [ ${#hosts[@]} -gt 1 ] || launcher+=(--force_multi)
fi
# While ranks are missing at the start, rank 0 names their nodes by this list.
[ -z "$hostfile" ] || export RINGLIP_HOSTS="${slots[*]}"

over_ssh() { # this script on every node; if one node fails, the watchdog ends the ranks of the others
  local rank pids=() code=0 ended
  for rank in "${!hosts[@]}"; do
    # shellcheck disable=SC2029,SC2086  (expanded on this side on purpose; RINGLIP_SSH holds several options)
    ssh ${RINGLIP_SSH:-} -tt -o BatchMode=yes "${hosts[rank]}" \
      "cd $(printf %q "$PWD") && PATH=$(printf %q "$PATH") ${variables//$'\n'/ } bash $(printf %q "$script") --no-ssh $rank --restarts 0 \
      --master-addr $address --master-port $port --hostfile $(printf %q "$hostfile") $(printf '%q ' "$@")" </dev/null &
    pids+=($!)
  done
  while [ ${#pids[@]} -gt 0 ]; do
    sleep 0.2
    for rank in "${!pids[@]}"; do
      ! kill -0 "${pids[rank]}" 2>/dev/null || continue
      wait "${pids[rank]}"
      ended=$?
      unset "pids[rank]"
      case "$ended" in 126 | 127 | 255) # nothing runs there, or no longer: without this the other nodes would wait for it
        echo "error: ${hosts[rank]}: ssh ended with exit code $ended" >&2
        [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null ;;
      esac
      # The exit code of all: 2, 126 or 127 if any node returned it, else the first failure, else 75.
      case "$code:$ended" in *:0 | 2:* | 12[67]:*) ;; *:2 | *:12[67] | 0:* | 75:*) code=$ended ;; esac
    done
  done
  return "$code"
}
quoted() { # a value, quoted for a shell; for pdsh: DeepSpeed adds double quotes, and pdsh expands %
  local value=$1
  if [ "$messenger" = pdsh ]; then
    value=${value//\\/\\\\} value=${value//\"/\\\"} value=${value//\$/\\\$} value=${value//\`/\\\`}
    printf '%s' "${value//%/%%}"
  else
    printf "'%s'" "${value//\'/\'\\\'\'}"
  fi
}
argument() { # an argument, quoted for pdsh: DeepSpeed puts those with a space into double quotes, and leaves the others as they are
  local value
  case "$1" in
    *" "*) value=${1//\\/\\\\} value=${value//\$/\\\$} value=${value//\`/\\\`} ;;
    *) value=$(printf %q "$1") ;;
  esac
  printf '%s' "${value//%/%%}"
}
environment() { # prints NAME=VALUE lines, quoted, from .deepspeed_env in the home and in this directory, as DeepSpeed reads them
  local name=${DS_ENV_FILE:-.deepspeed_env} file line number
  [ -z "${RINGLIP_HOSTS:-}" ] || echo "RINGLIP_HOSTS=$(quoted "$RINGLIP_HOSTS")"
  case "$name" in /*) set -- "$name" ;; *) set -- "$HOME/$name" "$PWD/$name" ;; esac
  [ "${2:-}" != "$1" ] || set -- "$1" # this directory is the home: read the file once
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
launcher+=(--module trainer.train)
for one in "$@"; do
  [ $messenger != pdsh ] || one=$(argument "$one")
  launcher+=("$one")
done
if [ $messenger = pdsh ] && [[ $PWD =~ [^A-Za-z0-9_@+=:,./-] ]]; then # DeepSpeed's `cd` there does not quote it
  fail "pdsh cannot start in '$PWD': pass --ssh, or start in a directory without spaces and special characters"
fi
variables=$(environment) || exit 2
if [ $messenger = none ]; then # the ranks start on this node and inherit the environment
  while IFS= read -r line; do
    [ -z "$line" ] || eval "export $line"
  done <<<"$variables"
fi

stopped="" child=""
stop() { # on a signal from the scheduler or the user: the ranks finish their step and save
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
copy() { # copies the output to the terminal and to $output until the last rank has exited
  trap '' TERM INT USR1 HUP
  exec tee "$output" >&2
}
attempt() { # runs the launcher once and returns its exit code; a signal interrupts `wait`, so it waits in a loop
  : >"$output"
  local code waited=0
  set -m # puts the background job into a process group of its own
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
  # If the launcher died first, its ranks still finish their step and save: wait for them, at most two minutes.
  while kill -0 -- "-$child" 2>/dev/null; do
    sleep 0.2
    waited=$((waited + 1))
    [ "$waited" -lt 600 ] || kill -KILL -- "-$child" 2>/dev/null
  done
  child=""
  # DeepSpeed's launcher exits with 0 even if its ranks were killed by a signal, so look for the run's last line.
  if [ "$code" -eq 0 ] && ! grep -q ': finished at ' "$output"; then code=1; fi
  return "$code"
}

pause() { # sleeps, but returns at once on a signal, which a plain `sleep` would delay
  local sleeper
  sleep "$1" &
  sleeper=$!
  wait "$sleeper" || kill "$sleeper" 2>/dev/null
}
exit_stopped() {
  echo "stopped by SIG$stopped (passed to the ranks as SIGTERM); run the same command again to resume from the last checkpoint" >&2
  exit 75
}
failures=0
while true; do
  [ -z "$stopped" ] || exit_stopped # during the pause
  attempt "$@"
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then exit "$code"; fi
  [ -z "$stopped" ] || exit_stopped
  if [ "$code" -eq 126 ] || [ "$code" -eq 127 ]; then
    where=$([ -z "$hostfile" ] || echo " on a node of $hostfile")
    echo "error: a command was not found$where (exit code $code; see above): the repository and its .venv must be at the same path on all nodes" >&2
    exit "$code"
  fi
  if [ "$code" -eq 75 ]; then
    echo "a rank was stopped by a signal and the run was saved: starting again" >&2
    continue
  fi
  failures=$((failures + 1))
  if [ "$failures" -gt "$restarts" ]; then
    echo "error: failed $failures time(s), last with exit code $code: giving up" >&2
    exit "$code"
  fi
  echo "failed with exit code $code: starting again, from the last checkpoint if there is one ($failures of $restarts)" >&2
  pause "${RINGLIP_RESTART_SECONDS:-5}"
done
