"""What every script needs: files that appear whole, digests, errors in one line, the set-up of a parser."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import NoReturn
from uuid import uuid4

from filelock import FileLock


class InputError(ValueError):
    """What was asked for is wrong or cannot be had. The message says what is wrong, what is allowed, what to do."""


class RunError(RuntimeError):
    """A run that did not end well; `failure.json` in its folder has the reason."""


def tell(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Ctrl-C that nobody waits for, as while packages are imported, ends a script with a line and no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, where)


sys.excepthook = tell
USER_ERRORS = (InputError, RunError, OSError)  # told in one line, with exit code 2


def one_line(error: BaseException) -> str:
    """The error's message in one line, or the error's class if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def explain(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Such errors inside the block become an InputError, `what: error`; an InputError stays, unless it is named."""
    try:
        yield
    except errors as error:
        if isinstance(error, InputError) and InputError not in errors:
            raise
        raise InputError(f"{what}: {one_line(error)}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: the file appears whole or not at all."""
    aside = path.with_name(f".partial-{uuid4().hex}-{path.name}")  # others may be writing the same
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The file's digest; read again only if its size, inode or a time has changed (the last none can set back)."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_signed(path: Path, values: dict) -> None:
    """`values` as JSON, its last entry the sha256 of all that stands before it: an edit shows."""
    text = json.dumps(values, indent=1)[:-2]
    path.write_text(f'{text},\n "sha256": "{sha256(text.encode()).hexdigest()}"\n}}\n', encoding="utf-8")


def read_signed(path: Path) -> dict:
    """What `write_signed` wrote. Raises ValueError if the file was edited."""
    whole = path.read_text(encoding="utf-8")
    text, _, end = whole.rpartition(',\n "sha256": "')
    if end != f'{sha256(text.encode()).hexdigest()}"\n}}\n':
        raise ValueError(f"{path.name} is not what the run wrote, or of an older version")
    return json.loads(whole)


def write_together(folder: Path, script: str, files: dict[str, str]) -> None:
    """Write a script's files into the folder, all or none, and last the CSVs' digests, as `sha256sum -c` reads them."""
    csvs = {name: text for name, text in files.items() if name.endswith(".csv")}
    digests = "".join(f"{sha256(text.encode()).hexdigest()}  {name}\n" for name, text in csvs.items())
    with ExitStack() as stack:  # it renames the first one last
        for name, text in ({f"{script}.sha256": digests} | files).items():
            stack.enter_context(atomic_write(folder / name)).write_bytes(text.encode())


def check_together(folder: Path, script: str) -> set[str]:
    """The names of the CSVs that the script wrote there. Raises InputError unless all are as it wrote them."""
    again, path = f"run python {script}.py --output_dir {folder} first", folder / f"{script}.sha256"
    with explain(f"the files of {script}.py are not there, {again}", OSError, ValueError):
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        changed = [name for digest, name in lines if sha256_of(folder / name) != digest]
    if changed:
        raise InputError(f"{folder / changed[0]} is not what {script}.py wrote: {again}")
    return {name for _, name in lines}


def file_lock(path: Path) -> FileLock:
    """A lock that the system takes from a process that dies. Where the file system has none, acquiring it fails."""
    return FileLock(path, fallback_to_soft=False)


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files of it were changed; None outside a git checkout.

    On a cluster's nodes, where the code came without its repository, HEALING_COMMIT tells it.
    """
    if "HEALING_COMMIT" in os.environ:
        return os.environ["HEALING_COMMIT"] or None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def in_worker() -> bool:
    """Whether this is one of the processes that do a grid's runs: its output goes to a log."""
    return multiprocessing.parent_process() is not None


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the first two paragraphs of a script's docstring: what it does, and examples."""
    return argparse.ArgumentParser(
        description="\n\n".join(doc.split("\n\n")[:2]),
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_script(main: Callable[[], None]) -> None:
    """Run a script that only prints and writes files: `| head` ends it quietly."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()


def fail(error: BaseException) -> NoReturn:
    """End the script with the error in one line and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def fraction(text: str) -> Fraction:
    """A part of the layers for argparse: 0.5 or 1/3."""
    try:
        frac = Fraction("" if "e" in text.lower() else text)  # 1e9999999 would take minutes
    except (ValueError, ZeroDivisionError):
        frac = Fraction(-1)
    if not 0 <= frac <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a part of the layers, from 0 to 1: give one such as 0.5 or 1/3"
        )
    return frac
