"""What a run is called, and what makes it another run: every field of RunConfig and of TrainingArguments."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import run_of
from transformers import TrainingArguments

import common
import config
import models
import prepared_run
import resolve
import run_dir
import train
from common import InputError
from config import FIELDS, FOUND, NEUTRAL_VALUES, Run, RunConfig
from protocol import AFFECTS, NEUTRAL, PROTOCOL

# Another value than the run below has. Fields that are not here get another number or the other truth value.
OTHER = {
    **{"model": "minilm", "corrupt": "top", "frac": Fraction(1), "method": "shuffle", "dataset": "bbc_news"},
    **{"layers": "embeddings", "parts": "ffn", "severity": 0.5, "layer_decay": 0.5},
    **{"revision": "v1"},
    **{"pooling": "mean", "tuning": "probe", "max_steps": 7, "report_to": "tensorboard"},
    **{"data_dir": "other data", "output_dir": "it's elsewhere"},
    **{"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 2}', "warmup_steps": 0.5, "data_seed": 3},
    **{"optim": "adafactor", "optim_args": "eps=1e-8,beta1=0.8", "optim_target_modules": "all-linear", "tf32": False},
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), True),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), '{"use_reentrant": true}'),
    **{"torch_compile_backend": "eager", "torch_compile_mode": "default", "liger_kernel_config": '{"rope": true}'},
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), 0.5),
    "neftune_noise_alpha": 5.0,
    "eval_at": (0, 5),
    **{"corrupt_seed": 4, "head_seed": 5, "probe_reads": "mean", "probe_layers": "all"},
}

TAKERS = {"lora_rank": {"tuning": "lora"}, "lora_alpha": {"tuning": "lora"}, "layer_decay": {"tuning": "llrd"}}
TAKERS |= {name: {"tuning": "probe_converged"} for name in ("probe_reads", "probe_layers")}


def other(name: str) -> object:
    default = FIELDS[name].default if name in FIELDS else AFFECTS.get(name)
    if name in OTHER:
        return OTHER[name]
    return not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else 1.5 * default + 1


def with_other(config: RunConfig, name: str) -> RunConfig:
    if name == "layers":
        config = replace(config, corrupt="none", frac=None)
    return replace(config, **{name: other(name)}) if name in FIELDS else replace(config, trainer={name: other(name)})


def parse(words: list[str]) -> RunConfig:
    return RunConfig(**config.parse_flags(config.run_parser(train.__doc__), words))


@pytest.fixture
def run(tiny_bert: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """At the neutral value of every field that has one. The same rows lie in "other data", too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_data, "other data")
    cell = ["--model", str(tiny_bert), "--corrupt", "bottom", "--frac", "1/2", "--dataset", "rotten_tomatoes"]
    return run_of([*cell, "--data_dir", str(small_data)])


# A field that a new version of the library brings, or a new one of ours, says first whether it changes results.
def test_every_field_of_the_library_is_classified() -> None:
    library, classes = {field.name for field in fields(TrainingArguments)}, (FIELDS, PROTOCOL, AFFECTS, NEUTRAL)
    wrong = {name: count for name in library if (count := sum(name in kind for kind in classes)) != 1}
    assert not wrong, f"not in just one of RunConfig, PROTOCOL, AFFECTS, NEUTRAL (times): {wrong}"
    gone = {*PROTOCOL, *AFFECTS, *NEUTRAL} - library
    assert not gone, f"not a field of TrainingArguments: {gone}"
    neutral = {
        "data_dir",
        "eval_at",
        "output_dir",
        "probe_layers",
        "report_to",
        "resume",
        "revision",
        "save_model",
        "save_states",
        "save_vectors",
    }
    assert {name for name, field in FIELDS.items() if not field.metadata["affects"]} == neutral


# Ours by design: evaluation in larger batches, which is faster.
def test_neutral_values_are_the_librarys_defaults() -> None:
    defaults, resolved = {field.name: field for field in fields(TrainingArguments)}, TrainingArguments("unused")
    ours = {}
    for name, value in AFFECTS.items():
        field = defaults[name]
        default = field.default_factory() if field.default is MISSING else field.default
        if value not in (default, getattr(resolved, name)):
            ours[name] = value
    assert ours == {"per_device_eval_batch_size": 64}


# What affects results is in the settings and, if it is another, in the name; what does not is in neither.
@pytest.mark.parametrize("name", sorted({*FIELDS, *AFFECTS} - {"revision"}))  # that is for hub models: test_hub.py
def test_the_name_has_what_affects_results(name: str, run: Run) -> None:
    if taker := TAKERS.get(name):  # says nothing without it
        run = resolve.resolve_run(replace(run.config, **taker))
    changed = resolve.resolve_run(with_other(run.config, name))
    if name in AFFECTS or FIELDS[name].metadata["affects"]:
        assert changed.name != run.name and changed.settings != run.settings
        assert name in FOUND or (run.settings[name], changed.settings[name]) == (NEUTRAL_VALUES[name], other(name))
    else:
        assert changed.name == run.name and changed.settings == run.settings


def test_the_name_lacks_what_is_neutral(run: Run) -> None:
    for name in NEUTRAL | PROTOCOL.keys():
        settings = resolve.resolve_run(replace(run.config, trainer={name: PROTOCOL.get(name, 2)})).settings
        assert settings == run.settings, name


