"""Everything that needs a GPU, in one command of under ten minutes: python tests/gpu/run.py

Wants torch, transformers, safetensors and accelerate with what they bring, and neither network nor data: models are
random and made where this runs. Writes bench/gpu.md. Each part runs in a process of its own, for so long at most, and
tells what it found row by row: one that fails or is stopped takes nothing else with it, and the report says so.

Without a GPU, `--shape tiny` tries the script on the CPU, with small shapes and without what needs CUDA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "safetensors", "accelerate", "numpy")
NO_GPU = 2  # what a part exits with where there is none


@dataclass(frozen=True, slots=True)
class Part:
    """A module beside this one, its title, and the seconds that it may take."""

    name: str
    title: str
    most: float


PARTS = (
    Part("checks", "Does it do what the CPU does?", 150),
    Part("together", "Two processes on one device", 90),
    Part("semi_structured", "2:4 weights in semi-structured kernels", 90),
    Part("ratios", "The ratios of `make bench`", 120),
    Part("step", "A step on a model of Llama-2-7B's shape", 600),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended, and what it told."""

    part: Part
    end: str
    told: dict[str, Any]
    failed: bool


def run_parts(parts: tuple[Part, ...], shape: str, scratch: Path, seconds: float) -> list[Outcome] | None:
    """Run `parts` in one process, for so many seconds at most. None: there is no GPU."""
    log = scratch / "log"
    command = [sys.executable, "-m", "gpu.part", *(part.name for part in parts), "--shape", shape]
    command += ["--told", str(scratch), "--scratch", str(scratch), "--until", str(time.time() + seconds)]
    path = [
        str(ROOT),
        str(ROOT / "tests"),
        str(ROOT / "tests" / "bench"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    with (
        log.open("a") as lines,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=lines, stderr=lines, start_new_session=True
        ) as process,
    ):
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
    if code == NO_GPU:
        print(last, file=sys.stderr)
        return None
    if code:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    return [_outcome(part, scratch, code, last, seconds) for part in parts]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it is still there, and those that it started: a launcher ends its own if it is asked."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _outcome(part: Part, scratch: Path, code: int | None, last: str, seconds: float) -> Outcome:
    file = scratch / f"{part.name}.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    if told.get("finished"):
        failed = len(told["failed"])
        result = f"{failed} FAILED" if failed else "Done"
        return Outcome(part, f"{result}, in {told['seconds']:.0f} s.", told, bool(failed))
    if code is None:
        return Outcome(part, f"Left: stopped, for its {seconds:.0f} s were up.", told, False)
    return Outcome(part, f"FAILED with exit code {code}: {last[:300]}", told, True)


def report(shape: str, outcomes: list[Outcome], seconds: float) -> str:
    """The report, as Markdown."""
    machine: dict[str, str] = {}
    for outcome in outcomes:
        machine = machine or outcome.told.get("machine", {})
    machine = machine | {
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "Python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "copal's commit": _ask("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "the whole run": f"{seconds:.0f} s",
    }
    lines = ["# On a GPU", "", "Written by `make gpu` (`tests/gpu/run.py`).", ""]
    if shape == "tiny":
        lines += ["**Tried with tiny shapes: nothing here says how fast anything is.**", ""]
    lines += table([{"": name, "what": value} for name, value in machine.items()])
    for outcome in outcomes:
        lines += ["", f"## {outcome.part.title}", "", outcome.end]
        for title, rows in outcome.told.get("tables", {}).items():
            lines += ["", f"{title}:", "", *table(rows)]
        for text in (*outcome.told.get("failed", ()), *outcome.told.get("notes", ())):
            lines += ["", f"- {text}"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, str]]) -> list[str]:
    """The lines of a Markdown table; a row may lack columns that others have."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "").replace("|", "\\|") for name in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _ask(*command: str) -> str:
    """What another program says."""
    if shutil.which(command[0]) is None:
        return f"not known: {command[0]} is not here"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return ", ".join(sorted(set(done.stdout.split()))) or f"not known: {' '.join(done.stderr.split())[:100]}"


def _missing() -> list[str]:
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: %(default)s)")
    parser.add_argument("--one-process", action="store_true", help="for all parts, which begins faster")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".bench", help="where models go (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: bench/gpu.md; with tiny shapes gpu.md in the scratch folder")
    asked = parser.parse_args()
    if missing := _missing():
        print(f"{sys.executable} has no {', '.join(missing)}: install that, or name another Python", file=sys.stderr)
        return 2
    out = asked.out or (ROOT / "bench" / "gpu.md" if asked.shape == "full" else asked.scratch / "gpu.md")
    began, outcomes = time.monotonic(), list[Outcome]()
    chosen = tuple(part for part in PARTS if part.name in asked.parts)
    asked.scratch.mkdir(parents=True, exist_ok=True)
    for group in (chosen,) if asked.one_process else [(part,) for part in chosen]:
        left = 60 * asked.minutes - (time.monotonic() - began)
        if left < 15:
            outcomes += [Outcome(part, "Left: no time for it.", {}, False) for part in group]
            continue
        with TemporaryDirectory(dir=asked.scratch, prefix="gpu-") as scratch:
            found = run_parts(group, asked.shape, Path(scratch), min(left, sum(part.most for part in group)))
        if found is None:
            return NO_GPU
        outcomes += found
        for outcome in found:
            print(f"{outcome.part.name}: {outcome.end}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report(asked.shape, outcomes, time.monotonic() - began), encoding="utf-8")
    print(out)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
