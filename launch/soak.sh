#!/usr/bin/env bash
# Kills 200 writers of an edit log at random points and checks that no acknowledged edit is lost; see soak.py.
# Arguments go to it:
#
#   bash launch/soak.sh
#   bash launch/soak.sh --kills=1000 --seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python launch/soak.py "$@"
