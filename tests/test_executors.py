"""Who does the runs: a worker that is killed, what each worker has of the machine, and a Ray cluster."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from threading import Thread
from uuid import uuid4

import psutil
import pytest

import cost
import data_prep
import settings
import workers


@pytest.fixture
def flags(tiny_bert: Path, small_data: Path, tmp_path: Path) -> list[str]:
    where = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    return [*where, "--output_dir", str(tmp_path / "outputs")]


# Two workers share one core and have a GPU each. A run whose worker is killed is done again; killed twice, it has
# failed, and says why. The other worker goes on meanwhile.
def test_a_killed_worker(flags: list[str]) -> None:
    short = settings.plan([*flags, "--num_train_epochs", "1"])
    long = settings.plan([*flags, "--num_train_epochs", "100000"])
    killed = []

    def kill_twice() -> None:
        while len(killed) < 2:
            time.sleep(0.1)
            if not (long.unfinished / "new").exists():
                continue
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if child.environ().get("CUDA_VISIBLE_DEVICES") == "4" and child not in killed:
                        shutil.rmtree(long.unfinished)
                        child.kill()
                        killed.append(child)

    killer = Thread(target=kill_twice)
    with workers.Here(workers.Staff(2, 1, ("4", "7"))) as here:
        assert here.each(os.getenv, "CUDA_VISIBLE_DEVICES") == ["4", "7"]
        assert here.each(os.getenv, "OMP_NUM_THREADS") == ["1", "1"]
        killer.start()
        said = [(run.folder, state) for run, state, _ in here.work([[long], [short]])]
    killer.join()
    assert sorted(said) == sorted([(long.folder, "again"), (long.folder, "failed"), (short.folder, "done")])
    assert json.loads((long.folder / "failure.json").read_text())["reason"] == workers.KILLED
    assert settings.result_of(short)


# A machine that sees the output folder writes there; one that does not gets the rows and sends the result. Both give
# the numbers of this machine's workers. The set is a user's own, of which the files are on this machine alone.
def test_ray(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid4().hex)  # else Ray would write one to the user's home
    data, own = tmp_path / "data", tmp_path / "sets" / "mydata"
    own.mkdir(parents=True)
    for part, rows in data_prep.load("rotten_tomatoes", flags[5]).items():
        rows.to_csv(own / f"{part}.csv")
    flags = [*flags, "--num_train_epochs", "2", "--data_dir", str(data), "--dataset", str(own)]
    plans = [settings.plan([*flags, "--seed", seed]) for seed in "01"]
    here_too = [settings.plan([*flags, "--seed", seed, "--output_dir", str(tmp_path / "here")]) for seed in "01"]
    with workers.Here(workers.Staff(1, 1)) as here:
        said_here = [line for _, _, line in here.work([here_too])]
    shutil.rmtree(own)
    with workers.OnRay(str(tmp_path / "outputs"), str(data), 1, cost.memory) as cluster:
        shared, apart = plans
        assert [said[1:] for said in cluster.work([[shared]])] == [("done", said_here[0])]
        cluster.token.unlink()
        data.rename(tmp_path / "not seen")
        assert [said[1:] for said in cluster.work([[apart]])] == [("done", said_here[1])]
    for run, other in zip(plans, here_too, strict=True):
        assert settings.result_of(run)["commit"] == settings.result_of(other)["commit"]
        for name in ("epochs.csv", "predictions.csv.gz"):
            assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert list((tmp_path / "outputs" / "unfinished").iterdir()) == []
