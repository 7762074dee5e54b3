"""What a script says of itself: help that can be read, with examples that are true."""

import dataclasses
import importlib
import shlex

import pytest
from transformers import TrainingArguments

import settings

SCRIPTS = ("data_prep", "corrupt", "train", "grid", "aggregate", "figure1", "report")


def help_of(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flag: str = "--help") -> str:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.argv", [f"{script}.py", flag])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 0
    return capsys.readouterr().out


# No more than a screen and a half, with two commands, of which each flag is one that the help lists.
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short_and_has_examples(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = help_of(script, monkeypatch, capsys).splitlines()
    assert len(lines) <= 60
    examples = [shlex.split(line, comments=True) for line in lines if line.strip().startswith(f"python {script}.py")]
    listed = {line.split()[0] for line in lines if line.strip().startswith("--")} | {"--num_train_epochs"}
    assert len(examples) >= 2
    assert {word for example in examples for word in example if word.startswith("--")} <= listed
    if script == "train":
        for example in examples:
            settings.parse(example[2:])


def test_help_all_has_every_flag_of_the_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = help_of("train", monkeypatch, capsys, "--help_all")
    assert not [field.name for field in dataclasses.fields(TrainingArguments) if f"--{field.name} " not in text]
