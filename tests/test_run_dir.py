"""What happens to a run that is cut off, done twice at once, or out of memory; and what is never read or run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, BertModel

import settings
import train
import unfinished

EPOCHS = 3
TABLES = ("epochs.csv", "predictions.csv.gz")


@pytest.fixture
def flags(tiny_bert: Path, small_data: Path, tmp_path: Path) -> list[str]:
    where = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    what = ["--num_train_epochs", str(EPOCHS), "--learning_rate", "1e-3", "--disable_tqdm", "True"]
    return [*where, *what, "--output_dir", str(tmp_path / "outputs")]


def cut_off(run: settings.Run, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Interrupt the run when it has saved that epoch; its checkpoints, the oldest first."""
    on_save = unfinished.Checkpoints.on_save

    def interrupt(self: unfinished.Checkpoints, args: object, state: object, *given: object, **more: object) -> None:
        on_save(self, args, state, *given, **more)
        # a clock that was put back: whatever comes later seems older
        for path in Path(args.output_dir).glob(f"checkpoint-{state.global_step}"):
            os.utime(path, (4e9 - state.global_step, 4e9 - state.global_step))
        if state.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unfinished.Checkpoints, "on_save", interrupt)
        train.once(run)
    found = (run.unfinished / "checkpoints").glob("checkpoint-*")
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))


