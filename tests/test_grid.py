"""Which runs a preset needs, counted by hand from the paper's tables, in what order, and who does them."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest
import torch
from conftest import random_model, run_of
from transformers import AutoConfig, BertConfig

import executors
import grid
import paper
import train
from common import InputError
from config import Run


class Memory(NamedTuple):
    total: float


# 20 (model, corruption) pairs, times data sets, times 3 learning rates; Figure 1's four cells are among Table 1's.
@pytest.mark.parametrize(
    ("preset", "runs"),
    [("table1", 360), ("table3", 360), ("table4", 120), ("table5", 120), ("figure1", 12), ("paper", 960)],
)
def test_number_of_runs(preset: str, runs: int) -> None:
    found = grid.expand(paper.PRESETS[preset], {})
    assert len(found) == runs == len(set(map(str, found)))
    if preset == "paper":
        kept = [run for run in found if run.save_vectors]
        assert len(kept) == 12 and {run.dataset for run in kept} == {"ag_news"}


# MiniLM has six layers. Methods: 0 % and 11 methods on two sides. Places: 0 %, six layers, three parts. Tunings: six on
# two sides, and 0 % but for the two that need a corruption. Progressive: 0 %, 1 to 5 layers of two sides, 100 %.
@pytest.mark.parametrize(
    ("preset", "runs"), [("methods", 1 + 11 * 2), ("places", 1 + 6 * 3), ("tunings", 6 * 2 + 4), ("progressive", 12)]
)
def test_the_lab(preset: str, runs: int) -> None:
    found = grid.expand(paper.PRESETS[preset], {})
    assert len(found) == runs == len(set(map(str, found)))
    for run in found:
        train.check(run)
    twice = grid.expand(paper.PRESETS[preset], {"seed": (1, 2), "dataset": ("bbc_news",)})
    assert len(twice) == 2 * runs and {run.dataset for run in twice} == {"bbc_news"}


# --layers takes the place of side and fraction, and they of it; the uncorrupted run has none of the method's fields.
def test_named_layers() -> None:
    runs = grid.expand(paper.PRESETS["methods"], {"layers": ("2", "3-4")}, {"method": "noise", "severity": 1.0})
    assert [run.layers for run in runs] == [None, "2", "3-4"] and [run.method for run in runs] == [
        "reinit",
        "noise",
        "noise",
    ]
    same = grid.expand(paper.PRESETS["methods"], {"layers": ("3-4", "3,4")}, {"method": "noise", "severity": 1.0})
    assert [run.layers for run in same] == [None, "3,4"]  # one place, one run
    halves = grid.expand(paper.PRESETS["places"], {"frac": (Fraction(1, 2),)}, {"parts": "ffn"})
    assert {(run.corrupt, run.layers, run.parts) for run in halves} == {("bottom", None, "ffn"), ("top", None, "ffn")}
    with pytest.raises(InputError, match="'7' is not a place"):
        grid.expand(paper.PRESETS["methods"], {"layers": ("7",)})


# One column, one row, another model (6 layers: 25 % is not a whole number of them), more seeds.
@pytest.mark.parametrize(
    ("axes", "runs"),
    [
        ({"dataset": ("imdb",)}, 20 * 3),
        ({"model": ("bert-large-uncased",), "frac": (Fraction(3, 4),), "corrupt": ("top",)}, 6 * 3),
        ({"model": ("minilm",), "dataset": ("sst2",), "seed": (0, 1)}, 4 * 3 * 2),
        ({"corrupt": ("none", "all"), "learning_rate": (3e-5,)}, 3 * 2 * 6),
    ],
)
def test_filters(axes: dict, runs: int, capsys: pytest.CaptureFixture) -> None:
    assert len(grid.expand(paper.PRESETS["table1"], axes)) == runs
    assert tuple(capsys.readouterr()) == ("", "")


# What every run gets comes before what the preset says; runs that it makes one are one.
def test_what_every_run_gets() -> None:
    shared = {"tuning": "full", "num_train_epochs": 3.0, "trainer": {"weight_decay": 0.1}}
    runs = grid.expand(paper.PRESETS["demo"], {"dataset": ("bbc_news",), "learning_rate": (1e-4,)}, shared)
    assert len(runs) == 4 and {(run.num_train_epochs, run.trainer["weight_decay"]) for run in runs} == {(3.0, 0.1)}


# A part of the layers that one of the models has not is left out and named; one that none has leaves nothing to do.
def test_parts_that_do_not_fit(capsys: pytest.CaptureFixture) -> None:
    axes = {"dataset": ("rte",), "corrupt": ("top",), "frac": (Fraction(1, 4), Fraction(1, 3))}
    models = ("bert-base-uncased", "minilm")
    runs = grid.expand(paper.PRESETS["table5"], axes | {"model": models})
    assert {(run.model, run.frac) for run in runs} == {(models[0], Fraction(1, 4))} | {
        (m, Fraction(1, 3)) for m in models
    }
    expected = "minilm: --frac 1/4 is left out: not a whole number of its 6 layers\n"
    assert tuple(capsys.readouterr()) == ("", expected)
    grid.expand(paper.PRESETS["table5"], axes | {"model": models, "frac": (Fraction(1, 4),)})
    assert tuple(capsys.readouterr()) == ("", expected)


def test_no_cell_is_left() -> None:
    for axes in ({"frac": (Fraction(1, 4),)}, {"frac": (Fraction(1),), "corrupt": ("none", "top")}):
        with pytest.raises(InputError, match="no cell is left: a --frac must be a whole number of layers"):
            grid.expand(paper.PRESETS["table1"], {"model": ("minilm",), **axes})


# One process a core with one thread each, unless told otherwise or memory is short; threads are shared out.
def test_layout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    runs = grid.expand(paper.PRESETS["table1"], {"dataset": ("rte",), "frac": (Fraction(0),)})
    large = 1e9 + 24 * (302_309_376 + 30_522 * 1_024) + 4 * 20 * 32 * 64 * 1_024 * 24  # bytes of BERT-large, by hand
    large *= 4 / 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for memory, wanted, expected in ((9, None, (8, 1)), (9, 2, (2, 4)), (3, None, (3, 2)), (0.5, None, (1, 8))):
        monkeypatch.setattr(grid.psutil, "virtual_memory", lambda memory=memory: Memory(memory * large))
        assert grid.worker_layout(runs, wanted, None) == (*expected, ())
        assert ("more memory than there is" in capsys.readouterr().err) == (expected[0] < (wanted or 8))


# With GPUs a process for each, or as many as asked for, and each told which GPU is its own.
def test_layout_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid.expand(paper.PRESETS["demo"], {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="there is none"):
        grid.worker_layout(runs, None, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(grid.psutil, "virtual_memory", lambda: Memory(1e15))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert grid.worker_layout(runs, None, None) == (2, 6, ("0", "1"))
    assert grid.worker_layout(runs, None, 3) == (6, 2, ("0", "1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f6c")
    assert grid.worker_layout(runs, 4, None) == (4, 3, ("5", "GPU-8f6c"))


class Pool:
    """Does no run: the one of seed 1 is another process's at first, the one of seed 2 fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Run], bool]] = []

    def run_all(self, runs: list[Run], wait_for_others: bool) -> Iterator[executors.Outcome]:
        self.asked.append((list(runs), wait_for_others))
        for run in runs:
            state = {1: "done" if wait_for_others else "busy", 2: "failed"}.get(run.config.seed, "done")
            yield executors.Outcome(run, state, f"seed {run.config.seed}")


