#!/bin/sh
# Root only as long as it takes to own the mounted volume. The command then replaces this script as an unprivileged
# user: it is process 1, so `docker stop` reaches it.
set -eu

volume=/app/models
drop=""
if [ "$(id -u)" = 0 ]; then
    drop="setpriv --reuid=repertory --regid=repertory --init-groups --inh-caps=-all --no-new-privs"
    # Only what is not ours yet, so that later starts write nothing; a link itself, never what it leads to.
    find "$volume" ! -user repertory -exec chown --no-dereference repertory:repertory {} + ||
        echo "repertory: not everything in $volume could be given to user repertory" >&2
fi

# $drop is several words, or none.
# shellcheck disable=SC2086
if ! $drop test -w "$volume"; then
    if [ -n "$drop" ]; then user=1000; else user=$(id -u); fi
    echo "repertory: user $user may not write to $volume, where everything is kept." \
        "Cure: on the host, chown -R $user the folder that is mounted there, mount it without :ro, or leave --user away." >&2
    exit 1
fi

# shellcheck disable=SC2086
exec $drop "$@"
