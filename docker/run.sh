#!/bin/sh
# One run on the federation of docker-compose.yml, followed to its end. Without CLIENTS it is
# for as many clients as are up: the name "client" has one address for each.
set -eu
clients=${CLIENTS:-$(getent ahostsv4 client | awk '{ print $1 }' | sort -u | wc -l)}
out=/runs/${RUN:-$(date -u +%Y%m%d-%H%M%S)}
exec fedlora run ${JOB:+"$JOB"} --server server:8443 --certs /operator --out "$out" \
    --override "partition.clients=$clients" "$@"
