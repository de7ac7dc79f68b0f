#!/usr/bin/env bash
# Sourced by what starts trainings, from the repository's root.

# status DIRECTORY KEY: a value of the run's status.json, or nothing.
status() {
    sed -n "s/^ *\"$2\": \"\{0,1\}\([^\",]*\).*/\1/p" "$1/status.json" 2>/dev/null
}

# run_until_signal SIGNALS DIRECTORY COMMAND...
# Runs a command that trains in this run directory, to its end, and leaves its exit status in `code`. A signal becomes the run's
# stop file, and `asked` is yes then: passed on, it would reach launchers, trackers and compilers too, and a launcher that dies
# of it takes its processes along, or leaves them behind.
run_until_signal() {
    local signals=$1 directory=$2 child
    shift 2
    code=0 asked=''
    # shellcheck disable=SC2086 # several signals
    trap 'asked=yes; mkdir -p "$directory"; touch "$directory/stop"; echo "Signalled: asked to stop"' $signals
    "$@" --output_dir "$directory" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done # the signal interrupts it
    # shellcheck disable=SC2034 # the caller reads it
    wait "$child" || code=$?
    # shellcheck disable=SC2086
    trap '' $signals
    if [ -n "$asked" ]; then rm -f "$directory/stop"; fi # in case it came too late to be obeyed
}

# stopped_for_now DIRECTORY: whether the same command is to go on later: the signal, a time limit or --stop_when stopped the run,
# not a person.
stopped_for_now() {
    [ "$(status "$1" state)" = stopped ] || return 1
    case $(status "$1" reason) in
        time_limit | stop_when) ;;
        *) [ -n "$asked" ] ;;
    esac
}
