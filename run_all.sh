#!/usr/bin/env bash
# The whole line: set up, prepare the data, do the runs, rebuild the tables.
#   bash run_all.sh [--preset demo] [any flag of train.py, for every run]
here=$(dirname "${BASH_SOURCE[0]}")
case " $* " in *" --output_dir"* | *" --data_dir"*)
  echo "run_all.sh: error: the folders are data/ and outputs/: for others run data_prep.py, grid.py, aggregate.py" >&2
  exit 2 ;;
esac
source "$here/setup.sh" requirements.txt
python data_prep.py
code=0
python grid.py "$@" || code=$?
[ "$code" -gt 1 ] || python aggregate.py  # with failed runs (1) the tables show what is there
exit "$code"
