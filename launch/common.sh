# Sourced by demo.sh and test.sh: make the virtual environment in the checkout and install into it.
# shellcheck shell=bash
# usage: install EXTRAS, such as "" or "[dev]"; a PyTorch that is in .venv already, such as the CPU build, stays
install() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "cxrdist needs Python 3.11 or newer, found $(python3 --version)" >&2
        exit 2
    }
    [ -x .venv/bin/python ] || python3 -m venv .venv
    echo "installing cxrdist$1 into .venv (PyTorch is large: some minutes the first time)"
    .venv/bin/pip install --quiet --editable ".$1"
    export PATH="$PWD/.venv/bin:$PATH"
}
