"""What a script says of itself: help that can be read, with examples that are true."""

import dataclasses
import importlib
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

import config
import train

SCRIPTS = ("data_prep", "corrupt", "train", "grid", "aggregate", "analyse", "plots", "report")


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
    assert len(lines) <= 68
    examples = [shlex.split(line, comments=True) for line in lines if line.strip().startswith(f"python {script}.py")]
    listed = {line.split()[0] for line in lines if line.strip().startswith("--")} | {"--num_train_epochs"}
    assert len(examples) >= 2
    assert {word for example in examples for word in example if word.startswith("--")} <= listed
    if script == "train":
        for example in examples:
            config.RunConfig(**config.parse_flags(config.run_parser(train.__doc__), example[2:]))


def test_help_all_has_every_flag_of_the_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = help_of("train", monkeypatch, capsys, "--help_all")
    assert not [field.name for field in dataclasses.fields(TrainingArguments) if f"--{field.name} " not in text]


# Ctrl-C while torch is imported: a line and no traceback, and the shell is told that a key ended it.
@pytest.mark.parametrize("script", ["train.py", "grid.py"])
def test_a_key_while_packages_are_imported(script: str) -> None:
    run = f"""
import os, runpy, signal, sys
class Key:
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Key)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
sys.argv = ["{script}", "--model", "no-such/model"]
runpy.run_path("{script}", run_name="__main__")
"""
    root = Path(train.__file__).parent
    ended = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True, timeout=600)
    assert ended.returncode == -signal.SIGINT and ended.stderr == "interrupted\n"


# train.py and grid.py tell help and a wrong flag without the seconds that torch takes.
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no_such_flag", 2)])
def test_told_before_torch_is_imported(flag: str, code: int) -> None:
    run = f"""
import runpy, sys
for script in ("train.py", "grid.py"):
    sys.argv = [script, "{flag}"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("ends", end.code, *{{"torch", "transformers", "datasets"}} & sys.modules.keys(), file=sys.stderr)
"""
    command, root = [sys.executable, "-c", run], Path(config.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if line.startswith("ends")] == [f"ends {code}"] * 2, done.stderr


# A script whose reader goes away (`| head`) ends without a word.
def test_a_reader_that_goes_away(small_data: Path) -> None:
    command = [sys.executable, "data_prep.py", "--dataset", "bbc_news", "--train_size", "96", "--test_size", "50"]
    root, pipes = Path(config.__file__).parent, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--data_dir", str(small_data)], cwd=root, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(120) == -signal.SIGPIPE
