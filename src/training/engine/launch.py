"""The launch of a run: what the restarts of one torchrun have in common, and no other start has.

torchrun starts its processes anew whatever they ended of, and tells them how often it did. That does not tell a run
that died from one that was refused at its first start, its folder being another experiment's; and machines may count
differently. So the folder itself says which launch has opened it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from training.engine.distributed import gather_objects, on_master
from training.engine.files import write_atomically

FILE = ".launch"
_RUN = "TORCHELASTIC_RUN_ID"  # what torchrun gives to its processes, and does not have itself


def this_launch() -> list[str]:
    """The torchrun of each machine that takes part; none without torchrun. Every process calls it."""
    return sorted(set(gather_objects(_agent())) - {""})


def sign(folder: Path, launch: list[str]) -> None:
    """Note in a folder, which must be held, that this launch has opened it. OSError when it cannot be written."""
    if launch:
        write_atomically(folder / FILE, "".join(f"{agent}\n" for agent in launch))


def opened_by(folder: Path, launch: list[str]) -> bool:
    """Whether a former start of this launch has opened a folder; process 0 looks, and every process calls it.

    One machine in common suffices: a launch may lose some, and be given others.
    """

    def look() -> bool:
        try:
            return not set(launch).isdisjoint((folder / FILE).read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):  # none, or damaged: nobody's
            return False

    return on_master(look)


def _agent() -> str:
    """The torchrun that has started this process, told from all others, earlier ones included; "" without one.

    Its id and its number are not enough: users give launches the same id, and in a container numbers recur.
    """
    run, number = os.environ.get(_RUN), os.getppid()
    if run is None:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = _stat(number)
        while f"{_RUN}=".encode() in Path(f"/proc/{number}/environ").read_bytes():  # a script that it has started
            number = int(fields[1])
            fields = _stat(number)
        began = fields[19]  # since boot
    except OSError:  # no Linux
        boot = began = "-"
    return " ".join([socket.gethostname(), boot, str(number), began, *run.split()])


def _stat(number: int) -> list[str]:
    """What Linux tells of a process, from its state on."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
