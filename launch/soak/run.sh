#!/usr/bin/env bash
# Kills 200 writers of an edit log at random points and checks that no acknowledged edit is lost; see edit_log.py. With
# 'server', 50 clients load the live page's server for a minute, and it is killed meanwhile; see server.py. With
# 'training', a run in one or two processes is killed 50 times, and must reach the same end; see training.py.
# Arguments go to these programs:
#
#   bash launch/soak/run.sh
#   bash launch/soak/run.sh --kills=1000 --seed=1
#   bash launch/soak/run.sh server --model=runs/quickstart/model
#   bash launch/soak/run.sh training --kills=3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ "${1:-}" == server || "${1:-}" == training ]]; then
    kind="$1"
    shift
    exec python "launch/soak/$kind.py" "$@"
fi
exec python launch/soak/edit_log.py "$@"
