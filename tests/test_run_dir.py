"""What happens to a run that is cut off, done twice at once, or fails; and what is never read or run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_of
from filelock import FileLock

import callbacks
import common
import run_dir
import train
from common import InputError, RunError
from config import Run

EPOCHS = 3
TABLES = ("epochs.csv", "predictions.csv.gz")


@pytest.fixture
def flags(flags: list[str]) -> list[str]:
    return [*flags, "--num_train_epochs", str(EPOCHS)]


def cut_off(run: Run, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Interrupt the run when it has saved that epoch; its checkpoints, the oldest first."""
    on_save = callbacks.Checkpoints.on_save

    def interrupt(self: callbacks.Checkpoints, args: object, state: object, *given: object, **more: object) -> None:
        on_save(self, args, state, *given, **more)
        # a clock that was put back: whatever comes later seems older
        for path in Path(args.output_dir).glob(f"checkpoint-{state.global_step}"):
            os.utime(path, (4e9 - state.global_step, 4e9 - state.global_step))
        if state.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(callbacks.Checkpoints, "on_save", interrupt)
        train.run_or_reuse(run)
    found = (run.work_dir / "checkpoints").glob("checkpoint-*")
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))


def same_tables(run: Run, other: Run) -> bool:
    return all((run.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in TABLES)


def kept(run: Run) -> list[str]:
    return sorted(str(path.relative_to(run.work_dir)) for path in run.work_dir.rglob("*"))


# To the last digit, whatever epoch was the best and however often it was cut off; two checkpoints at most, none at the
# end; the vectors are those of the best epoch's weights, which may have been saved before.
@pytest.mark.parametrize("tuning", ["full", "probe"])
def test_resume(tuning: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags += ["--tuning", tuning]
    flags += ["--save_vectors"] if tuning == "full" else []
    plain = run_of([*flags, "--output_dir", str(tmp_path / "plain")])
    expected, _ = train.run_or_reuse(plain)
    assert pd.read_csv(plain.folder / "epochs.csv")["eval_loss"].nunique() == EPOCHS
    run = run_of([*flags, "--resume"])
    for epoch in (1, 2, EPOCHS):  # cut off after its last epoch, a run does that again
        checkpoints = cut_off(run_of([*flags, "--resume"]), epoch, monkeypatch)
        assert len(checkpoints) <= (3 if epoch == EPOCHS else 2) and checkpoints[-1].name == f"checkpoint-{3 * epoch}"
        assert not run.folder.exists()
    result, there = train.run_or_reuse(run)
    assert not there and [part["until_epoch"] for part in result["resumed_from"]] == [1.0, 2.0]
    assert expected["resumed_from"] == []
    assert (run.folder / "log.txt").read_text().count("***** Running training *****") == 4  # of each part
    for name in ("epochs.csv", "predictions.csv.gz", *(["vectors.npy"] if tuning == "full" else [])):
        assert (run.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert not run.work_dir.exists()


# What is not whole is passed over, and that is said; a run that was cut off without --resume leaves nothing.
def test_resume_from_what_is_whole(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain = run_of([*flags, "--output_dir", str(tmp_path / "plain")])
    assert cut_off(plain, 1, monkeypatch) == [] and kept(plain) == []
    train.run_or_reuse(plain)
    run = run_of([*flags, "--resume"])
    for half in ("model.safetensors", "progress.json"):
        last = cut_off(run_of([*flags, "--resume"]), 2, monkeypatch)[-1]
        os.truncate(last / half, (last / half).stat().st_size // 2)
        result, _ = train.run_or_reuse(run)
        assert same_tables(run, plain) and all(part["until_epoch"] < 2 for part in result["resumed_from"])
        assert f"{last}" in capsys.readouterr().err
        shutil.rmtree(run.folder)


class Marker:
    """A pickle of it makes a file when it is read by an unpickler that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# A checkpoint that another user could have written: not one of its pickles is run; one that he owns is not read at all.
def test_no_pickle_is_trusted(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, flags = tmp_path / "run", [*flags, "--resume"]
    cut_off(run_of(flags), 1, monkeypatch)
    shutil.copytree(tmp_path / "outputs", tmp_path / "copy")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        run = run_of(flags)
        (last,) = (run.work_dir / "checkpoints").iterdir()
        content = pickle.dumps(Marker(marker), protocol=2)
        (last / name).write_bytes(content)
        progress = json.loads((last / "progress.json").read_text())
        progress["sizes"][name] = len(content)
        (last / "progress.json").write_text(json.dumps(progress))
        if name == "training_args.bin":
            train.run_or_reuse(run)
        else:
            with pytest.raises(RunError, match="the run failed"):
                train.run_or_reuse(run)
        assert not marker.exists()
        shutil.rmtree(tmp_path / "outputs")
        shutil.copytree(tmp_path / "copy", tmp_path / "outputs")
    pickle.loads(content)  # this is how it would have looked
    assert marker.exists()
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    with pytest.raises(InputError, match="belongs to another user"):
        train.run_or_reuse(run_of(flags))


# Code that comes with a model is not run.
def test_no_code_of_a_model(flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {name: f"evil.{name}" for name in names}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    train.run_or_reuse(run_of([*flags, "--model", str(folder), "--max_steps", "1"]))
    assert not (tmp_path / "run").exists()


# No name leads out of the output folder.
@pytest.mark.parametrize("name", ["..a", "a b;c", "-rf", "ä\n", "x" * 250])
def test_names_stay_inside(name: str, flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / name)
    for given in (folder, folder / ".." / name, f"{folder}/"):
        run = run_of([*flags, "--model", str(given)])
        assert run.folder.resolve().parent == (tmp_path / "outputs" / "runs").resolve()
        assert run.work_dir.resolve().parent == (tmp_path / "outputs" / "unfinished").resolve()
        assert len(run.folder.name) <= 200 and not run.folder.name.startswith((".", "-"))


# While another process has the lock the run is busy; when that process is killed, its lock is free.
def test_a_lock_dies_with_its_process(flags: list[str], tmp_path: Path) -> None:
    run = run_of(flags)
    run.work_dir.parent.mkdir(parents=True)
    code = (
        "import sys, time, filelock; f = filelock.FileLock(sys.argv[1]); f.acquire(); print(flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, f"{run.work_dir}.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        state, _ = train.run_in_worker(run, False)
        assert state == "busy" and not run.folder.exists()
        other.kill()
    state, line = train.run_in_worker(run, False)
    assert state == "done" and "another process" not in line
    assert list(run.work_dir.parent.iterdir()) == []
    state, line = train.run_in_worker(run, False)
    assert state == "done" and "another process" in line
    FileLock(f"{run.work_dir}.lock").acquire(timeout=0)


# A worker that finds other rows or weights than the grid did, does not do the run.
def test_settings_that_changed(flags: list[str]) -> None:
    run = run_of(flags)
    state, line = train.run_in_worker(replace(run, settings={**run.settings, "data_fingerprint": "other"}), False)
    assert state == "failed" and "data_fingerprint differ from what they were" in line and not run.folder.exists()


# What a result does not say stands at the value that it has without a flag: a new flag makes no old result invalid.
def test_a_result_of_before_a_flag(flags: list[str]) -> None:
    run = run_of(flags)
    train.run_or_reuse(run)
    path = run.folder / "result.json"
    result = json.loads(path.read_text())
    del result["settings"]["weight_decay"], result["sha256"]
    common.write_signed(path, result)
    assert run_dir.load_valid_result(run)
    decayed = run_of([*flags, "--weight_decay", "0.1"])
    run.folder.rename(decayed.folder)
    assert run_dir.load_valid_result(decayed) is None


# A table that is not what the run wrote makes it run again, also if only its digest differs; a process that died while
# it put a new result in the place of an old one lost neither; a run done again that fails leaves the old one.
def test_a_result_is_whole(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = run_of(flags)
    train.run_or_reuse(run)
    os.truncate(run.folder / "epochs.csv", 100)
    assert run_dir.load_valid_result(run, digests=False) is None
    assert "epochs.csv is not what the run wrote" in capsys.readouterr().err
    train.run_or_reuse(run_of(flags))
    table = run.folder / "epochs.csv"
    table.write_bytes(content := table.read_bytes().replace(b"0", b"1"))
    assert run_dir.load_valid_result(run, digests=False) and run_dir.load_valid_result(run) is None
    assert not train.run_or_reuse(run_of(flags))[1] and table.read_bytes() != content

    run.work_dir.mkdir(parents=True)
    run.folder.rename(run.work_dir / "old")
    assert run_dir.load_valid_result(run) is None
    assert train.run_or_reuse(run_of(flags))[1]  # it was there

    monkeypatch.setattr(run_dir, "publish", lambda run: 1 / 0)
    with pytest.raises(RunError, match="the run failed"):
        train.run_or_reuse(run_of([*flags, "--save_model"]))
    assert run_dir.load_valid_result(run) and "ZeroDivisionError" in (run.folder / "failure.json").read_text()


# A new result that cannot take the place of the old one leaves that there, also at Ctrl-C.
def test_publish_is_interrupted(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of([*flags, "--num_train_epochs", "1"])
    train.run_or_reuse(run)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupted)
        train.run_or_reuse(run_of([*flags, "--num_train_epochs", "1", "--save_model"]))
    assert run_dir.load_valid_result(run) and not run.work_dir.exists()


# Whoever asks for more of a run loses nothing that it kept: not the model, not the vectors, not the steps.
def test_what_is_kept_stays(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, "--num_train_epochs", "1"]
    train.run_or_reuse(run_of([*flags, "--save_model", "--eval_at", "0"]))
    run = run_of([*flags, "--save_vectors", "--eval_at", "1"])
    assert not train.run_or_reuse(run)[1]
    assert {"model", "vectors.npy", "steps.csv"} <= {path.name for path in run.folder.iterdir()}
    result = run_dir.load_valid_result(run_of([*flags, "--save_model", "--save_vectors", "--eval_at", "0", "1"]))
    assert result["steps"][:2] == [0, 1] and result["command"].endswith(
        " --save_model True --eval_at 0 1 3"
    )  # 3 is the last
    with (
        monkeypatch.context() as patched,
        pytest.raises(RunError),
    ):  # an attempt that fails, forgotten when all is there
        patched.setattr(run_dir, "publish", lambda run: 1 / 0)
        train.run_or_reuse(run_of([*flags, "--save_states"]))
    assert (run.folder / "failure.json").exists()
    assert train.run_or_reuse(run)[1] and not [*run.folder.glob("failure.*")]


# Training that something ends before its last step is not a result.
def test_a_run_that_ends_early(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: object, args: object, state: object, control: object, **others: object) -> object:
        control.should_training_stop = True
        return control

    monkeypatch.setattr(callbacks.Progress, "on_epoch_end", stop)
    with pytest.raises(RunError, match=r"training ended after step \d+ of \d+"):
        train.run_or_reuse(run_of(flags))
    assert [path.name for path in run_of(flags).folder.glob("*.json")] == ["failure.json"]


# One character of result.json that is another, or another name of its folder, and the result does not count, even
# where the other files are not read.
def test_an_edited_result(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    run = run_of(flags)
    train.run_or_reuse(run)
    path = run.folder / "result.json"
    text = path.read_text()
    for old, new in (
        ('"weighted_f1": 0.', '"weighted_f1": 0.9'),
        ('"seed": 0', '"seed": 1'),
        ('"threads": 1', '"threads": 2'),
    ):
        path.write_text(text.replace(old, new, 1))
        assert path.read_text() != text and run_dir.load_valid_result(run, digests=False) is None
        assert "not what the run wrote" in capsys.readouterr().err
    path.write_text(text)
    assert run_dir.load_valid_result(run)
    copy = shutil.copytree(run.folder, run.folder.with_name("copy of it"))
    with pytest.raises(ValueError, match="it is a copy, or was renamed"):
        run_dir.read_result(copy)


# Scores that are not those of the predictions do not count, though every digest is right.
@pytest.mark.parametrize("column", ["weighted_f1", "accuracy", "weighted_f1_half_b"])
def test_scores_of_other_predictions(column: str, flags: list[str], capsys: pytest.CaptureFixture) -> None:
    run = run_of(flags)
    result, _ = train.run_or_reuse(run)
    epochs = pd.read_csv(run.folder / "epochs.csv")
    epochs[column] = 0.9912
    epochs.to_csv(run.folder / "epochs.csv", index=False)
    result |= {"weighted_f1": epochs["weighted_f1"].max(), "accuracy": epochs["accuracy"][0], "best_epoch": 1.0}
    (run.folder / "result.json").unlink()
    common.write_signed(run.folder / "result.json", {**result, "files": run_dir.list_files(run.folder)})
    assert run_dir.load_valid_result(run) is None
    assert "its scores are not those of its predictions" in capsys.readouterr().err
