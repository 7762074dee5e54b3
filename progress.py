"""What a grid shows while it works: on a terminal one display that stays in its place, else plain lines.

How far the running runs are, they say themselves, in outputs/unfinished/<run>/now.json. Used by grid.py.
"""

import math
import sys
import time
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import config
import run_dir
from config import Run


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Display:
    """The runs that are done, failed and left, those that are running, and how long it takes."""

    def __init__(self, runs: list[Run], costs: list[float], pool: str, console: Console | None = None) -> None:
        """`costs` is what the runs cost beside one another, from their beginning."""
        self.runs = {run.name: run for run in runs}
        self.costs, self.pool = dict(zip(self.runs, costs, strict=True)), pool
        self.done_before = {name: part_done_before(run) for name, run in self.runs.items()}
        self.states: dict[str, str] = {}
        self.started = time.monotonic()
        self.console = console or Console()
        self.live = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            errors_too = sys.stderr.isatty()
            self.live = Live(
                console=self.console, get_renderable=self.render, refresh_per_second=1, redirect_stderr=errors_too
            )
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def add_outcome(self, run: Run, state: str, line: str) -> None:
        """Say what became of the run: "done", "failed", or "again" if it is to be done once more."""
        if state != "again":
            self.states[run.name] = state
        line = line if state == "done" else f"{state}: {line}"
        if self.live:
            self.console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
            self.live.refresh()
        else:
            left = self.time_left()
            soon = f", about {duration(left)} left" if left else ""
            print(f"[{len(self.states)} of {len(self.runs)}{soon}] {line}", flush=True)

    def running(self) -> dict[str, dict]:
        """How far each of the runs is that some process does now."""
        names = {path.parent.name for path in next(iter(self.runs.values())).work_dir.parent.glob("*/new")}
        return {n: run_dir.read_progress(run) for n, run in self.runs.items() if n in names - self.states.keys()}

    def work(self) -> tuple[float, float]:
        """What has been done since this grid began, and all that it has to do; in `costs`."""
        counted = [name for name in self.runs if self.states.get(name) != "failed"]
        part = {name: float(self.states.get(name) == "done") for name in counted}
        part |= {name: now["fraction"] for name, now in self.running().items() if now}
        done = sum(self.costs[name] * max(0, part[name] - self.done_before[name]) for name in counted)
        return done, sum(self.costs[name] * (1 - self.done_before[name]) for name in counted)

    def time_left(self) -> float | None:
        """In seconds, from all the work done so far; None before there is any."""
        done, whole = self.work()
        return (time.monotonic() - self.started) * (whole - done) / done if done else None

    def render(self) -> Group:
        states, width = list(self.states.values()), min(self.console.width - 2, 100)  # room for ^C
        done, failed = states.count("done"), states.count("failed")
        head = Text(f"{done} of {len(self.runs)} runs done, {failed} failed, {len(self.runs) - done - failed} left")
        head.append(f" ({self.pool})", "dim")
        work, whole = self.work()
        left, gone = self.time_left(), duration(time.monotonic() - self.started)
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.width = width
        bar.add_column(ratio=1)
        share = work / whole if whole else 1.0
        times = f"{gone} gone" + (f", about {duration(left)} left" if left else "")
        bar.add_row(ProgressBar(total=1.0, completed=share), f"{100 * share:.0f} %", times)
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.width = width
        lines.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        lines.add_column(min_width=len("epoch 1 of 10"), no_wrap=True)
        lines.add_column(min_width=len("F1 12.34 %"), no_wrap=True)
        for name, now in self.running().items():
            s = self.runs[name].settings
            what = f"{config.describe_cell(s)}, lr {s['learning_rate']:g}, seed {s['seed']}"
            epoch = f"epoch {max(1, math.ceil(now['epoch']))} of {now['epochs']}" if now else "starting"
            f1 = f"F1 {100 * now['weighted_f1']:.2f} %" if now.get("weighted_f1") is not None else ""
            lines.add_row(Text(what), epoch, f1)
        return Group(head, bar, lines)


def part_done_before(run: Run) -> float:
    """The part of a run that was cut off and need not be done again."""
    now = run_dir.read_progress(run) if run.config.resume else {}
    return max(0, math.ceil(now["epoch"]) - 1) / now["epochs"] if now else 0.0
