"""One run: what it leaves, that it repeats, that runs are paired, and what it refuses."""

import json
import platform
import shutil
import socket
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import random_model, run_of
from safetensors.torch import save
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, pipeline

import common
import config
import corrupt
import data_prep
import features
import models
import paper
import prepared_run
import protocol
import run_dir
import stats
import train
import unpad
from common import InputError, RunError

ROOT = Path(train.__file__).parent


def run_main(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str]) -> str:
    """The one line with which train.py ends."""
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, flags)
    (error,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and error.startswith("train.py: error: ")
    return error


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Just these files, just the epochs asked for; the F1s are scikit-learn's over the predictions that were kept.
def test_a_whole_run(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    run = run_of([*flags, "--corrupt", "bottom", "--frac", "1/2"])
    train.run_training(run)
    assert file_names(tmp_path / "outputs" / "runs") == [
        f"{run.folder.name}/{name}" for name in ("epochs.csv", "log.txt", "predictions.csv.gz", "result.json")
    ]
    epochs = pd.read_csv(run.folder / "epochs.csv")
    scores = ["accuracy", "weighted_f1", "weighted_f1_half_a", "weighted_f1_half_b"]
    assert list(epochs) == ["epoch", "train_loss", "eval_loss", *scores]
    assert epochs["epoch"].tolist() == [1, 2] and epochs.notna().all(axis=None)
    result = json.loads((run.folder / "result.json").read_text())
    best = epochs.loc[epochs["weighted_f1"].idxmax()]
    assert (result["best_epoch"], result["weighted_f1"]) == (best["epoch"], best["weighted_f1"])

    rows = pd.read_csv(run.folder / "predictions.csv.gz")
    test = data_prep.load("rotten_tomatoes", small_data)["test"]
    assert rows["row"].tolist() == test["source_row"][:] and rows["label"].tolist() == test["label"][:]
    half_b = rows.groupby("label").cumcount() % 2 == 1
    for name, part in (("", rows.index >= 0), ("_half_a", ~half_b), ("_half_b", half_b)):
        for k, epoch in epochs.iterrows():
            f1 = f1_score(rows["label"][part], rows[f"epoch_{k + 1}"][part], average="weighted", zero_division=0)
            assert epoch[f"weighted_f1{name}"] == pytest.approx(f1, abs=1e-12)

    assert result["corruption"]["layers"] == [1] and len(result["corruption"]["tensors"]) == 16
    assert result["settings"]["data_fingerprint"] == data_prep.manifest("rotten_tomatoes", small_data)["fingerprint"]
    assert (result["settings"]["weight_decay"], result["settings"]["max_length"]) == (0.0, 64)
    held = psutil.Process().memory_info().rss  # bytes, now; a process that trained has held a bit more
    assert 0.5 * held < result["peak_memory"] < 20 * held


# The same command twice gives the same bytes; a third time the result is there; other settings have another place.
def test_repeats_to_the_last_digit(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = run_of(flags)
    for folder in ("outputs", "again"):
        run_main(monkeypatch, [*flags, "--output_dir", str(tmp_path / folder)])
    first, second = (tmp_path / folder / "runs" / run.folder.name for folder in ("outputs", "again"))
    for name in ("epochs.csv", "predictions.csv.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    capsys.readouterr()
    run_main(monkeypatch, [*flags, "--output_dir", str(tmp_path / "again")])
    assert "was there already" in capsys.readouterr().out
    for other in (["--seed", "1"], ["--weight_decay", "0.01"], ["--max_length", "32"], ["--kaiming_a", "1"]):
        assert run_of([*flags, *other]).folder != run.folder
    assert run_of([*flags, "--logging_steps", "3"]).folder == run.folder


# A result counts only if it came from the settings asked for; a truncated one does not count.
def test_results_of_other_settings_do_not_count(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    run = run_of(flags)
    train.run_training(run)
    assert run_dir.load_valid_result(run)
    path = run.folder / "result.json"
    result = json.loads(path.read_text())
    del result["sha256"]
    common.write_signed(path, {**result, "settings": {**result["settings"], "results_version": 0}})
    assert run_dir.load_valid_result(run) is None
    assert f"its results_version is 0, this code's is {config.RESULTS_VERSION}" in capsys.readouterr().err
    common.write_signed(path, result)
    assert run_dir.load_valid_result(run)
    path.write_text(path.read_text()[:-100])
    assert run_dir.load_valid_result(run) is None


# Files of an earlier attempt never stand beside a newer result, and rows that changed since the plan are refused.
def test_nothing_stale_is_kept(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    flags = [*flags, "--data_dir", str(tmp_path / "data"), "--num_train_epochs", "1"]
    train.run_training(run_of([*flags, "--save_model"]))
    run = run_of(flags)
    train.run_training(run)
    assert not (run.folder / "model").exists()
    data_prep.prepare("rotten_tomatoes", train_size=64, test_size=40, data_dir=tmp_path / "data")
    with pytest.raises(RunError, match="prepared anew"):
        train.run_training(run)
    assert (run.folder / "failure.json").exists() and run_dir.load_valid_result(run)["settings"] == run.settings


# Another tokenizer configuration makes another run; a model with a head of its own cannot be where a run begins.
def test_the_model_is_what_it_was(flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-bert"
    shutil.copytree(tiny_bert, copy)
    here = run_of([*flags, "--model", str(copy)]).folder
    assert here == run_of(flags).folder
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "truncation_side": "left"}))
    assert run_of([*flags, "--model", str(copy)]).folder != here
    model, _ = corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed=0, num_labels=2)
    model.save_pretrained(tmp_path / "fine-tuned")
    with pytest.raises(InputError, match="has a head already"):
        corrupt.load_corrupted(tmp_path / "fine-tuned", corrupt.UNCORRUPTED, seed=0, num_labels=2)


# At one seed the head and the batches are the same for every corruption; another seed moves both, --data_seed one.
def test_runs_are_paired(flags: list[str], small_data: Path) -> None:
    data = data_prep.load("rotten_tomatoes", small_data)

    def head_and_batches(*changes: str) -> tuple[torch.Tensor, list[list[int]]]:
        trainer = prepared_run.prepare_run(run_of([*flags, *changes]), data).trainer
        batches = [batch["input_ids"][:, :12].tolist() for batch in trainer.get_train_dataloader()]
        return trainer.model.classifier.weight.detach().clone(), batches

    head, batches = head_and_batches()
    for corruption in (["--corrupt", "bottom", "--frac", "1/2"], ["--corrupt", "top", "--frac", "1"]):
        other_head, other_batches = head_and_batches(*corruption)
        assert torch.equal(head, other_head) and batches == other_batches
    other_head, other_batches = head_and_batches("--seed", "1")
    assert not torch.equal(head, other_head) and batches != other_batches
    other_head, other_batches = head_and_batches("--data_seed", "1")
    assert torch.equal(head, other_head) and batches != other_batches


# Three epochs of two seeds have none in common, as they would with the library's seed of an epoch, seed + epoch.
def test_seeds_share_no_epoch(flags: list[str], small_data: Path) -> None:
    data = data_prep.load("rotten_tomatoes", small_data)
    epochs = []
    for seed in ("0", "1"):
        run = run_of([*flags, "--seed", seed])
        loader = prepared_run.prepare_run(run, data).trainer.get_train_dataloader()
        for epoch in range(3):
            loader.set_epoch(epoch)
            epochs.append(str([batch["input_ids"][:, :8].tolist() for batch in loader]))
    assert len(set(epochs)) == 6


def own_pairs(small_data: Path, folder: Path) -> Path:
    """Rotten Tomatoes' sentences cut in two, as a user's own set."""
    folder.mkdir()
    for part, rows in data_prep.load("rotten_tomatoes", small_data).items():
        frame = rows.to_pandas()[["text", "label"]]
        frame["sentence1"], frame["sentence2"] = (frame["text"].str.split().str[half] for half in HALVES)
        frame["sentence1"], frame["sentence2"] = frame["sentence1"].str.join(" "), frame["sentence2"].str.join(" ")
        frame.drop(columns="text").to_json(folder / f"{part}.jsonl", orient="records", lines=True)
    return folder


HALVES = (slice(0, None, 2), slice(1, None, 2))


# The saved model, loaded as docs/outputs.md says and run on one text after the other, makes the file's predictions. A
# plain load of a model with mean pooling, which would make others, fails.
KINDS = [("cls", True, False), ("mean", False, False), ("cls", False, True), ("mean", True, True)]


@pytest.mark.parametrize(("pooling", "lowercase", "pairs"), KINDS)
def test_a_saved_model_is_the_run(
    pooling: str, lowercase: bool, pairs: bool, flags: list[str], small_data: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(models.find_model("minilm")[0], tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = lowercase
    (folder / "tokenizer.json").write_text(json.dumps(content))
    data = own_pairs(small_data, tmp_path / "pairs") if pairs else "rotten_tomatoes"
    where = ["--model", str(folder), "--dataset", str(data)]
    where += ["--data_dir", str(tmp_path / "data")] if pairs else []
    fast = ["--num_train_epochs", "1", "--learning_rate", "1e-3", "--max_length", "24", "--pooling", pooling]
    run = run_of([*flags, *where, *fast, "--save_model"])
    train.run_training(run)
    saved = run.folder / "model"
    model, tokenizer = unpad.load_saved(saved).eval(), AutoTokenizer.from_pretrained(saved)
    test = data_prep.load(run.config.dataset, run.config.data_dir)["test"]
    columns = [test[name][:] for name in features.TEXTS if name in test.column_names]
    texts = [tokenizer(*parts, truncation=True, return_tensors="pt") for parts in zip(*columns, strict=True)]
    with torch.no_grad():
        expected = [model(**text).logits.argmax().item() for text in texts]
    predictions = pd.read_csv(run.folder / "predictions.csv.gz")
    assert predictions["epoch_1"].value_counts().min() > 2 and max(text["input_ids"].shape[1] for text in texts) == 24
    assert predictions["epoch_1"].tolist() == expected and predictions["row"].tolist() == test["source_row"][:]
    assert list(model.config.id2label.values()) == test.features["label"].names
    if pooling == "mean":
        for load in (AutoModelForSequenceClassification.from_pretrained, partial(pipeline, "text-classification")):
            with pytest.raises(ValueError, match="mean-pooling"):
                load(str(saved))
    else:
        answers = pipeline("text-classification", model=str(saved))
        first = [dict(zip(("text", "text_pair"), parts, strict=False)) for parts in zip(*columns, strict=True)]
        assert [model.config.label2id[answer["label"]] for answer in answers(first, truncation=True)] == expected


# Five rows of class 0 and two of class 1: each half has its share of both. Rows of a group stay together.
def test_halves() -> None:
    labels = pd.Series([0, 0, 1, 0, 1, 0, 0])
    assert stats.split_halves(labels).tolist() == [0, 1, 0, 0, 1, 1, 0]
    groups = pd.Series([7, 7, 5, 2, 5, 9, 9])  # first labels: 7: 0, 5: 1, 2: 0, 9: 0
    half = stats.split_halves(labels, groups).tolist()
    assert half[0] == half[1] and half[2] == half[4] and half[5] == half[6] and sum(half) in (1, 2, 3, 4)


# ---- Settings in force ----


@pytest.mark.parametrize(
    "variable",
    [
        "ACCELERATE_MIXED_PRECISION=bf16",
        "ACCELERATE_MIXED_PRECISION=fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        "ACCELERATE_DYNAMO_BACKEND=inductor",
        "ACCELERATE_USE_DEEPSPEED=true",
        "ACCELERATE_USE_CPU=1",
        "ACCELERATE_DOWNCAST_BF16=true",
        "ACCELERATE_SOMETHING_NEW=1",
        "NVIDIA_TF32_OVERRIDE=1",
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16",
    ],
)
def test_what_the_environment_would_change(
    variable: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(*variable.split("="))
    assert f"{variable} in the environment would change the numbers" in refused(monkeypatch, capsys, flags)
    assert not (tmp_path / "outputs").exists()


# What `accelerate launch` sets by itself, and what cannot change a number, is let pass.
def test_what_the_environment_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = "MIXED_PRECISION=no DYNAMO_BACKEND=no USE_CPU=False GRADIENT_ACCUMULATION_STEPS=1 DYNAMO_MODE=default"
    for variable in [*harmless.split(), "LOG_LEVEL=info", "DEBUG_MODE=1", "CPU_AFFINITY=1", "ENABLE_RICH=1"]:
        monkeypatch.setenv(*f"ACCELERATE_{variable}".split("="))
    protocol.check_environment()


# What the Trainer works with stands in the result; a difference from the flags, wherever it comes from, is refused.
def test_settings_in_force(flags: list[str], small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["--label_smoothing_factor", "0.1", "--gradient_accumulation_steps", "2", "--bf16", "True"]
    result = train.run_training(run_of([*flags, *changes, "--weight_decay", "0.5"]))
    expected = {"mixed_precision": "bf16", "train_batch_size": 32, "gradient_accumulation_steps": 2}
    expected |= {"label_smoothing": 0.1, "processes": 1, "tf32": False, "optimizer": "AdamW"}
    assert expected.items() <= result["in_force"].items()
    assert [group["weight_decay"] for group in result["in_force"]["groups"]] == [0.5, 0.0]
    processor, instructions = result["device"]["name"].split(", ")  # x86_64 alone does not say where numbers repeat
    assert processor != platform.machine() and instructions == torch.backends.cpu.get_cpu_capability()
    data = data_prep.load("rotten_tomatoes", small_data)
    trainer = prepared_run.prepare_run(run_of(flags), data).trainer
    for name, value in (("bf16", True), ("label_smoothing_factor", 0.5), ("tf32", True)):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"in force, and .* by the flags"):
            patch.setattr(trainer.args, name, value)
            prepared_run.in_force(trainer)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(protocol, "check_environment", lambda: None)
    with pytest.raises(InputError, match="mixed_precision is bf16 in force, and no by the flags"):
        prepared_run.prepare_run(run_of(flags), data)


# Label smoothing does the same in one batch of 32 and in four parts of 8, and does something.
def test_label_smoothing_in_parts(tmp_path: Path, small_data: Path) -> None:
    folder = random_model("bert", tmp_path / "bert", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    flags = ["--model", str(folder), "--dataset", "bbc_news", "--data_dir", str(small_data), "--disable_tqdm", "True"]
    flags += ["--num_train_epochs", "1", "--learning_rate", "1e-3", "--output_dir", str(tmp_path)]
    losses = {}
    for smoothing in ("0.0", "0.4"):
        for rows, parts in ((32, 1), (8, 4)):
            split = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(parts)]
            run = run_of([*flags, *split, "--label_smoothing_factor", smoothing])
            train.run_training(run)
            losses[smoothing, parts] = pd.read_csv(run.folder / "epochs.csv")[["train_loss", "eval_loss"]].to_numpy()[0]
    for smoothing in ("0.0", "0.4"):
        assert losses[smoothing, 1] == pytest.approx(losses[smoothing, 4], abs=1e-4)
    assert abs(losses["0.0", 4] - losses["0.4", 4]).min() > 1e-4


# ---- What is refused ----


def make_folder(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


NO_TENSORS = save({}).decode()  # a whole file, but empty
ALBERT = '{"model_type": "albert"}'
BERT = '{"model_type": "bert", "architectures": ["BertModel"]}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--model", "no-such/model"], "not on this machine and the hub cannot be reached"),
        (["--model", "no/such/model"], "unknown model"),
        (["--model", "EMPTY"], "no config.json"),
        (["--model", "PICKLED"], "pickled weights are never loaded"),
        (["--model", "BROKEN"], "not a whole safetensors file"),
        (["--model", "ALBERT"], "AlbertModel cannot be corrupted"),
        (["--model", "NO_TOKENIZER"], "no tokenizer vocabulary"),
        (["--dataset", "sst3"], "sst3"),
        (["--dataset", "sst2"], "hub"),
        (["--frac", "0.3", "--corrupt", "bottom"], "choose from 0, 1/2, 1"),
        (["--frac", "1.5", "--corrupt", "top"], "1.5 is not a part of the layers, from 0 to 1"),
        (["--frac", "nan", "--corrupt", "top"], "nan is not a part of the layers"),
        (["--frac", "1/0", "--corrupt", "top"], "1/0 is not a part of the layers"),
        (["--frac", "1e30000000", "--corrupt", "top"], "1e30000000 is not a part of the layers"),  # at once
        (["--frac", "0.5"], "needs --corrupt"),
        (["--corrupt", "bottom"], "needs --frac"),
        (["--corrupt", "middle", "--frac", "0.5"], "invalid choice"),
        (["--no_such_flag", "1"], "unknown flag --no_such_flag"),
        (["--learning_rat", "1"], "unknown flag --learning_rat"),
        (["--eval_strategy", "steps"], "fixed to epoch"),
        (["--pooling", "max"], "invalid choice"),
        (["--tuning", "prefix"], "--tuning prefix is not known: choose from full, probe"),
        (["--method", "smash", "--corrupt", "top", "--frac", "1"], "--method smash is not known: choose from reinit"),
        (["--no_unpadding", "perhaps"], "perhaps is neither True nor False"),
        (["--tuning", "probe", "--save_vectors"], "--save_vectors needs full"),
        (["--eval_delay", "2"], "fixed to 0"),
        (["--bf16_full_eval", "True"], "fixed to False"),
        (["--enable_jit_checkpoint", "True"], "fixed to False"),  # a run that a signal ended would count as done
        (["--fp16", "True"], "mixed_precision is no in force, and fp16 by the flags"),  # a processor has none
        (["--num_train_epochs", "0"], "not above 0"),
        (["--num_train_epochs", "nan"], "not above 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 is not a number from 1 on"),
        (["--eval_accumulation_steps", "0"], "not a number from 1 on"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor 1.0 is not a number from 0 on and below 1"),
        (["--adam_beta2", "2"], "not a number from 0 on and below 1"),
        (["--weight_decay=-1"], "not a number from 0 on"),
        (["--neftune_noise_alpha", "nan"], "not a number from 0 on"),
        (["--dataloader_num_workers=-1"], "not a number from 0 on"),
        (["--per_device_train_batch_size", "99999999999999999999"], "not above 0 and below 2^31"),
        (["--lr_scheduler_kwargs", "steep"], "the library refuses these flags: "),
        # 1e-3, the rate of this run
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 2e-3}'], "smaller than initial lr"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr_rate should be set through the `lr_scheduler_kwargs`"),
        (["--optim", "lomo"], "You need to install `lomo_optim`"),
        (["--optim_args", "fast"], "the library refuses these flags: "),
        (["--max_steps", "0"], "trains nothing"),
        (["--max_steps=-5"], "trains nothing"),
        (["--seed", "-1"], "not from 0"),
        (["--seed", "4294967296"], "not from 0"),
        (["--learning_rate", "fast"], "invalid float value"),
        (["--learning_rate", "inf"], "not a learning rate"),
        (["--kaiming_a", "nan"], "not from -1e6 to 1e6"),
        (["--kaiming_a", "1e200", "--corrupt", "top", "--frac", "1"], "not from -1e6 to 1e6"),
        (["--report_to", "mlflow"], "invalid choice"),
        (["--max_length", "1024"], "not from 8 to 512"),
        (["--output_dir", "/dev/null/outputs"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    bad: list[str],
    message: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = {
        "EMPTY": lambda path: make_folder(path),
        "PICKLED": lambda path: make_folder(path, config__json=BERT, pytorch_model__bin="x"),
        "BROKEN": lambda path: make_folder(path, config__json=BERT, model__safetensors="x"),
        "ALBERT": lambda path: make_folder(
            path, config__json='{"model_type": "albert"}', model__safetensors=NO_TENSORS
        ),
    }
    bad = [str(folders[word](tmp_path / word)) if word in folders else word for word in bad]
    if "NO_TOKENIZER" in bad:
        bare = make_folder(tmp_path / "bare")
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(flags[1]) / name, bare)
        bad = ["--model", str(bare)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused(monkeypatch, capsys, [*flags, *bad])
    assert not file_names(tmp_path / "outputs")


# A learning rate that makes the loss overflow is a failed run with its reason, not an F1.
def test_a_diverged_run_is_a_failure(flags: list[str]) -> None:
    run = run_of([*flags, "--learning_rate", "1e30", "--resume"])
    with pytest.raises(RunError, match="diverged"):
        train.run_training(run)
    assert file_names(run.folder) == ["failure.json", "failure.log"] and not run.work_dir.exists()
    assert "lower --learning_rate" in json.loads((run.folder / "failure.json").read_text())["reason"]


# The line names the two flags that do the same in half the memory, whatever part of the library runs out of it.
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory(error: Exception, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(BertModel, "forward", forward)
    advice = "give --per_device_train_batch_size 16 --gradient_accumulation_steps 2"
    run = run_of(flags)
    with pytest.raises(RunError, match=f"out of memory with 32 rows of up to 64 tokens at a time: {advice}"):
        train.run_or_reuse(run)
    assert file_names(run.folder) == ["failure.json", "failure.log"] and not run.work_dir.exists()
    assert advice in json.loads((run.folder / "failure.json").read_text())["reason"]
    monkeypatch.undo()
    train.run_or_reuse(run_of([*flags, *advice.split()[1:]]))


# Parts of 9 rows, four to a step, give the losses of steps of 36 rows; the last step of the 96 has 24, so parts of 9, 9
# and 6. Dropout is off: its masks differ.
def test_accumulated_parts_equal_the_whole_batch(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = ["--model", str(random_model("bert", tmp_path / "bert", **off))]
    data, losses = data_prep.load("rotten_tomatoes", small_data), []
    for rows, parts in ((36, 1), (9, 4)):
        batch = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(parts)]
        trainer = prepared_run.prepare_run(run_of([*flags, *model, *batch]), data).trainer
        trainer.train()
        log = trainer.state.log_history
        assert trainer.state.global_step == 6
        losses.append([row[name] for row in log for name in ("loss", "eval_loss") if name in row])
    assert len(losses[0]) == 4 and losses[0][0] > losses[0][2]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# A hub that takes the connection and never answers, and an empty cache: one line, well before the library gives up.
def test_a_silent_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ask, timeouts = models.HfApi.model_info, []

    def model_info(hub: object, name: str, revision: None, timeout: float) -> None:
        timeouts.append(timeout)
        ask(hub, name, timeout=timeout)

    monkeypatch.setattr(models.HfApi, "model_info", model_info)
    models.download_model.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        error = refused(monkeypatch, capsys, ["--output_dir", str(tmp_path / "outputs")])
    assert "'bert-base-uncased' is not on this machine and the hub cannot be reached (" in error
    assert timeouts == [3] and "timed out" in error and not (tmp_path / "outputs").exists()


# A launcher's process, one of two, refuses before it loads or writes anything.
def test_one_process_a_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2 in the environment, and a run is one process: leave out" in refused(monkeypatch, capsys, flags)
    assert not (tmp_path / "outputs").exists()


def test_the_head_has_its_own_stream(tiny_bert: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(7)
        heads.append(corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# Table 1's SST-2 of BERT-base, bottom 50 %, is 83.25; the paper has no MiniLM and no probe on SST-2.
def test_the_papers_value_beside_ours() -> None:
    cell = {"model": "bert-base-uncased", "side": "bottom", "percent": 50.0, "dataset": "sst2", "pooling": "cls"}
    cell |= {"tuning": "full", "method": "reinit", "parts": "all", "corrupt_after": False}
    line = paper.compare(cell, 0.8)
    assert "Table 1 has 83.25 %" in line and line.endswith("-3.25")
    for change in ({"model": "minilm"}, {"tuning": "probe"}, {"pooling": "mean", "tuning": "probe"}):
        assert paper.compare(cell | change, 0.8) == "the paper has no such cell"
    for change in ({"method": "noise"}, {"corrupt_after": True}):
        assert paper.compare(cell | change, 0.8) == "the paper has no such corruption"
