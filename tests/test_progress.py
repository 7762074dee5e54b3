"""What a run says while it is done, what is kept of it, and what a grid shows, on a terminal and elsewhere."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_unfinished import cut_off

import progress
import settings
import train
import unfinished
import workers

ROOT = Path(train.__file__).parent
CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


@pytest.fixture
def flags(tiny_bert: Path, small_data: Path, tmp_path: Path) -> list[str]:
    where = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    return [*where, "--num_train_epochs", "2", "--learning_rate", "1e-3", "--output_dir", str(tmp_path / "outputs")]


def noisy(runs: list[settings.Run], again: list[str]) -> list[object]:
    """In a worker: do the runs, each of which says something in every way, and then one that fails."""

    def noise(*_: object, **__: object) -> None:
        print("printed")
        print("an error", file=sys.stderr)
        os.write(2, b"said by C\n")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("datasets").warning("a library's warning")
        logging.getLogger("transformers").error("a library's error")

    def loggers() -> list[object]:
        found = [logging.getLogger(name) for name in ("transformers", "datasets", "huggingface_hub")]
        return [(each.level, list(each.handlers), [handler.level for handler in each.handlers]) for each in found]

    unfinished.HowFar.on_train_begin = noise
    train.quieten()
    before = loggers()
    said = [train.do(run.flags, run.settings, False)[0] for run in runs]
    unfinished.install = lambda run: 1 / 0
    return [*said, train.do(again, runs[0].settings, False)[0], loggers() == before]


# A worker's runs have a log each, with what Python, its libraries and C say, all of it once, and the console gets none
# of it; also the run that fails has one, beside the result that is there.
def test_each_run_has_its_log(flags: list[str], capfd: pytest.CaptureFixture) -> None:
    runs = [settings.plan([*flags, "--seed", seed]) for seed in "01"]
    with workers.Here(workers.Staff(1, 1)) as here:
        (said,) = here.each(noisy, runs, [*flags, "--save_model"])
    assert said == ["done", "done", "failed", True] and tuple(capfd.readouterr()) == ("", "")
    said = [
        "printed",
        "an error",
        "said by C",
        ".*UserWarning: a warning",
        ".*a library's warning",
        ".*a library's error",
    ]
    for number, run in enumerate(runs):
        log = (run.folder / "log.txt").read_text()
        assert [len(re.findall(rf"(?m)^([\d: -]{{20}})?{line}$", log)) for line in said] == [1] * len(said)
        assert log.count("INFO transformers.trainer: ***** Running training *****") == 1
        assert log.count("'eval_weighted_f1'") == 2 and log.count(f"--seed {number}") == log.count("--seed") == 1
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d |said by C$", line) for line in log.splitlines())
    assert settings.result_of(runs[0])
    log = (runs[0].folder / "failure.log").read_text()
    assert "said by C" in log and "ZeroDivisionError" in log.splitlines()[-1]


# A single run says on the console what it always did, the Trainer's lines or its bar; the log has the rest too.
@pytest.mark.parametrize("bar", [False, True])
def test_the_console_of_a_single_run(bar: bool, flags: list[str]) -> None:
    command = [sys.executable, "train.py", *flags, "--disable_tqdm", str(not bar)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("'eval_weighted_f1'") == 2, done.stderr
    assert "Running training" not in done.stdout + done.stderr and ("6/6" in done.stderr) == bar
    (log,) = settings.plan(flags).folder.glob("log.txt")
    assert log.read_text().count("'eval_weighted_f1'") == 2 and "INFO transformers.trainer" in log.read_text()
    assert not CONTROL.search(log.read_text()) and log.read_text().count("\r") == 0


def curves(run: settings.Run) -> pd.DataFrame:
    events = EventAccumulator(str(run.tensorboard)).Reload()
    names = {"train_loss": "train/loss", "eval_loss": "eval/loss", "weighted_f1": "eval/weighted_f1"}
    return pd.DataFrame({name: [event.value for event in events.Scalars(tag)] for name, tag in names.items()})


# TensorBoard's own reader finds each run of a worker under its name, with the curves of its table and nothing else's,
# also if the run was done before, or was cut off and went on; to report changes no digit.
def test_tensorboard(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags += ["--report_to", "tensorboard", "--num_train_epochs", "3"]
    plans = [settings.plan([*flags, "--tuning", tuning]) for tuning in ("full", "probe")]
    failing = settings.plan([*flags, "--learning_rate", "1e38"])
    assert train.do(failing.flags, failing.settings, False)[0] == "failed"
    for run in (*plans, *plans):
        assert train.do(run.flags, run.settings, False)[0] == "done"
        table = pd.read_csv(run.folder / "epochs.csv")[["train_loss", "eval_loss", "weighted_f1"]]
        pd.testing.assert_frame_equal(curves(run), table.astype(np.float32).astype(float), check_exact=True)
        (run.folder / "result.json").unlink()
    assert {path.name for path in (tmp_path / "outputs" / "tensorboard").iterdir()} == {
        run.folder.name for run in (*plans, failing)
    }
    other = settings.plan([*flags, "--report_to", "none", "--output_dir", str(tmp_path / "other")])
    train.once(other)
    for name in ("epochs.csv", "predictions.csv.gz"):
        assert (other.folder / name).read_bytes() == (plans[0].folder / name).read_bytes()

    resumed = [*flags, "--resume", "--output_dir", str(tmp_path / "resumed")]
    cut_off(settings.plan(resumed), 2, monkeypatch)
    train.once(run := settings.plan(resumed))
    pd.testing.assert_frame_equal(curves(run), curves(plans[0]))


# Told in one line, and nothing is written: a name for all, a reporter that is none, and one that is not installed.
def test_reports_that_are_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    absent = [["--report_to", name] for name in settings.REPORTERS if not find_spec(name)]
    for wrong in (["--run_name", "mine"], ["--report_to", "nobody"], ["--report_to", "mlflow"], *absent):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *wrong])
        with pytest.raises(SystemExit) as exit_info:
            train.main()
        assert exit_info.value.code == 2 and not (tmp_path / "outputs").exists()
        assert re.fullmatch(rf"train.py: error: {wrong[0]}.*\n", capsys.readouterr().err)


# Of costs 1, 1 and 2 the last was cut off in epoch 2 of 4, so that a quarter of it need not be done again: 3.5 to do.
# After 100 s the first is done and the last is half done: 1 + 2 (1/2 - 1/4) = 1.5, and 2 are left. Then one fails.
def test_the_time_left(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = runs = [settings.plan([*flags, "--resume", "--seed", seed]) for seed in "012"]

    def says(epoch: float, fraction: float) -> None:
        now = {"epoch": epoch, "epochs": 4, "fraction": fraction, "weighted_f1": None}
        (last.unfinished / "now.json").write_text(json.dumps(now))

    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    last.unfinished.mkdir(parents=True)
    says(1.5, 0.375)
    display = progress.Display(runs, [1, 1, 2], "one worker")
    assert display.time_left() is None
    (last.unfinished / "new").mkdir()
    says(2.0, 0.5)
    clock[0] += 100
    display.ended_as(first, "done", "")
    assert display.time_left() == pytest.approx(100 * 2 / 1.5)
    display.ended_as(second, "failed", "")
    assert display.time_left() == pytest.approx(100 * 1 / 1.5)


class Terminal:
    """A grid whose output is a pseudo-terminal of 80 columns, and all that was drawn on it."""

    def __init__(self, *flags: str) -> None:
        self.end, line = pty.openpty()
        self.resize(80)
        env = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "grid.py", *flags]
        start = {"stdin": line, "stdout": line, "stderr": line, "start_new_session": True, "env": env}
        self.grid = subprocess.Popen(command, cwd=ROOT, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY), **start)
        os.close(line)
        self.drawn = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self, until: str | None = None) -> int | None:
        """Read until a pattern is seen, or to the end; then the exit code."""
        raw, since = self.drawn.encode(), len(self.drawn)
        with contextlib.suppress(OSError):
            while more := os.read(self.end, 65536):
                raw += more
                self.drawn = raw.decode(errors="ignore")
                if until and re.search(until, CONTROL.sub("", self.drawn[since:])):
                    return None
        return self.grid.wait(60)


# The display on a terminal: the running run with its epoch and its F1 (that of its table), what is done, failed and
# left; it follows the terminal's width, and leaves the cursor visible when it ends, by itself or by Ctrl-C.
def test_the_display(tiny_bert: Path, small_data: Path, tmp_path: Path) -> None:
    epochs, output = 40, tmp_path / "outputs"
    flags = ["--preset", "demo", "--model", str(tiny_bert), "--dataset", "bbc_news", "--percent", "0", "--jobs", "1"]
    flags += ["--data_dir", str(small_data), "--output_dir", str(output), "--num_train_epochs", str(epochs)]

    cut = Terminal(*flags, "--num_train_epochs", "5000", "--output_dir", str(tmp_path / "cut"))
    assert cut.read(until=r"epoch \d+ of 5000 +F1 \d") is None
    cut.resize(50)
    cut.read(until="gone")
    wide = len(cut.drawn)
    cut.read(until="(?s)gone.*F1")
    lines = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", cut.drawn[wide:])) if "lr" in line or "gone" in line]
    assert lines and max(map(len, lines)) <= 50
    os.write(cut.end, b"\x03")
    assert cut.read() == 130 and "interrupted: " in cut.drawn
    assert cut.drawn.rindex("\x1b[?25h") > cut.drawn.rindex("\x1b[?25l")

    probe = ["--model", str(tiny_bert), "--dataset", "bbc_news", "--tuning", "probe", "--learning_rate", "1e-2"]
    blocked = settings.plan([*probe, *flags[-6:]]).folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")  # something stands where its folder should be
    whole = Terminal(*flags)
    assert whole.read() == 1
    seen = CONTROL.sub("", whole.drawn)
    line = rf"tiny-bert, undamaged, bbc_news, lr ([\d.e-]+), seed 0 +epoch (\d+) of {epochs} +F1 (\S+) %"
    shown = re.findall(line, seen)
    tables = {
        json.loads(path.read_text())["settings"]["learning_rate"]: pd.read_csv(path.with_name("epochs.csv"))
        for path in output.glob("runs/*/result.json")
    }
    assert len(tables) == 2 and shown
    for rate, epoch, f1 in shown:  # of this epoch or, while it is not tested, of the one before
        near = tables[float(rate)].query(f"epoch in ({int(epoch) - 1}, {epoch})")["weighted_f1"]
        assert f1 in [f"{100 * value:.2f}" for value in near]
    assert re.search(r"\d+ s gone, about \d+ s left", seen)
    assert "1 of 3 runs done, 0 failed, 2 left" in seen or "1 of 3 runs done, 1 failed, 1 left" in seen
    assert "2 of 3 runs done, 1 failed, 0 left" in seen and "100 %" in seen and seen.count("weighted F1") == 2
    assert whole.drawn.rindex("\x1b[?25h") > whole.drawn.rindex("\x1b[?25l")
    assert "1 of 3 runs failed:" in seen.splitlines()[-2]