def same_tables(run: settings.Run, other: settings.Run) -> bool:
    return all((run.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in TABLES)


def kept(run: settings.Run) -> list[str]:
    return sorted(str(path.relative_to(run.unfinished)) for path in run.unfinished.rglob("*"))


# To the last digit, whatever epoch was the best and however often it was cut off; two checkpoints at most, none at the
# end; the vectors are those of the best epoch's weights, which may have been saved before.
@pytest.mark.parametrize("tuning", ["full", "probe"])
def test_resume(tuning: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags += ["--model", "minilm", "--max_length", "16", "--tuning", tuning, "--learning_rate", "2e-4"]
    flags += ["--save_vectors"] if tuning == "full" else []
    plain = settings.plan([*flags, "--output_dir", str(tmp_path / "plain")])
    expected, _ = train.once(plain)
    assert pd.read_csv(plain.folder / "epochs.csv")["eval_loss"].nunique() == EPOCHS
    run = settings.plan([*flags, "--resume"])
    for epoch in (1, 2, EPOCHS):  # cut off after its last epoch, a run does that again
        checkpoints = cut_off(settings.plan([*flags, "--resume"]), epoch, monkeypatch)
        assert len(checkpoints) <= (3 if epoch == EPOCHS else 2) and checkpoints[-1].name == f"checkpoint-{3 * epoch}"
        assert not run.folder.exists()
    result, there = train.once(run)
    assert not there and [part["until_epoch"] for part in result["cut_off"]] == [1.0, 2.0]
    assert expected["cut_off"] == []
    assert (run.folder / "log.txt").read_text().count("***** Running training *****") == 4  # of each part
    for name in ("epochs.csv", "predictions.csv.gz", *(["vectors.npy"] if tuning == "full" else [])):
        assert (run.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert not run.unfinished.exists()


# What is not whole is passed over, and that is said; a run that was cut off without --resume leaves nothing.
def test_resume_from_what_is_whole(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain = settings.plan([*flags, "--output_dir", str(tmp_path / "plain")])
    assert cut_off(plain, 1, monkeypatch) == [] and kept(plain) == []
    train.once(plain)
    run = settings.plan([*flags, "--resume"])
    for half in ("model.safetensors", "progress.json"):
        last = cut_off(settings.plan([*flags, "--resume"]), 2, monkeypatch)[-1]
        os.truncate(last / half, (last / half).stat().st_size // 2)
        result, _ = train.once(run)
        assert same_tables(run, plain) and all(part["until_epoch"] < 2 for part in result["cut_off"])
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
    marker = tmp_path / "run"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        run = settings.plan([*flags, "--resume"])
        (last, *_) = cut_off(run, 1, monkeypatch)
        content = pickle.dumps(Marker(marker), protocol=2)
        (last / name).write_bytes(content)
        progress = json.loads((last / "progress.json").read_text())
        progress["sizes"][name] = len(content)
        (last / "progress.json").write_text(json.dumps(progress))
        if name == "training_args.bin":
            train.once(settings.plan([*flags, "--resume"]))
        else:
            with pytest.raises(settings.RunError, match="the run failed"):
                train.once(settings.plan([*flags, "--resume"]))
        assert not marker.exists()
        shutil.rmtree(tmp_path / "outputs")
    pickle.loads(content)  # this is how it would have looked
    assert marker.exists()
    cut_off(run, 1, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    with pytest.raises(settings.RunError, match="belongs to another user"):
        train.once(settings.plan([*flags, "--resume"]))


# Code that comes with a model is not run.
def test_no_code_of_a_model(flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {name: f"evil.{name}" for name in names}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    train.once(settings.plan([*flags, "--model", str(folder), "--max_steps", "1"]))
    assert not (tmp_path / "run").exists()


# No name leads out of the output folder.
@pytest.mark.parametrize("name", ["..a", "a b;c", "-rf", "ä\n", "x" * 250])
def test_names_stay_inside(name: str, flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / name)
    for given in (folder, folder / ".." / name, f"{folder}/"):
        run = settings.plan([*flags, "--model", str(given)])
        assert run.folder.resolve().parent == (tmp_path / "outputs" / "runs").resolve()
        assert run.unfinished.resolve().parent == (tmp_path / "outputs" / "unfinished").resolve()
        assert len(run.folder.name) <= 200 and not run.folder.name.startswith((".", "-"))


# While another process has the lock the run is busy; when that process is killed, its lock is free.
def test_a_lock_dies_with_its_process(flags: list[str], tmp_path: Path) -> None:
    run = settings.plan(flags)
    run.unfinished.parent.mkdir(parents=True)
    code = (
        "import sys, time, filelock; f = filelock.FileLock(sys.argv[1]); f.acquire(); print(flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, f"{run.unfinished}.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        state, _ = train.do(flags, run.settings, False)
        assert state == "busy" and not run.folder.exists()
        other.kill()
    state, line = train.do(flags, run.settings, False)
    assert state == "done" and "another process" not in line
    assert list(run.unfinished.parent.iterdir()) == []
    state, line = train.do(flags, run.settings, False)
    assert state == "done" and "another process" in line
    FileLock(f"{run.unfinished}.lock").acquire(timeout=0)


# A worker that finds other rows or weights than the grid did, does not do the run.
def test_settings_that_changed(flags: list[str]) -> None:
    run = settings.plan(flags)
    state, line = train.do(flags, {**run.settings, "data_fingerprint": "other"}, False)
    assert state == "failed" and "data_fingerprint differ from what they were" in line and not run.folder.exists()


# A table that is not what the run wrote makes it run again; a process that died while it put a new result in the place
# of an old one lost neither; a run done again that fails leaves the old one.
def test_a_result_is_whole(flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = settings.plan(flags)
    train.once(run)
    os.truncate(run.folder / "epochs.csv", 100)
    assert settings.result_of(run) is None and "not what the run wrote" in capsys.readouterr().err
    train.once(settings.plan(flags))

    run.unfinished.mkdir(parents=True)
    run.folder.rename(run.unfinished / "old")
    assert settings.result_of(run) is None
    assert train.once(settings.plan(flags))[1]  # it was there

    monkeypatch.setattr(unfinished, "install", lambda run: 1 / 0)
    with pytest.raises(settings.RunError, match="the run failed"):
        train.once(settings.plan([*flags, "--save_model"]))
    assert settings.result_of(run) and "ZeroDivisionError" in (run.folder / "failure.json").read_text()


@pytest.fixture
def without_dropout(tiny_bert: Path, tmp_path: Path) -> Path:
    """The same model, whose losses do not depend on how a batch is cut."""
    folder = shutil.copytree(tiny_bert, tmp_path / "calm")
    config = AutoConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder)
    return folder


# 40 rows of 96 do not fit, nor 20: 10 at a time, four times; the optimizer's batches of 40, 40 and 16 stay what they
# were, and so do the numbers but for rounding.
def test_out_of_memory(
    flags: list[str], without_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags, "--model", str(without_dropout), "--per_device_train_batch_size", "40"]
    plain = settings.plan([*flags, "--output_dir", str(tmp_path / "plain")])
    train.once(plain)
    forward = BertModel.forward

    def small(self: BertModel, input_ids: torch.Tensor, **more: object) -> object:
        if self.training and len(input_ids) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids, **more)

    monkeypatch.setattr(BertModel, "forward", small)
    run = settings.plan(flags)
    result, _ = train.once(run)
    assert result["batch"] == {"rows": 10, "accumulated": 4, "processes": 1, "halved": 2}
    assert "10 rows at a time for want of memory" in settings.summary(run, result)
    assert result["settings"]["per_device_train_batch_size"] == 40
    asked = settings.plan([*flags, "--per_device_train_batch_size", "10", "--gradient_accumulation_steps", "4"])
    train.once(asked)
    tables = [pd.read_csv(each.folder / "epochs.csv") for each in (plain, run, asked)]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], rtol=1e-5)
    with pytest.raises(settings.RunError, match="out of memory with 15 rows"):
        train.once(settings.plan([*flags, "--per_device_train_batch_size", "30"]))


# Two processes share each batch of 32, one of them writes, and the numbers are those of one process but for rounding.
def test_two_processes(flags: list[str], without_dropout: Path, tmp_path: Path) -> None:
    flags = [*flags, "--model", str(without_dropout)]
    single = settings.plan([*flags, "--output_dir", str(tmp_path / "single")])
    train.once(single)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "train.py"]
    command = [*launch, *flags, "--use_cpu", "True"]
    done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("runs/*/result.json")
    result = json.loads(path.read_text())
    assert result["batch"] == {"rows": 16, "accumulated": 1, "processes": 2, "halved": 0}
    assert result["settings"]["processes"] == 2 and path.parent.name == f"{single.folder.name}_use_cpu=True_processes=2"
    assert done.stdout.count("weighted F1") == 1
    assert (path.parent / "log.txt").read_text().count("***** Running training *****") == 1
    tables = [pd.read_csv(folder / "epochs.csv") for folder in (path.parent, single.folder)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
