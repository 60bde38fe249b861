#!/bin/sh
# A client of docker-compose.yml: it takes the first place that no other replica has.
set -eu
exec fedlora client --server server:8443 --home /var/lib/fedlora --partition auto \
    --enrol /enrol --device "${DEVICE:-cpu}" --health 0.0.0.0:9464 "$@"
