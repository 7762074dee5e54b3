"""docs/results: its CSVs and tables are what aggregate.py makes, today, of the runs in its archives."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

import aggregate

RESULTS = Path(aggregate.__file__).parent / "docs" / "results"
RATES = {
    "full": ["--learning_rate", "5e-5"],
    "probe": ["--learning_rate", "0", "1e-2"],
}  # the others have one in each cell


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/runs.tar.xz")))
def test_the_archives_give_the_tables(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.unpack_archive(RESULTS / folder / "runs.tar.xz", tmp_path, filter="data")
    for runs in tmp_path.rglob("runs"):
        monkeypatch.setattr("sys.argv", ["aggregate.py", "--output_dir", str(runs.parent), *RATES.get(folder, [])])
        aggregate.main()
        kept_in, compared = RESULTS / folder / runs.parent.relative_to(tmp_path), 0
        for path in kept_in.glob("table*.md"):
            assert path.read_text(encoding="utf-8") == (runs.parent / path.name).read_text(encoding="utf-8")
        for path in kept_in.glob("*.csv"):
            if not path.name.startswith("inside_"):  # analyse.py's
                kept, made = pd.read_csv(path), pd.read_csv(runs.parent / path.name)
                if "source" in kept:  # without the paper's own, which are the same everywhere
                    made = made[made["source"] == "ours"].reset_index(drop=True)
                pd.testing.assert_frame_equal(kept, made, check_dtype=False, rtol=1e-9)
                compared += 1
        assert compared >= 3
