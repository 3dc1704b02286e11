"""python -m benchmarks.default_run

Runs the README's training command in a fresh workdir and prints a Markdown table of its
minutes, memory and scores. Data and compiled programs are made anew too, as on a fresh
machine; --warm takes those that are cached. Linux only (it reads /proc).
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks import common


def tree_rss(root: int) -> int:
    """Resident bytes of process `root` and all its descendants."""
    parents, pages = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command's name is in parentheses and may hold spaces.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        pid = int(entry.name)
        parents[pid], pages[pid] = int(fields[1]), int(fields[21])
    total = 0
    for pid, count in pages.items():
        ancestor = pid
        while ancestor not in (root, 0):
            ancestor = parents.get(ancestor, 0)
        total += count if ancestor == root else 0
    return total * os.sysconf("SC_PAGE_SIZE")


class PeakMemory(threading.Thread):
    """Looks at a process tree four times a second and keeps the maximum."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak, self._pid, self._done = 0, pid, threading.Event()

    def run(self):
        while not self._done.wait(0.25):
            self.peak = max(self.peak, tree_rss(self._pid))

    def stop(self) -> int:
        """Ends the thread; returns the peak in bytes."""
        self._done.set()
        self.join()
        return self.peak


def found(pattern: str, text: str) -> list[tuple[str, str]]:
    """(stage, number) of each line of the log that has one."""
    return re.findall(pattern, text, re.MULTILINE)


def rows(log: str, report: dict, wall: float, peak: int) -> list[tuple[str, str]]:
    """What the table says, from the log and from report.json."""
    table = [
        ("wall time", f"{wall / 60:.1f} min"),
        ("peak memory", f"{peak / 1e9:.2f} GB"),
    ]
    for stage, number in found(r"^(\w+): first step ([\d.]+) s", log):
        table.append((f"first step after the start ({stage})", f"{number} s"))
    for stage, number in found(r"^(\w+): compiled in ([\d.]+) s", log):
        table.append((f"compilation ({stage})", f"{number} s"))
    for name, scores in report.items():
        for key, value in scores.items():
            shown = f"{value:.1%}" if key.startswith("top") else f"{value:.4g}"
            table.append((f"{name}: {key}", shown))
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=common.default_config())
    parser.add_argument("--workdir", help="a folder that is not there yet")
    parser.add_argument("--warm", action="store_true", help="use cached data, programs")
    args, overrides = parser.parse_known_args()
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="ldm_jax_run_"))
    workdir = pathlib.Path(args.workdir or scratch / "run")
    if workdir.exists():
        parser.error(f"--workdir: {workdir} is there; name a new one")
    environment = dict(os.environ)
    if not args.warm:
        environment["LDM_JAX_DATA"] = str(scratch / "data")
        environment["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "xla")
    command = [sys.executable, "-u", "-m", "ldm_jax.train", f"--config={args.config}"]
    command += [f"--workdir={workdir}", *overrides]

    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    memory = PeakMemory(process.pid)
    memory.start()
    lines = []
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line)
    code = process.wait()
    wall, peak = time.monotonic() - began, memory.stop()
    for folder in ("data", "xla"):
        shutil.rmtree(scratch / folder, ignore_errors=True)
    if code:
        sys.exit(code)

    report = json.loads((workdir / "report.json").read_text())
    print(f"\n`{' '.join(['python', *command[2:]])}`\n")
    print(common.environment("flax", "optax", "tensorflow-cpu") + "\n")
    print("| Measure | Value |\n| --- | --- |")
    for name, value in rows("".join(lines), report, wall, peak):
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
