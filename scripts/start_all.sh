#!/usr/bin/env bash
# All on this machine, on Ray: deploy, then a worker in the foreground; when that ends, undeploy. With --no-ray: without
# Ray, as `modelpool up`; further arguments are those of that.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ ! -x "$bin/modelpool" ] || PATH="$bin:$PATH"
if [ "${1:-}" = --no-ray ]; then
    shift
    exec modelpool up "$@"
fi
modelpool deploy
trap "modelpool undeploy" EXIT
modelpool worker &
worker=$!
told=yes
trap 'told=yes; kill "$worker" 2>/dev/null || :' TERM
trap 'told=yes' INT # the terminal says it to the worker too
while [ "$told" ]; do # a signal breaks off the wait
    told=
    status=0
    wait "$worker" || status=$?
done
exit "$status"
