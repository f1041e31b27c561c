#!/usr/bin/env bash
# Plays `gmemctl demo` on a host that `make compose-up` started: loader, device, victim
# and the storyteller are containers of their own. Arguments go to gmemctl demo.
# Exit status: that of gmemctl demo.
set -euo pipefail
compose=$(dirname "${BASH_SOURCE[0]}")/compose
programs=(loader device victim)

quietly() {
    local said
    said=$("$compose" --profile demo "$@" 2>&1) || { echo "$said" >&2; return 1; }
}
trap 'quietly rm --stop --force "${programs[@]}"' EXIT

quietly up --detach --no-deps --force-recreate "${programs[@]}"

# How a container ended only its engine knows: `victim 135`, one line for each.
ends() {
    local program container
    for program in "${programs[@]}"; do
        container=$("$compose" --profile demo ps --quiet "$program")
        echo "$program $(docker wait "$container")" &
    done
    wait
}

"$compose" --profile demo run --rm -T --no-deps demo \
    gmemctl demo --programs=/run/demo "$@" < <(ends)
