#!/usr/bin/env bash
# Install cxrdist with its development tools into .venv; run the linters and all tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install "[dev]"
ruff check .
ruff format --check .
mypy
shellcheck -x -P SCRIPTDIR launch/*.sh launch/*.sbatch shards/*.sbatch .ci/run
# Tests wait half of their time, so two run side by side, the longest files first
# (tests/conftest.py). Their networks are small: a second thread costs more than it computes.
export OMP_NUM_THREADS=1
exec pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
