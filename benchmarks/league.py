"""The league: every method, with its default settings, on every task at every density.

    python benchmarks/league.py run --data PATH [--jobs 2] [--tasks …] [--methods …] [--seeds N]
    python benchmarks/league.py write

PATH is a folder with cifar10/*.parquet, cifar10/resnet20.safetensors and tinyshakespeare.txt. All
methods of a task get the same recipe and seeds (`league_tasks.py`); "dense" is the same network
trained without pruning, from which "spartan taught" learns beside the labels. Each run is added to
docs/league.json, and what is there is not run again: delete its rows to repeat them. Everything
takes some hours on two cores, seed after seed. `write` makes the tables in docs/benchmarks.md, and
the picture, from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch

from league_tasks import TASKS
from spartan import Budget, methods

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PICTURE, PAGE = DOCS / "league.json", DOCS / "league.svg", DOCS / "benchmarks.md"
MARKS = "<!-- league: made by benchmarks/league.py write -->", "<!-- end of league -->"

METHODS = (
    *("spartan", "dual-averaging", "magnitude", "dpf", "powerpropagation", "constrained-l0"),
    *("rigl", "gse", "spartan taught"),
)
TAUGHT = " taught"  # learns from the dense network beside the labels
ALWAYS_SPARSE = ("rigl", "gse")  # they move single connections of networks that are never dense
COLORS = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    density: float
    method: str
    seed: int

    @property
    def applies(self) -> bool:
        """Whether the method can do this task."""
        task = TASKS[self.task]
        if self.method == "dense":
            return self.density == task.densities[0] and task.dense_of is None
        if task.methods and self.method not in task.methods:
            return False
        if self.method.endswith(TAUGHT) and (task.bits or task.starts_dense):
            return False
        return self.method not in ALWAYS_SPARSE or not task.starts_dense


def wanted(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> list[Job]:
    """Return all runs, seed after seed."""
    jobs = [
        Job(task, density, method, seed)
        for seed in range(seeds)
        for task in tasks
        for method in ("dense", *methods)
        for density in TASKS[task].densities
        if seed < TASKS[task].seeds
    ]
    return [job for job in jobs if job.applies]


def run(job: Job, data: Path) -> dict[str, object]:
    """Train once, on one thread."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    name = job.method.removesuffix(TAUGHT)
    method = None if name == "dense" else methods.create(name)
    budget = Budget(density=job.density)
    score = TASKS[job.task].run(method, budget, job.seed, data, taught=name != job.method)
    return {**vars(job), "score": round(score, 4), "seconds": round(time.perf_counter() - began)}


def run_all(args: argparse.Namespace) -> None:
    """Run what is missing, several side by side."""
    rows = read()
    done = {(r["task"], r["density"], r["method"], r["seed"]) for r in rows}
    jobs = [
        job
        for job in wanted(args.tasks, args.methods, args.seeds)
        if (job.task, job.density, job.method, job.seed) not in done
    ]
    print(f"{len(jobs)} runs are missing, {len(rows)} are there", flush=True)
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=20) as pool:
        for handle in [pool.apply_async(run, (job, args.data)) for job in jobs]:
            rows.append(handle.get())
            print(json.dumps(rows[-1]), flush=True)
            new = RESULTS.with_suffix(".new")
            new.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            new.replace(RESULTS)


