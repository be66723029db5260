#!/usr/bin/env bash
# Install cxrdist with its development tools into .venv; run the linters and all tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install "[dev]"
ruff check .
ruff format --check .
mypy
shellcheck -x -P SCRIPTDIR launch/*.sh launch/*.sbatch shards/*.sbatch .ci/run
# A test waits half of its time, so two run side by side, the longest files first (tests/conftest.py);
# waiting threads leave them the cores.
export OMP_WAIT_POLICY=passive
exec pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
