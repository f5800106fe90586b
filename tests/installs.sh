#!/usr/bin/env bash
# Builds a wheel, installs it into a new environment, and uses it in an empty folder as a stranger would:
#   tests/installs.sh [PYTHON] [pip|uv]
# Say TORCH="torch==2.13.0" to install that torch first; without it the newest one comes, which is several GB.
# Not part of `make test`: it takes ten minutes and up to 6 GB. The last lines say what was run.
set -euo pipefail
python=${1:-python3}
installer=${2:-pip}
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$python" -m venv env
env/bin/pip install -q --disable-pip-version-check build uv
env/bin/python -m build -q --wheel --outdir wheels "$repository"
install() { if [ "$installer" = uv ]; then env/bin/uv pip install -q --python env/bin/python "$@"; else env/bin/pip install -q "$@"; fi; }
if [ -n "${TORCH:-}" ]; then env/bin/pip install -q "$TORCH"; fi # torch first: no other package may choose it
install wheels/*.whl
env/bin/pip check

mkdir empty
cd empty
export PATH="$folder/env/bin:$PATH" PYTHONNOUSERSITE=1
unset PYTHONPATH
python -c "
import pathlib, synapseclr
assert pathlib.Path(synapseclr.__file__).is_relative_to('$folder'), synapseclr.__file__
for name in synapseclr.__all__: getattr(synapseclr, name)"
synapseclr --help > /dev/null
synapseclr examples demo > mine.toml
small=(--set 'phantom.shape=[96,384,384]' --set phantom.defects=0.3 --set train.batch_size=24 --set train.epochs=1)
synapseclr demo --set run=small "${small[@]}"
synapseclr figures small --only fig1,fig2,picture
for file in report/index.html report/evaluate.html results.parquet synapses.h5ad figures/fig1.pdf; do test -s "small/$file"; done
synapseclr phantom --config mine.toml --set run=bare "${small[@]}" --no-notebook
for stage in fetch annotate train extract; do synapseclr $stage --config mine.toml --set run=bare "${small[@]}" --no-notebook; done
python -c "
import sys, torch
from synapseclr import read_features
print('installed with $installer and used: Python', sys.version.split()[0], '· torch', torch.__version__, '·', read_features('bare/features')[1].shape)"
