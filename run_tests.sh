#!/usr/bin/env bash
# Set up, then check the style and run the tests.
#   bash run_tests.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-cluster.txt requirements-dev.txt
if [ -z "$(type -P chromium chromium-browser google-chrome google-chrome-stable)" ]; then  # in which the page is tested
  echo "installing Chromium"
  if [ "$(id -u)" = 0 ] && grep -q '^ID=debian' /etc/os-release; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  else
    python -m playwright install chromium
  fi || echo "no Chromium: the tests of the page will fail" >&2
fi
ruff check .
ruff format --check .
python -m pytest "$@"
