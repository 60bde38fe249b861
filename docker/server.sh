#!/bin/sh
# The server of a federation on one machine. At its first start it makes the consortium's
# authority, whose key stays in the server's own volume, and certificates for itself and for
# the operator. HOSTS: further names of the server, by space.
set -eu
home=/var/lib/fedlora
umask 077

[ -f "$home/ca/ca.crt" ] || fedlora certs init "$home/ca"

issue() { # NAME ROLE FOLDER [--host HOST]...
    name=$1 role=$2 folder=$3
    shift 3
    [ -f "$folder/$name.crt" ] && return
    # of an attempt that was cut off
    rm -f "$folder/$name".*
    fedlora certs issue "$name" --role "$role" --ca "$home/ca" --out "$folder" --renew "$@"
}

hosts="--host server --host localhost --host 127.0.0.1"
for host in ${HOSTS:-}; do hosts="$hosts --host $host"; done
# shellcheck disable=SC2086 # one word each
issue server server "$home/certs" $hosts
issue operator operator /operator

exec fedlora server --home "$home/server" --host 0.0.0.0 --certs "$home/certs" \
    --ca "$home/ca" --enrol /enrol --health 0.0.0.0:9464 "$@"
