#!/usr/bin/env bash
# Set up, then check the style and run the tests.
#   bash run_tests.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-cluster.txt requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
