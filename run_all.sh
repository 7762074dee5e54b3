#!/usr/bin/env bash
# The whole line: set up, prepare the data, do the runs, rebuild the tables.
#   bash run_all.sh [--preset demo] [any flag of train.py, for every run]
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in *" --output"[_-]"dir"* | *" --data"[_-]"dir"*)
  echo "run_all.sh: error: the folders are data/ and outputs/: for others run data_prep.py, grid.py, aggregate.py" >&2
  exit 2 ;;
esac
source "$here/setup.sh" requirements.txt
python data_prep.py
code=0
python grid.py "$@" || code=$?
case " $* " in *" --dry_run "* | *" -h "* | *" --help "*) exit "$code" ;; esac
case $code in
  0) python aggregate.py ;;
  1) python aggregate.py || true ;;  # some runs failed: the tables show what is there
esac
exit "$code"