# The longest first, and of a probe's learning rates the one that computes the others' features; what another process
# does comes last; what failed is named.
def test_order(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    probe = ["--tuning", "probe", "--num_train_epochs", "40"]
    changes = {
        "short": ["--num_train_epochs", "1"],
        "busy": ["--num_train_epochs", "2", "--seed", "1"],
        "long": ["--num_train_epochs", "9"],
        "failing": ["--num_train_epochs", "8", "--seed", "2"],
        "probe": probe,
        "shortest": ["--max_steps", "1", "--per_device_train_batch_size", "16"],
        "its other rate": [*probe, "--learning_rate", "1e-2"],
    }
    runs = {run_of([*flags, *change]).name: name for name, change in changes.items()}
    pool = Pool()
    assert grid.dispatch([run_of([*flags, *change]) for change in changes.values()], pool) == ["seed 2"]
    (first, wait), (last, wait_at_last) = pool.asked
    assert [runs[run.name] for run in first] == [
        "long",
        "failing",
        "busy",
        "short",
        "probe",
        "shortest",
        "its other rate",
    ]
    assert [runs[run.name] for run in last] == ["busy"] and (wait, wait_at_last) == (False, True)
    assert [line.partition("]")[0] for line in capsys.readouterr().out.splitlines()][-1] == "[7 of 7"


# A model that cannot be had is asked for once, not for each of its runs; not one run is left, so the reason is told.
def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(grid.cost.models.HfApi, "model_info", lambda *_, **__: asked.append(1) or 1 / 0)
    flags = ["--preset", "table1", "--model", "no-such/model", "--dataset", "rte", "--frac", "0"]
    monkeypatch.setattr(grid.cost, "shape_of", lambda model: BertConfig())
    monkeypatch.setattr("sys.argv", ["grid.py", *flags, "--output_dir", str(tmp_path), "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        grid.main()
    assert exit_info.value.code == 2 and len(asked) == 1 and not list(tmp_path.iterdir())
    assert "'no-such/model' is not on this machine" in capsys.readouterr().err


# A dry run counts what can be done. A decoder has no [CLS]: its run is refused; one that is not here counts unchecked,
# but for its flags. Where no run is left it ends as the grid does.
def test_a_dry_run_of_runs_that_are_refused(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shape_of, small = grid.cost.shape_of, AutoConfig.from_pretrained(tiny_bert)
    decoder = random_model("gpt2", tmp_path / "decoder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(grid.cost, "shape_of", lambda model: small if model == "no-such/model" else shape_of(model))

    def dry_run(*words: object) -> tuple[int, str, str]:
        flags = ["--preset", "table1", "--dataset", "rte", "--frac", "0", "--learning_rate", "1e-5", "--dry_run"]
        where = ["--output_dir", tmp_path / "outputs", "--data_dir", tmp_path / "data"]
        monkeypatch.setattr("sys.argv", ["grid.py", *flags, *map(str, [*where, "--model", *words])])
        code = 0
        try:
            grid.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    code, listed, _ = dry_run(tiny_bert, decoder, "no-such/model")
    words = [line.split()[0] for line in listed.splitlines()[:3]]
    assert code == 1 and words == ["missing", "refused", "missing"] and "needs a head that reads [CLS] alone" in listed
    assert "3 runs: 0 are there, 2 to do, 1 that cannot be done" in listed and "'no-such/model' is not on" in listed
    code, listed, error = dry_run(decoder)
    assert code == 2 and not listed and error.startswith("grid.py: error: --pooling cls") and error.count("\n") == 1
    assert dry_run("no-such/model")[0] == 0 and dry_run("no-such/model", "--tuning", "nonsense")[0] == 2
    half = ["no-such/model", "--frac", "1/2", "--severity", "0.5"]  # which reinit does not take
    assert dry_run(*half, "--method", "noise")[0] == 0 and dry_run(*half)[0] == 2
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "data").exists()


# What another grid notes in the meantime stays; a file that cannot be read stays as it is.
def test_two_grids_note_what_they_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["grid.py", "--frac", "0"])
    path, note = tmp_path / "asked.json", Thread(target=grid.note_asked, args=(["a", "b"], tmp_path))
    with grid.file_lock(tmp_path / ".asked.lock"):
        note.start()
        note.join(timeout=0.3)
        assert note.is_alive() and not path.exists()
        path.write_text('{"python grid.py": ["c"]}')
    note.join()
    assert json.loads(path.read_text()) == {"python grid.py": ["c"], "python grid.py --frac 0": ["a", "b"]}
    path.write_text('{"python grid.py": ')
    with pytest.raises(InputError, match="cannot be read, delete it and do the grid's command again"):
        grid.note_asked(["d"], tmp_path)
    assert path.read_text() == '{"python grid.py": ' and {it.name for it in tmp_path.iterdir()} <= {
        path.name,
        ".asked.lock",
    }


# A flag of a converged probe goes with the preset that has one, and with no other.
def test_flags_that_need_the_presets_tuning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for preset, code in (("table4b", 0), ("demo", 2)):
        words = ["--preset", preset, "--model", "minilm", "--dataset", "bbc_news", "--probe_reads", "mean", "--dry_run"]
        monkeypatch.setattr("sys.argv", ["grid.py", *words])
        try:
            grid.main()
            ended = 0
        except SystemExit as end:
            ended = end.code
        out, err = capsys.readouterr()
        assert ended == code and ("4 runs" in out if code == 0 else "leave it out" in err)
