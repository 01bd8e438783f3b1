"""Processes of a program, to be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A started run; its output goes to a file, so that nobody waits for a full pipe."""

    def __init__(self, command: list[str], output: Path, environment: dict[str, str]) -> None:
        self.output = output
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def errors(self) -> list[str]:
        """What the run says to its user: lines that begin with "error:". torchrun may prefix them with a time."""
        return re.findall(r"^error: .*$", self.text, re.MULTILINE)

    def wait(self, seconds: float = 240) -> int:
        """Exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run hangs; its output ends with\n{self.text[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL to every process of the run, as a machine that fails. torchrun's are in sessions of their own."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)  # no new children from here on
            for pid in [*self.descendants(), self.process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        self.process.wait()

    def descendants(self) -> list[int]:
        """All living processes below the started one."""
        parents = {}
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit():
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                    if fields[0] != "Z":
                        parents[int(entry)] = int(fields[1])
            except (FileNotFoundError, ProcessLookupError):
                pass  # ended meanwhile
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def ranks(self) -> dict[int, int]:
        """Process ids of a torchrun's training processes, by rank."""
        found = {}
        for pid in self.descendants():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            rank = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
            if rank is not None and parent == self.process.pid:
                found[rank] = pid
        return found

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait until ``condition()``; fail when the run ends before it or takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                ended = self.process.poll()
                self.kill()
                raise AssertionError(f"no {what} (exit status {ended}); output ends with\n{self.text[-3000:]}")
            time.sleep(0.005)


class Launcher:
    """Starts a program, or torchrun with it."""

    def __init__(self, program: Any, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.started: list[Run] = []
        self.environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HOME": str(folder),
                            "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # fmt: skip

    def start(self, run: str, *more: str, processes: int = 1, restarts: int = 0, script: Path | None = None,
              **options: Any) -> Run:  # fmt: skip
        """``script`` is run instead of the program, which it finds in its arguments."""
        what = self.program.entry if script is None else [str(script), *self.program.entry]
        if processes > 1 or restarts:
            what = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                    "--max-restarts", str(restarts), "--monitor-interval", "0.1",
                    *(["-m", "--", *what[1:]] if what[0] == "-m" else ["--", *what])]  # fmt: skip
        command = [sys.executable, *what, *self.program.arguments(run, *more, **options)]
        output = self.folder / f"output{len(self.started)}"
        self.started.append(Run(command, output, self.environment))
        return self.started[-1]
