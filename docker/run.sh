#!/bin/sh
# One run on the federation of docker-compose.yml, followed to its end; without JOB the
# quickstart. Without CLIENTS it is for as many clients as are up: the name "client" has one
# address for each.
set -eu
clients=${CLIENTS:-$(getent ahostsv4 client | awk '{ print $1 }' | sort -u | wc -l)}
out=/runs/${RUN:-$(date -u +%Y%m%d-%H%M%S)}
if [ -z "${JOB:-}" ]; then
    JOB=$(python -c 'from importlib.util import find_spec as f; print(*f("fedlora").submodule_search_locations)')/config/quickstart.toml
    # what needs the data of all clients in one place
    set -- --override "evaluation.baselines=[]" "$@"
fi
exec fedlora run "$JOB" --server server:8443 --certs /operator --out "$out" \
    --override "partition.clients=$clients" "$@"