# Each field that affects results comes to the Trainer as it was given, unless the library refuses it on this machine.
def test_the_trainer_gets_what_is_in_the_name(run: Run) -> None:
    names = [field.name for field in fields(TrainingArguments) if field.name in NEUTRAL_VALUES]
    assert {"learning_rate", "seed", *AFFECTS} <= set(names)
    ignored = {}
    for name in names:
        try:
            arguments = prepared_run.training_arguments(with_other(run.config, name), Path("unused"), "unused")
        except InputError:
            continue
        given, got = other(name), getattr(arguments, name)
        if got != (json.loads(given) if isinstance(got, dict) else given):
            ignored[name] = got
    assert ignored == {}


# A result that lacks a field that did not exist when it was made counts as made with the neutral value.
def test_a_result_that_lacks_a_field(run: Run, capsys: pytest.CaptureFixture) -> None:
    run.folder.mkdir(parents=True)

    def is_valid(settings: dict) -> bool:
        common.write_signed(run.folder / "result.json", {"settings": settings, "weighted_f1": 0.5, "files": {}})
        result = run_dir.load_valid_result(run, digests=False)
        return result is not None and result["settings"] == run.settings

    for name, neutral in NEUTRAL_VALUES.items():
        lacking = {key: value for key, value in run.settings.items() if key != name}
        assert is_valid(lacking) and is_valid(lacking | {name: neutral}) and capsys.readouterr().err == "", name
        assert not is_valid(lacking | {name: other(name)}), name
        assert "it is a copy, or was renamed" in capsys.readouterr().err
    assert not is_valid({name: value for name, value in run.settings.items() if name != "model_fingerprint"})


# The command that a run prints does the same run, whatever its fields; other fields at their default are left out.
def test_flags_give_the_same_run() -> None:
    alone = {"tuning", "layers", "kaiming_a", "corrupt_after", "eval_at", *TAKERS}
    every = {name: other(name) for name in FIELDS if name not in alone}
    trainer = {name: other(name) for name in AFFECTS if name != "liger_kernel_config"}  # not to be had as a flag
    trainer |= {"logging_steps": 3.0, "disable_tqdm": True, "hub_strategy": "end", "log_level": "error"}
    for wanted in (
        RunConfig(**every, trainer=trainer),
        RunConfig(layers="2-3,embeddings", tuning="lora", lora_rank=2, lora_alpha=1.5),
        RunConfig(corrupt="top", frac=Fraction(1), kaiming_a=-1.0, tuning="llrd", layer_decay=0.5),
        RunConfig(tuning="probe_converged", probe_reads="mean", probe_layers="all"),
        RunConfig(corrupt="top", frac=Fraction(1, 2), corrupt_after=True, eval_at=(0, 5, 20)),
        RunConfig(tuning="probe", frac=Fraction(1, 3), corrupt="bottom", learning_rate=1.0000001e-05),
    ):
        assert parse(wanted.flags()) == wanted
    flags = shlex.join(wanted.flags())
    cell = "--model bert-base-uncased --dataset sst2 "
    assert flags == f"{cell}--corrupt bottom --frac 1/3 --tuning probe --learning_rate 1.0000001e-05"
    assert shlex.join(RunConfig().flags()) == cell.strip()
    assert repr(RunConfig(num_train_epochs=3)) == repr(RunConfig(num_train_epochs=3.0))
    assert parse(["--max-length=32", "--fp16"]) == RunConfig(max_length=32, trainer={"fp16": True})


# Both hub names of one of the paper's models are one model; another's copy is not.
def test_the_papers_models_have_one_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_model", lambda name, revision: (run.model_folder, "revision"))
    names = ("bert-base-uncased", "google-bert/bert-base-uncased", "somebody/bert-base-uncased")
    runs = [resolve.resolve_run(replace(run.config, model=name)) for name in names]
    assert [run.settings["model"] for run in runs] == [names[0], names[0], names[2]]
    assert runs[0].name == runs[1].name != runs[2].name and "google-bert/" in runs[1].command


# A folder that happens to be called minilm is not what --model minilm takes, nor does it give its name.
def test_minilm_is_not_a_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm = replace(run.config, model="minilm", data_dir=str(Path(run.config.data_dir).resolve()))
    (tmp_path / "another").mkdir()
    (tmp_path / "minilm").symlink_to("another")
    monkeypatch.chdir(tmp_path)
    assert resolve.resolve_run(minilm).settings["model"] == "minilm"


# Numbers that differ in their last digits are two; two ways to write one number are one.
def test_numbers_in_names(run: Run) -> None:
    rates = (1e-3, 1.0000001e-3, float("1.00e-03"), 9.9e-4)
    names = [resolve.resolve_run(replace(run.config, learning_rate=rate)).name for rate in rates]
    assert names[0] == names[2] and len(set(names)) == 3 and "_lr0.001_" in names[0]


# A name that a file system does not take is cut, and stays its own.
def test_long_names(run: Run) -> None:
    config_of = {scale: {"lr_scheduler_kwargs": "x" * 300 + scale} for scale in "ab"}
    first, second = (resolve.resolve_run(replace(run.config, trainer=trainer)).name for trainer in config_of.values())
    assert first != second and len(first) == len(second) == 200
    wide = config.run_name(run.settings | {"dataset": "数据" * 35, "max_length": 32})
    assert 180 < len(wide.encode()) <= 200 and wide != config.run_name(run.settings | {"dataset": "数据" * 35})


# What a run is called, and whether its result is valid, is told without a second of imports.
def test_light_imports() -> None:
    code = "import config, run_dir, aggregate, sys; print(*{'torch', 'transformers', 'datasets'} & sys.modules.keys())"
    root = Path(config.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr
