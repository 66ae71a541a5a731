#!/bin/bash
# Step 2 of 5, on host B: serve the overlay to B's QEMU, and be the end of the one connection that A makes.
#
#     OVERLAY=/var/lib/images/vm.raw LISTEN=192.0.2.2:10810 TOKEN_FILE=/etc/nbd.token CERTIFICATES=/etc/pki/nbd \
#         recipes/channel/2-serve.sh
#
# OVERLAY       the image of step 1 (absolute path); its sockets are beside it: .nbd, .qmp and .incoming
# LISTEN        where A connects: HOST:PORT, or unix:PATH where A comes through ssh
# TOKEN_FILE    a secret that A has, too: (umask 077; openssl rand -hex 32 >FILE)
# CERTIFICATES  directory with ca-cert.pem, server-cert.pem and server-key.pem; needed but on the loopback or unix:
#
# The process goes on in the background, and is what the guest has its disk from until step 5 is done. If it is killed,
# run this again: A's end finds back, and the guest waits meanwhile.

set -euo pipefail
. "$(dirname "$0")/../common.sh"

help_or_go_on "$@"
need LISTEN
need_absolute OVERLAY TOKEN_FILE
need_programs nbd-overlay
exec nbd-overlay serve "$OVERLAY" --layout flat -k "$OVERLAY.nbd" --simple-replies --channel "listen:$LISTEN" \
    --token-file "$TOKEN_FILE" ${CERTIFICATES:+--tls-certificates "$CERTIFICATES"} --incoming "unix:$OVERLAY.incoming" \
    --qmp "unix:$OVERLAY.qmp" --daemonize --pid-file "$OVERLAY.pid"
