#!/usr/bin/env bash
# Install cxrdist into .venv and run the whole way: pack, train, evaluate, explain, report.
#   bash launch/demo.sh                                    on synthetic X-rays that it makes itself
#   bash launch/demo.sh --source folder --input IMAGES     on yours: one sub-folder per class
# Everything goes to ./demo, which must not exist yet (--out DIR for another place).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
caller=$PWD
install ""
cd "$caller"
exec cxrdist demo "$@"
