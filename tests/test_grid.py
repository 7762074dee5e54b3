"""Which runs a preset needs, counted by hand from the paper's tables, and what they cost."""

from fractions import Fraction
from pathlib import Path

import pytest

import grid
import train


# 20 (model, damage) pairs, times data sets, times 3 learning rates; Figure 1's four cells are among Table 1's.
@pytest.mark.parametrize(
    ("preset", "runs"),
    [("table1", 360), ("table3", 360), ("table4", 120), ("table5", 120), ("figure1", 12), ("paper", 960)],
)
def test_number_of_runs(preset: str, runs: int) -> None:
    flag_lists = grid.jobs(grid.PRESETS[preset], {})
    assert len(flag_lists) == runs == len({tuple(flags) for flags in flag_lists})
    for flags in flag_lists:
        train.parse(flags)
    if preset == "paper":
        kept = [flags for flags in flag_lists if "--save_vectors" in flags]
        assert len(kept) == 12 and all("ag_news" in flags for flags in kept)


# One column, one row, another model (6 layers: 25 % is no whole number of them), more seeds.
@pytest.mark.parametrize(
    ("axes", "runs"),
    [
        ({"dataset": ("imdb",)}, 20 * 3),
        ({"model": ("bert-large-uncased",), "percent": (Fraction(75),), "corrupt": ("top",)}, 6 * 3),
        ({"model": ("minilm",), "dataset": ("sst2",), "seed": ("0", "1")}, 4 * 3 * 2),
        ({"corrupt": ("none", "all"), "learning_rate": ("3e-5",)}, 3 * 2 * 6),
    ],
)
def test_filters(axes: dict, runs: int) -> None:
    assert len(grid.jobs(grid.PRESETS["table1"], axes)) == runs


def test_no_cell_is_left() -> None:
    with pytest.raises(train.RunError, match="whole number of layers"):
        grid.jobs(grid.PRESETS["table1"], {"model": ("minilm",), "percent": (Fraction(25),)})


# By hand: minilm has 6 x (12 x 384^2 + 13 x 384) weights in its layers; RTE, not prepared, at most 2,490 and 277 rows
# of 64 tokens; 6 operations a weight and token in 10 epochs of training, 2 in 11 evaluations; a probe reads them once.
def test_cost_of_a_run(tmp_path: Path) -> None:
    flags = ["--model", "minilm", "--dataset", "rte", "--data_dir", str(tmp_path)]
    weights = 10_646_784
    read, operations = grid.cost(flags, set())
    assert read == 10 * 2_490 * 64 + 11 * 277 * 64
    assert operations == pytest.approx(weights * (60 * 2_490 + 22 * 277) * 64)
    probe, encoded = [*flags, "--tuning", "probe"], set()
    assert grid.cost(probe, encoded) == (2_767 * 64, 2 * weights * 2_767 * 64)
    assert grid.cost([*probe, "--learning_rate", "2e-5"], encoded) == (0, 0)


# A model that cannot be had is asked for once, not for each of its runs; not one run is left, so the reason is told.
def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(grid.train.corrupt.HfApi, "model_info", lambda *_, **__: asked.append(1) or 1 / 0)
    flags = ["--preset", "table1", "--model", "no-such/model", "--dataset", "rte", "--percent", "0"]
    monkeypatch.setitem(grid.SHAPES, "no-such/model", (12, 768))
    monkeypatch.setattr("sys.argv", ["grid.py", *flags, "--output_dir", str(tmp_path), "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        grid.main()
    assert exit_info.value.code == 2 and len(asked) == 1 and not list(tmp_path.iterdir())
    assert "'no-such/model' is not on this machine" in capsys.readouterr().err
