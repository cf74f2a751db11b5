#!/bin/sh
# What the campaign of PostgreSQL starts on the primary and stops there: one server on the mount.
# Arguments: the action is in $NBDMIRROR_ACTION; $1 is the directory of the server's programs, $2
# that of the sockets, with a directory for each node in it.
set -eu
data=$NBDMIRROR_MOUNT/pg
as_server() { setpriv --reuid=postgres --regid=postgres --clear-groups -- "$@"; }
case $NBDMIRROR_ACTION in
    start)
        # Left by a host that was lost with the server on it.
        rm -f "$data/postmaster.pid"
        as_server "$1/pg_ctl" -D "$data" -w -t 60 -l "$data/log" \
            -o "-c listen_addresses= -c unix_socket_directories=$2/$NBDMIRROR_NODE -c fsync=on" start
        ;;
    stop) as_server "$1/pg_ctl" -D "$data" -w -t 30 -m fast stop ;;
    *) as_server "$1/pg_ctl" -D "$data" -W -m immediate stop ;;
esac
