#!/usr/bin/env bash
# All of it: set up, prepare the data, do the runs, look inside those that kept weights, rebuild the tables, write the page.
#   bash run_all.sh [--preset demo|paper|...] [any flag of grid.py; any flag of train.py, for every run]
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in *" --output"[_-]"dir"* | *" --data"[_-]"dir"*)
  echo "run_all.sh: error: the folders are data/ and outputs/: for others run data_prep.py, grid.py, aggregate.py" >&2
  exit 2 ;;
esac
source "$here/setup.sh" requirements.txt
code=0
python grid.py "$@" || code=$?  # which prepares the data sets that the preset needs, as data_prep.py does
case " $* " in *" --dry"[_-]"run "* | *" -h "* | *" --help"*) exit "$code" ;; esac
if [ "$code" -le 1 ]; then  # 1: some runs failed, and the tables show what is there
  python aggregate.py || code=$?
  if compgen -G "outputs/runs/*/states" >/dev/null; then
    python analyse.py || code=1
  fi
  python report.py || true  # without a table there is no page: it says why
fi
exit "$code"
