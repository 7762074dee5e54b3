"""Break the grid in the ways that machines and people do, start it again, and compare it with an undisturbed one.

    python benchmarks/faults.py                              # all parts
    python benchmarks/faults.py --part kills --kills 100
    python benchmarks/faults.py --part cluster               # with requirements-cluster.txt

24 real but small runs of the embedded model. `kills` ends processes of runs, the server that forks them, and the grid
at random moments; `rivals` starts two grids on one output folder; `files` truncates what a grid reads; `disk` fills the
disk (a small tmpfs, which needs `unshare`); `clock` puts the clock back and forth (libfaketime, in
requirements-dev.txt); `cluster` kills a worker, a node and the driver of a Ray cluster of three nodes, with and without
a shared folder. Prints what was done, what was lost and what was done again. Exit code 1 if a result is lost, done
twice, or other than the undisturbed grid's.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pandas as pd
import psutil
from filelock import FileLock, Timeout

ROOT = Path(__file__).parent.parent
GRID = ["--preset", "demo", "--seed", "0", "1", "--max_length", "32"]
RUNS = 24
NUMBERS = ("epochs.csv", "predictions.csv.gz")
KILLS = (
    "SIGKILL of a run",
    "SIGKILL of the server",
    "SIGKILL of the grid",
    "SIGTERM of the grid",
    "Ctrl-C",
    "SIGKILL of all",
)
PRIVATE = ("unshare", "--mount", "--map-root-user", "sh", "-c")  # a shell that sees mounts of its own
RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex, "RAY_raylet_start_wait_time_s": "120"}


class Bench:
    """The folder of the test, with its data and an undisturbed grid, and what was found so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.undisturbed, self.rows = folder, folder / "undisturbed", []
        self.prepare()
        started = time.perf_counter()
        if self.start(self.undisturbed).wait() != 0 or len(results(self.undisturbed)) != RUNS:
            raise RuntimeError("the undisturbed grid failed")
        print(f"undisturbed: {RUNS} runs in {time.perf_counter() - started:.0f} s", flush=True)

    def prepare(self) -> None:
        where = ["--data_dir", self.folder / "data"]
        command = [sys.executable, "data_prep.py", "--train_size", "96", "--test_size", "50", *where]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)

    def command(self, output: Path, *flags: str) -> list[str]:
        where = ["--data_dir", str(self.folder / "data"), "--output_dir", str(output)]
        return [sys.executable, "grid.py", *GRID, *where, *flags]

    def start(self, output: Path, *flags: str, env: dict[str, str] | None = None) -> psutil.Popen:
        """A grid in a process group of its own, as a terminal starts it; what it says goes to `output`.log."""
        with Path(f"{output}.log").open("a") as log:
            return psutil.Popen(
                self.command(output, *flags),
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self, output: Path) -> str:
        return Path(f"{output}.log").read_text().replace("\r", "\n")

    def found(self, fault: str, output: Path, **more: object) -> None:
        """Add a row: runs that are missing, that differ from the undisturbed to the byte, files left over."""
        there = results(output)
        other = [
            run
            for run in there
            if any(
                (output / "runs" / run / name).read_bytes() != (self.undisturbed / "runs" / run / name).read_bytes()
                for name in NUMBERS
            )
        ]
        left = [path for path in output.glob("unfinished/*") if path.suffix != ".lock"]
        row = {"fault": fault, **more, "missing": RUNS - len(there), "other": len(other), "left over": len(left)}
        self.rows.append(row)
        print(row, flush=True)


def results(output: Path) -> dict[str, int]:
    """The runs that are there, and when each came."""
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")}


