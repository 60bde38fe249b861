#!/bin/sh
# One run on the federation of docker-compose.yml, followed to its end; without JOB the
# quickstart. Without CLIENTS it is for as many clients as are up: the name "client" has one
# address for each.
set -eu
clients=${CLIENTS:-$(getent ahostsv4 client | awk '{ print $1 }' | sort -u | wc -l)}
out=/runs/${RUN:-$(date -u +%Y%m%d-%H%M%S)}
if [ -z "${JOB:-}" ]; then
    package=$(python -c 'from importlib.util import find_spec; print(find_spec("fedlora").origin)')
    JOB=${package%/*}/config/quickstart.toml
    # baselines need the data of all clients in one place; a natural division has four clients
    # with names of its own
    set -- --override "evaluation.baselines=[]" --override "partition.kind=dirichlet" "$@"
fi
for override in ${OVERRIDES:-}; do set -- "$@" --override "$override"; done
exec fedlora run "$JOB" --server server:8443 --certs /operator --out "$out" \
    --override "partition.clients=$clients" "$@"
