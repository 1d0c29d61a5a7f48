#!/bin/sh
# Installs .wheels (see wheels.sh) beside the machine's own packages, into the directory that is given, offline.
# Then: export PYTHONPATH=.:DIRECTORY
set -eu
cd "$(dirname "$0")/../.."
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$1" .wheels/*.whl