def at_work(output: Path) -> int:
    """How many runs some process holds the lock of."""
    held = 0
    for path in output.glob("unfinished/*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
            lock.release()
        except Timeout:
            held += 1
    return held


def processes_of(grid: psutil.Popen) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The server that forks the processes of the grid's runs, and those processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        servers = [child for child in grid.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
        return servers, [process for server in servers for process in server.children()]
    return [], []


# ---- What goes wrong ----


def kills(bench: Bench, count: int) -> None:
    """`count` kills of runs, servers and grids at random moments; each grid is started again until it is whole."""
    done, number, lost, twice, cut_off, slowest = Counter(), 0, 0, 0, Counter(), Counter()
    while done.total() < count:
        output, seen = bench.folder / f"kills-{number}", {}
        flags = ("--resume",) if number % 2 else ()
        number += 1
        while len(seen) < RUNS:
            grid = bench.start(output, *flags)
            moment = None
            while grid.poll() is None:
                time.sleep(0.02)
                servers, runs = processes_of(grid)
                moment = moment or (runs and time.monotonic() + random.uniform(0, 15))
                if not runs or time.monotonic() < moment or done.total() == count:
                    continue
                kind, started = KILLS[done.total() % len(KILLS)], time.monotonic()
                held = at_work(output)
                try:
                    if kind == "SIGKILL of a run":
                        random.choice(runs).kill()
                    elif kind == "SIGKILL of the server":
                        servers[0].kill()
                    elif kind in ("Ctrl-C", "SIGKILL of all"):
                        os.killpg(grid.pid, signal.SIGINT if kind == "Ctrl-C" else signal.SIGKILL)
                    else:
                        grid.send_signal(signal.SIGKILL if "SIGKILL" in kind else signal.SIGTERM)
                except psutil.NoSuchProcess:  # it has just ended
                    continue
                cut_off[kind] += {"SIGKILL of a run": 1, "SIGKILL of the server": 0}.get(kind, held)
                done[kind] += 1
                moment = None
                if kind not in ("SIGKILL of a run", "SIGKILL of the server"):
                    grid.wait()
                    psutil.wait_procs([*servers, *runs])
                    slowest[kind] = max(slowest[kind], time.monotonic() - started)
                    polite = kind in ("Ctrl-C", "SIGTERM of the grid")
                    if polite and (grid.returncode != 130 or "the same command goes on" not in bench.said(output)):
                        raise RuntimeError(f"{kind}: exit code {grid.returncode}: {bench.said(output)[-2000:]}")
            if grid.returncode == 1 and "was killed twice" not in bench.said(output):
                raise RuntimeError(f"a run failed for good: {bench.said(output)[-2000:]}")
            now = results(output)
            lost += len(seen.keys() - now.keys())
            twice += sum(now[run] != came for run, came in seen.items() if run in now)
            seen = now
        again = bench.said(output).count("again: ")
        bench.found(f"{done.total()} kills so far", output, **{"runs done again": again})
    for kind in KILLS:
        row = {"fault": kind, "injected": done[kind], "runs cut off": cut_off[kind]}
        bench.rows.append(row | {"seconds to end, at most": round(slowest[kind], 1)})
    bench.rows.append({"fault": "all of these", "injected": done.total(), "lost": lost, "done twice": twice})


def rivals(bench: Bench, _: int) -> None:
    """Two grids at once on one output folder: each run is done once."""
    output = bench.folder / "rivals"
    grids = [bench.start(output) for _ in range(2)]
    codes = [grid.wait() for grid in grids]
    lines = [line for line in bench.said(output).splitlines() if "weighted F1" in line]
    by_other = sum("by another process" in line for line in lines)
    done = len(lines) - by_other
    bench.found("two grids at once", output, **{"exit codes": codes, "done": done, "done twice": done - RUNS})


def files(bench: Bench, _: int) -> None:
    """Cut a file in half and start the grid again; what reads tokens and rows, runs anew for it."""
    output, data = bench.folder / "files", bench.folder / "data"
    shutil.copytree(bench.undisturbed, output)
    run = min(output.glob("runs/*rotten*"))
    for fault, path in {
        "half a result.json": run / "result.json",
        "half an epochs.csv": run / "epochs.csv",
        "half a predictions.csv.gz": run / "predictions.csv.gz",
        "half of the tokens": next(data.glob("tokens/rotten*/train.arrow")),
        "half of the prepared rows": next(data.glob("rotten_tomatoes/train/*.arrow")),
    }.items():
        before = results(output)
        os.truncate(path, path.stat().st_size // 2)
        if path.is_relative_to(data):
            shutil.rmtree(run)
        code = bench.start(output).wait()
        if code == 1:  # rows that are not those that were prepared: what the grid says is to be done
            shutil.rmtree(data / "rotten_tomatoes")
            bench.prepare()
            bench.start(output).wait()
        again = sum(before.get(run) != came for run, came in results(output).items())
        bench.found(fault, output, **{"exit code": code, "done again": again})


def disk(bench: Bench, _: int) -> None:
    """The output folder is on a disk that is too small for a second checkpoint, and then large enough."""
    output, kept = bench.folder / "disk", bench.folder / "disk-kept"
    output.mkdir()
    grid = f"{' '.join(bench.command(output))}; echo code $?"
    small, large = f"mount -t tmpfs -o size=120m tmpfs {output}", f"mount -o remount,size=2g {output}"
    script = f"{small}; {grid}; {large}; {grid}; cp -r {output} {kept}"
    ran = subprocess.run([*PRIVATE, script], cwd=ROOT, capture_output=True, text=True)
    if "code" not in ran.stdout:
        bench.rows.append({"fault": "full disk", "left out": f"no tmpfs can be mounted here: {ran.stderr.strip()}"})
        return
    codes = [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("code")]
    failed = ran.stdout.count("failed: ")
    bench.found("full disk", kept, **{"exit codes": codes, "failed on the full disk": failed})


def clock(bench: Bench, _: int) -> None:
    """The system's time jumps by days, back and forth, while the grid runs."""
    import libfaketime

    output, now = bench.folder / "clock", bench.folder / "now"
    now.write_text("+0")
    library = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    env = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1"}
    grid = bench.start(output, "--resume", env={**env, "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
    jumps = 0
    while grid.poll() is None:
        time.sleep(2)
        now.write_text(random.choice(("-2d", "+3d", "-1h", "+1y", "+0")))
        jumps += 1
    bench.found("clock that jumps", output, **{"injected": jumps, "exit code": grid.returncode})


# ---- A cluster ----


def node(bench: Bench, address: str, *flags: str, hide: tuple[Path, ...] = ()) -> psutil.Popen:
    """A node of a Ray cluster on this machine; folders to `hide` are empty for it, as without a shared disk."""
    command = ["ray", "start", *flags, "--block", "--disable-usage-stats"]
    command += [] if "--head" in flags else ["--address", address]
    if hide:
        mounts = "; ".join(f"mount -t tmpfs tmpfs {folder}" for folder in hide)
        command = [*PRIVATE, f"{mounts}; exec {' '.join(command)}"]
    log = bench.folder / f"ray-{time.monotonic_ns()}.log"
    with log.open("w") as said:
        started = psutil.Popen(command, env={**os.environ, **RAY}, stdout=said, stderr=said, start_new_session=True)
    while "Ray runtime started" not in log.read_text():
        if started.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)
    return started


def end(process: psutil.Popen) -> None:
    """SIGKILL to the process and all that it started."""
    for each in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def ray_workers() -> list[psutil.Process]:
    return [each for each in psutil.process_iter() if each.name().startswith("ray::run_on_node")]


def until_done(output: Path, count: int) -> None:
    limit = time.monotonic() + 300
    while len(results(output)) < count:
        if time.monotonic() > limit:
            raise RuntimeError(f"{len(results(output))} runs after 300 s, {count} were awaited")
        time.sleep(0.2)


def cluster(bench: Bench, _: int) -> None:
    """A Ray cluster of three nodes: a worker, a node with runs on it and the driver are killed."""
    address, memory = "127.0.0.1:6399", str(6 * 2**30)
    for shared in (True, False):
        output = bench.folder / ("shared" if shared else "apart")
        output.mkdir()
        hide = () if shared else (output, bench.folder / "data")
        small = ("--num-cpus", "1", "--memory", memory, "--object-store-memory", str(2**28))
        head = node(bench, address, "--head", "--port", "6399", "--num-cpus", "0", "--include-dashboard", "false")
        nodes = [node(bench, address, *small, hide=hide) for _ in range(3)]
        env, started = {"RAY_ADDRESS": address, **RAY}, time.perf_counter()
        try:
            grid = bench.start(output, "--executor", "ray", env=env)
            until_done(output, 3)
            random.choice(ray_workers()).kill()
            until_done(output, 6)
            end(nodes.pop())
            until_done(output, 12)
            seen = results(output)
            grid.send_signal(signal.SIGKILL if shared else signal.SIGTERM)
            if grid.wait() != (-signal.SIGKILL if shared else 130):
                raise RuntimeError(f"exit code {grid.returncode}: {bench.said(output)[-2000:]}")
            psutil.wait_procs(ray_workers(), timeout=60)
            code = bench.start(output, "--executor", "ray", env=env).wait()
            seconds = round(time.perf_counter() - started)
            twice = sum(results(output)[run] != came for run, came in seen.items())
            name = f"Ray: a worker, a node, the driver ({'shared folder' if shared else 'no shared folder, SIGTERM'})"
            bench.found(name, output, **{"exit code": code, "done twice": twice, "seconds": seconds})
        finally:
            for each in nodes:
                end(each)
            head.terminate()
            head.wait()


PARTS = {"kills": kills, "rivals": rivals, "files": files, "disk": disk, "clock": clock, "cluster": cluster}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to break")
    parser.add_argument("--kills", type=int, default=30, help="how many kills")
    parser.add_argument("--random_seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    random.seed(args.random_seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would a grid
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for part in args.part:
            started = time.perf_counter()
            PARTS[part](bench, args.kills)
            print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    table = pd.DataFrame(bench.rows)
    print(table.astype(object).where(table.notna(), "").to_markdown(index=False))
    bad = table.reindex(columns=["missing", "other", "left over", "lost", "done twice"]).fillna(0).to_numpy().sum()
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
