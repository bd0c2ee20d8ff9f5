#!/usr/bin/env bash
# The pictures of README.md and of the pages, made from a saved model:
#
#   MODEL=runs/pictures/pruned bash docs/images/make.sh
#
# Those that are there show a MiniLM that was trained on CEBaB and then pruned to half without further training:
#
#   python launch/train.py --config=configs/cebab_minilm.py:joint --config.data.path=DATA --workdir=runs/pictures
#   python launch/prune.py --model=runs/pictures/model --config=configs/cebab_minilm.py --config.data.path=DATA \
#     --config.sparsity.final=0.5 --config.pruner.num_grads=16 --config.pruner.criterion=diagonal_fisher \
#     --save=runs/pictures/pruned
#
# Writes pathway.png, correction.png, live_page.png and report.png to docs/images. They show reviews that were written for
# them, and the scores of the run. Takes a few minutes on two CPU cores. Installs what it needs into .venv, and, as root
# on Debian or Ubuntu, Chromium.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/setup_env.sh"
cd "$CHECKOUT"

[[ -n "${MODEL:-}" ]] || fail "MODEL is not set; expected the folder of a saved model: MODEL=runs/cebab/model bash docs/images/make.sh"
[[ -f "$MODEL/config.json" ]] || fail "MODEL=$MODEL is no folder of a saved model"
make_venv
install_once test-without-torch --editable "$(with_extras test-without-torch)"
install_chromium || fail "chromium is not here and can only be installed by root with apt-get"
exec "$VENV_PYTHON" docs/images/make_pictures.py "$MODEL"
