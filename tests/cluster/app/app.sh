#!/bin/sh
# Start and stop script of the tests' application: app.sh DIRECTORY [PROGRAM ...] [force]
#
# Notes what it is asked for in DIRECTORY/did. What a test has put into DIRECTORY/NODE-ACTION is
# done first, by this shell: it may fail, hang, or end with success and do nothing.
dir=$1
shift
echo "$NBDMIRROR_NODE $NBDMIRROR_ACTION" >>"$dir/did"
how=$dir/$NBDMIRROR_NODE-$NBDMIRROR_ACTION
if [ -e "$how" ]; then . "$how"; fi
if [ "$NBDMIRROR_ACTION" = start ]; then exec "$@"; fi
pid=$(cat "$dir/$NBDMIRROR_NODE.pid" 2>/dev/null) || exit 0
if [ "$NBDMIRROR_ACTION" = force ]; then signal=KILL; else signal=TERM; fi
kill -$signal "$pid" 2>/dev/null
while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
rm -f "$dir/$NBDMIRROR_NODE.pid"
