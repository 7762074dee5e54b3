"""Which runs a preset needs, counted by hand from the paper's tables, and who does them."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import BertConfig

import grid
import settings


class Memory(NamedTuple):
    total: float


# 20 (model, damage) pairs, times data sets, times 3 learning rates; Figure 1's four cells are among Table 1's.
@pytest.mark.parametrize(
    ("preset", "runs"),
    [("table1", 360), ("table3", 360), ("table4", 120), ("table5", 120), ("figure1", 12), ("paper", 960)],
)
def test_number_of_runs(preset: str, runs: int) -> None:
    flag_lists = grid.jobs(grid.PRESETS[preset], {})
    assert len(flag_lists) == runs == len({tuple(flags) for flags in flag_lists})
    for flags in flag_lists:
        settings.parse(flags)
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
    with pytest.raises(settings.RunError, match="whole number of layers"):
        grid.jobs(grid.PRESETS["table1"], {"model": ("minilm",), "percent": (Fraction(25),)})


# A cell's learning rates stay together, seeds do not; the cell with the most rows to train on comes first.
def test_cells_and_their_order(tmp_path: Path) -> None:
    axes = {"model": ("minilm",), "dataset": ("rte", "mrpc"), "percent": (Fraction(0),), "seed": ("0", "1")}
    flag_lists = [[*flags, "--data_dir", str(tmp_path)] for flags in grid.jobs(grid.PRESETS["table5"], axes)]
    cells = grid.by_cell(flag_lists)
    assert [len(cell) for cell in cells] == [3, 3, 3, 3] and sorted(
        flags for cell in cells for flags in cell
    ) == sorted(flag_lists)
    assert [cell[0][3] for cell in cells] == ["mrpc", "mrpc", "rte", "rte"]
    assert all(len({tuple(flags[6:]) for flags in cell}) == 1 for cell in cells)


# One worker a core with one thread each, unless told otherwise or memory is short; threads are shared out.
def test_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flag_lists = grid.jobs(grid.PRESETS["table1"], {"dataset": ("rte",), "percent": (Fraction(0),)})
    large = 1e9 + 24 * (302_309_376 + 30_522 * 1_024) + 4 * 20 * 32 * 64 * 1_024 * 24  # bytes of BERT-large, by hand
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for memory, wanted, expected in ((9, None, (8, 1)), (9, 2, (2, 4)), (3, None, (3, 2)), (0.5, None, (1, 8))):
        monkeypatch.setattr(grid.psutil, "virtual_memory", lambda memory=memory: Memory(memory * large))
        assert grid.staff(flag_lists, wanted, None)[:2] == expected
        assert ("more memory than there is" in capsys.readouterr().err) == (expected[0] < (wanted or 8))


# With GPUs a worker for each, or as many as asked for, and each told which GPU is its own.
def test_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    flag_lists = grid.jobs(grid.PRESETS["demo"], {})
    with pytest.raises(settings.RunError, match="there is none"):
        grid.staff(flag_lists, None, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert grid.staff(flag_lists, None, None) == (2, 6, ("0", "1"))
    assert grid.staff(flag_lists, None, 3) == (6, 2, ("0", "1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f6c")
    assert grid.staff(flag_lists, 4, None) == (4, 3, ("5", "GPU-8f6c"))


# A model that cannot be had is asked for once, not for each of its runs; not one run is left, so the reason is told.
def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(grid.corrupt.HfApi, "model_info", lambda *_, **__: asked.append(1) or 1 / 0)
    flags = ["--preset", "table1", "--model", "no-such/model", "--dataset", "rte", "--percent", "0"]
    monkeypatch.setitem(grid.cost.CONFIGS, "no-such/model", BertConfig())
    monkeypatch.setattr("sys.argv", ["grid.py", *flags, "--output_dir", str(tmp_path), "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        grid.main()
    assert exit_info.value.code == 2 and len(asked) == 1 and not list(tmp_path.iterdir())
    assert "'no-such/model' is not on this machine" in capsys.readouterr().err
