"""What a run says while it is done, what is kept of it, and what a grid shows, on a terminal and elsewhere."""

import json
import logging
import os
import re
import sys
import warnings
from contextlib import closing
from importlib.util import find_spec
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import run_of
from rich.console import Console
from test_run_dir import cut_off

import callbacks
import config
import executors
import progress
import run_dir
import train
from config import Run
from executors import run_in_process

CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


def noisy(run: Run, wait: bool, threads: int, gpu: str | None, answer: Connection) -> None:
    """In a run's process: do the run, which says something in every way, and fails at its end if it keeps the model."""

    def noise(*_: object, **__: object) -> None:
        print("printed")
        print("an error", file=sys.stderr)
        os.write(2, b"said by C\n")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("datasets").warning("a library's warning")
        logging.getLogger("transformers").error("a library's error")

    console = os.open(Path(run.config.output_dir) / "console", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(console, descriptor)
    callbacks.Progress.on_train_begin = noise
    if run.config.save_model:
        run_dir.publish = lambda run: 1 / 0
    run_in_process(run, wait, threads, gpu, answer)


# A process's run has a log, with what Python, its libraries and C say, all of it once, and the console gets none of it;
# also the run that fails has one, beside the result that is there.
def test_each_run_has_its_log(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "run_in_process", noisy)
    (tmp_path / "outputs").mkdir()
    run, failing = run_of(flags), run_of([*flags, "--save_model"])
    with closing(executors.LocalPool(executors.WorkerLayout(1, 1))) as pool:
        assert [state for _, state, _ in pool.run_all([run, failing])] == ["done", "failed"]
    assert (tmp_path / "outputs" / "console").read_text() == ""
    said = ["printed", "an error", "said by C", ".*Warning: a warning", ".*a library's warning", ".*a library's error"]
    log = (run.folder / "log.txt").read_text()
    assert [len(re.findall(rf"(?m)^([\d: -]{{20}})?{line}$", log)) for line in said] == [1] * len(said)
    assert log.count("INFO transformers.trainer: ***** Running training *****") == 1
    assert log.count("'eval_weighted_f1'") == 2 and log.count(run.command) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d |said by C$", line) for line in log.splitlines())
    assert run_dir.load_valid_result(run)
    log = (run.folder / "failure.log").read_text()
    assert "said by C" in log and "ZeroDivisionError" in log.splitlines()[-1]


# A run by itself says on the console what it always did, the Trainer's lines or its bar; the log has the rest too.
@pytest.mark.parametrize("bar", [False, True])
def test_the_console_of_a_single_run(
    bar: bool, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--disable_tqdm", str(not bar)])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    train.main()
    out, err = capsys.readouterr()
    assert out.count("'eval_weighted_f1'") == 2 and "weighted F1" in out.splitlines()[-3]
    assert "Running training" not in out + err and ("6/6" in err) == bar
    log = (run_of(flags).folder / "log.txt").read_bytes().decode()
    assert log.count("'eval_weighted_f1'") == 2 and "INFO transformers.trainer" in log
    assert not CONTROL.search(log) and log.count("\r") == 0


def curves(run: Run) -> pd.DataFrame:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # not in each run's process

    events = EventAccumulator(str(run.tensorboard)).Reload()
    names = {"train_loss": "train/loss", "eval_loss": "eval/loss", "weighted_f1": "eval/weighted_f1"}
    return pd.DataFrame({name: [event.value for event in events.Scalars(tag)] for name, tag in names.items()})


# TensorBoard's own reader finds each run of a process under its name, with the curves of its table and nothing else's,
# also if the run was done before, or was cut off and went on; to report changes no digit.
def test_tensorboard(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags += ["--report_to", "tensorboard", "--num_train_epochs", "3"]
    plans = [run_of([*flags, "--tuning", tuning]) for tuning in ("full", "probe")]
    failing = run_of([*flags, "--learning_rate", "1e38"])
    assert train.run_in_worker(failing, False)[0] == "failed"
    for run in (*plans, *plans):
        assert train.run_in_worker(run, False)[0] == "done"
        table = pd.read_csv(run.folder / "epochs.csv")[["train_loss", "eval_loss", "weighted_f1"]]
        pd.testing.assert_frame_equal(curves(run), table.astype(np.float32).astype(float), check_exact=True)
        (run.folder / "result.json").unlink()
    assert {path.name for path in (tmp_path / "outputs" / "tensorboard").iterdir()} == {
        run.folder.name for run in (*plans, failing)
    }
    other = run_of([*flags, "--report_to", "none", "--output_dir", str(tmp_path / "other")])
    train.run_or_reuse(other)
    for name in ("epochs.csv", "predictions.csv.gz"):
        assert (other.folder / name).read_bytes() == (plans[0].folder / name).read_bytes()

    resumed = [*flags, "--resume", "--output_dir", str(tmp_path / "resumed")]
    cut_off(run_of(resumed), 2, monkeypatch)
    train.run_or_reuse(run := run_of(resumed))
    pd.testing.assert_frame_equal(curves(run), curves(plans[0]))


# Told in one line, and nothing is written: a name for all, a reporter that is none, and one that is not installed.
def test_reports_that_are_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    absent = [["--report_to", name] for name in config.REPORTERS if name != "none" and not find_spec(name)]
    for wrong in (["--run_name", "mine"], ["--report_to", "nobody"], ["--report_to", "mlflow"], *absent):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *wrong])
        with pytest.raises(SystemExit) as exit_info:
            train.main()
        assert exit_info.value.code == 2 and not (tmp_path / "outputs").exists()
        assert re.fullmatch(rf"train.py: error: (argument )?{wrong[0]}.*\n", capsys.readouterr().err)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def progress_is(run: Run, epoch: float, f1: float | None = None) -> None:
    """Leave what a process that does this run of four epochs leaves."""
    (run.work_dir / "new").mkdir(parents=True, exist_ok=True)
    now = {"epoch": epoch, "epochs": 4, "fraction": epoch / 4, "weighted_f1": f1}
    (run.work_dir / "now.json").write_text(json.dumps(now))


# Of costs 1, 1 and 2 the last was cut off in epoch 2 of 4, so that a quarter of it need not be done again: 3.5 to do.
# After 100 s the first is done and the last is half done: 1 + 2 (1/2 - 1/4) = 1.5, and 2 are left. Then one fails.
def test_the_time_left(flags: list[str], clock: list[float]) -> None:
    first, second, last = runs = [run_of([*flags, "--resume", "--seed", seed]) for seed in "012"]
    progress_is(last, 1.5)
    (last.work_dir / "new").rmdir()
    display = progress.Display(runs, [1, 1, 2], "2 x 1 thread")
    assert display.time_left() is None
    progress_is(last, 2.0)
    clock[0] += 100
    display.add_outcome(first, "done", "")
    assert display.time_left() == pytest.approx(100 * 2 / 1.5)
    display.add_outcome(second, "failed", "")
    assert display.time_left() == pytest.approx(100 * 1 / 1.5)


# What the display shows at two widths: what is done, failed and left, the share of the work and the time (of five equal
# runs one failed, one is done and one half done: 1.5 of 4), each run that is under way with its epoch and the last F1.
# No line is wider than the terminal, and what does not fit is the run's name.
@pytest.mark.parametrize("width", [80, 50])
def test_the_display(width: int, flags: list[str], clock: list[float]) -> None:
    flags += ["--dataset", "bbc_news", "--corrupt", "top", "--frac", "1/2"]
    done, failed, half_done, beginning, _ = runs = [run_of([*flags, "--seed", seed]) for seed in "01234"]
    console = Console(file=StringIO(), force_terminal=True, width=width)
    display = progress.Display(runs, [1] * 5, "2 x 1 thread", console)
    progress_is(half_done, 2.0, 0.5678)
    (beginning.work_dir / "new").mkdir(parents=True)
    clock[0] += 90
    display.add_outcome(done, "done", "")
    display.add_outcome(failed, "failed", "")
    console.print(display.render())
    head, bar, *lines = CONTROL.sub("", console.file.getvalue()).splitlines()
    assert head == "1 of 5 runs done, 1 failed, 3 left (2 x 1 thread)"
    assert re.fullmatch(r"[━╸╺]+ +38 % +90 s gone, about 2 min left *", bar)
    assert max(map(len, [head, bar, *lines])) <= width and len(bar) == width - 2
    what = "tiny-bert, 50 % top, bbc_news, lr 0.001, seed {}"
    for line, seed, state in zip(lines, "23", (r"epoch 2 of 4 +F1 56.78 %", "starting"), strict=True):
        name, shown = re.fullmatch(rf"(.*?) +{state} *", line)[1], what.format(seed)
        assert name == shown if width == 80 else name.endswith("…") and shown.startswith(name[:-1])


# On a terminal a line for each run that ended, as it is, above the display; the cursor comes back in whatever way the
# grid ends.
def test_the_display_ends(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    runs = [run_of([*flags, "--seed", seed]) for seed in "01"]
    console = Console(file=StringIO(), force_terminal=True, width=80)
    with pytest.raises(KeyboardInterrupt), progress.Display(runs, [1, 1], "1 x 2 threads", console) as display:
        display.add_outcome(runs[0], "done", "model [bold]x[/bold]: weighted F1 12.34 %" + 80 * ".")
        raise KeyboardInterrupt
    drawn = console.file.getvalue()
    assert drawn.count("model [bold]x[/bold]: weighted F1 12.34 %" + 80 * "." + "\n") == 1
    assert "1 of 2 runs done, 0 failed, 1 left" in drawn
    assert -1 < drawn.rindex("\x1b[?25l") < drawn.rindex("\x1b[?25h")


# Elsewhere a plain line for each, and nothing that moves a cursor.
def test_plain_lines(flags: list[str], clock: list[float], capsys: pytest.CaptureFixture) -> None:
    runs = [run_of([*flags, "--seed", seed]) for seed in "012"]
    with progress.Display(runs, [1, 1, 1], "1 x 2 threads") as display:
        for run, state in zip((runs[0], runs[1], runs[1], runs[2]), ("done", "again", "failed", "done"), strict=True):
            clock[0] += 10
            display.add_outcome(run, state, "what became of it")
    assert capsys.readouterr().out.splitlines() == [
        "[1 of 3, about 20 s left] what became of it",
        "[1 of 3, about 40 s left] again: what became of it",
        "[2 of 3, about 30 s left] failed: what became of it",
        "[3 of 3] what became of it",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(119.4, "119 s"), (120, "2 min"), (5399, "90 min"), (5400, "1.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