def read() -> list[dict[str, object]]:
    """Return all runs so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


@dataclass(frozen=True)
class Cell:
    """What one method reached at one density of one task, by seed."""

    by_seed: dict[object, float]
    digits: int = 2

    @property
    def scores(self) -> list[float]:
        return [self.by_seed[seed] for seed in sorted(self.by_seed, key=str)]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def error(self) -> float:
        """Standard error of the mean; unknown of one seed."""
        if len(self.scores) < 2:
            return math.nan
        return statistics.stdev(self.scores) / math.sqrt(len(self.scores))

    def ahead_of(self, other: Cell) -> float:
        """Return by how much the mean is larger, over the seeds that both had."""
        common = self.by_seed.keys() & other.by_seed.keys()
        return statistics.mean(self.by_seed[s] - other.by_seed[s] for s in common) if common else 0

    def text(self, most: int) -> str:
        """Return mean ± standard error, and the number of seeds where others had more."""
        error = f" ± {self.error:.{self.digits}f}" if len(self.scores) > 1 else ""
        seeds = f" ({len(self.scores)})" if len(self.scores) < most else ""
        return f"{self.mean:.{self.digits}f}{error}{seeds}"


def cells(task: str, rows: Sequence[dict[str, object]]) -> dict[float, dict[str, Cell]]:
    """Return what there is of a task, by density and method."""
    found: dict[float, dict[str, Cell]] = {}
    for density in TASKS[task].densities:
        runs: dict[str, dict[object, float]] = {}
        for row in rows:
            if (row["task"], row["density"]) == (task, density) and row["method"] in METHODS:
                runs.setdefault(str(row["method"]), {})[row["seed"]] = float(str(row["score"]))
        if runs:
            found[density] = {m: Cell(runs[m], _digits(task)) for m in METHODS if m in runs}
    return found


def best_of(row: dict[str, Cell], bits: bool) -> tuple[str, float]:
    """Return the best method, and how far Spartan is behind it over the seeds of both."""
    sign = -1 if bits else 1
    if "spartan" not in row:
        return max(_untaught(row), key=lambda m: sign * row[m].mean), 0.0
    gaps = {m: sign * row[m].ahead_of(row["spartan"]) for m in _untaught(row)}
    best = max(gaps, key=lambda m: (gaps[m], m == "spartan"))
    return best, gaps[best]


def _untaught(row: dict[str, Cell]) -> list[str]:
    """Return the methods that may be compared: a teacher would help each of them."""
    return [method for method in row if not method.endswith(TAUGHT)]


def _digits(task: str) -> int:
    return 3 if TASKS[task].bits else 2


def table(task: str, rows: Sequence[dict[str, object]]) -> str:
    """Return the table of a task: mean ± standard error over seeds, the best of each row bold."""
    by_density = cells(task, rows)
    shown = [m for m in METHODS if any(m in row for row in by_density.values())]
    bits = TASKS[task].bits
    same = TASKS[task].dense_of or task
    dense = {
        r["seed"]: float(str(r["score"]))
        for r in rows
        if (r["task"], r["method"]) == (same, "dense")
    }
    unit = "bits per character, less is better" if bits else "accuracy in percent"
    counts = {len(cell.scores) for row in by_density.values() for cell in row.values()}
    most = max(counts)
    told = f"{most} seeds" if most > 1 else "one seed"
    told += ", or as many as are in brackets" if len(counts) > 1 else ""
    spread = Cell(dense, _digits(task)).text(0)
    title = f"**{TASKS[task].title}** ({unit}; dense {spread}; {told})"
    lines = [title, "", "| density | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for density, row in by_density.items():
        best, _ = best_of(row, bits)
        texts = []
        for method in shown:
            text = row[method].text(most) if method in row else ""
            several = len(_untaught(row)) > 1
            texts.append(f"**{text}**" if method == best and several else text)
        lines.append(f"| {100 * density:g} % | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def summary(tasks: Sequence[str], rows: Sequence[dict[str, object]]) -> str:
    """Return in words where Spartan is first, and how far behind it is elsewhere."""
    firsts, behind = 0, []
    for task in tasks:
        for density, row in cells(task, rows).items():
            if len(_untaught(row)) < 2 or "spartan" not in row:
                continue
            best, gap = best_of(row, TASKS[task].bits)
            if gap < 0.005:
                firsts += 1
            else:
                behind.append(f"{gap:.2f} ({best}; {TASKS[task].title}, {100 * density:g} %)")
    told = f"Spartan is first in {firsts} of {firsts + len(behind)} rows of several methods."
    return f"{told} In the others it is behind by {', '.join(behind)}." if behind else told


def picture(tasks: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    """Draw score against density, a line a method, axes for each task."""
    mpl.rcParams.update({"svg.hashsalt": "league", "font.size": 9})
    across = 3
    down = -(-len(tasks) // across)
    figure, grid = plt.subplots(down, across, figsize=(11, 2.9 * down), layout="constrained")
    for axes, task in zip(grid.flat, tasks, strict=False):
        by_density = cells(task, rows)
        for method in METHODS:
            points = [(d, row[method]) for d, row in by_density.items() if method in row]
            axes.errorbar(
                [100 * d for d, _ in points],
                [cell.mean for _, cell in points],
                [cell.error for _, cell in points],
                color=COLORS[method],
                linewidth=2.5 if method == "spartan" else 1.2,
                marker="o",
                markersize=3,
                zorder=3 if method == "spartan" else 2,
                label=method,
            )
        axes.set_title(TASKS[task].title, fontsize=9)
        axes.set_xlabel("density, %")
        axes.set_xscale("log")
        axes.set_xticks([100 * d for d in by_density], [f"{100 * d:g}" for d in by_density])
        axes.minorticks_off()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_ylabel("bits" if TASKS[task].bits else "accuracy, %")
        if TASKS[task].bits:
            axes.invert_yaxis()
    for axes in grid.flat[len(tasks) :]:
        axes.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None})


def write() -> None:
    """Put tables and picture into the docs."""
    rows = read()
    tasks = [task for task in TASKS if cells(task, rows)]
    picture(tasks, rows)
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    tables = "\n\n".join(table(task, rows) for task in tasks)
    PAGE.write_text(
        f"{before}{MARKS[0]}\n\n{summary(tasks, rows)}\n\n{tables}\n\n{MARKS[1]}{after}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--jobs", type=int, default=2, help="runs side by side")
    runs.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    runs.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    runs.add_argument("--seeds", type=int, default=3)
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "run":
        run_all(args)
    else:
        write()


if __name__ == "__main__":
    main()
