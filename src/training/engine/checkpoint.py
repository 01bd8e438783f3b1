"""Checkpoints: written whole or not at all, verified when read, and enough to go on exactly."""

from __future__ import annotations

import hashlib
import logging
import random
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.engine import shards
from training.engine.distributed import gather_objects, on_master, together
from training.engine.errors import Flags, UserError
from training.engine.files import read_file, save_atomically

__all__ = [
    "Checkpoints",
    "by_age",
    "find_latest",
    "peek_checkpoint",
    "prune",
    "random_state",
    "read_checkpoint",
    "read_file",
    "remove_unfinished",
    "restore_random_state",
    "save_atomically",
    "seed_generators",
    "warn_of_student",
    "weights_hash",
]

log = logging.getLogger(__name__)

STEP_CHECKPOINTS = 2  # checkpoints inside an epoch that are kept: the newest, and one in case it is damaged
NEEDED = ("epoch", "step", "state_dict", "optimizer")  # of a training checkpoint
_SHARE = "choose a folder on a disk that all machines share"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint; see :func:`~training.engine.files.read_file`.

    Of a sharded one (a folder) the small part; each process verifies its share of the files, and all must call it.

    Raises:
        UserError: missing, damaged, or no training checkpoint.
    """
    if path.is_dir():
        content = shards.read_meta(path)
        shards.verify(path, content)
        return content
    content = read_file(path)
    _check_kind(content, path)
    return content


def mapped_checkpoint(path: Path) -> dict[str, Any] | None:
    """Content of a training checkpoint, its tensors read from disk when they are used; None for any other file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of a dozen kinds; whoever reads the file as a whole says what is wrong
        return None
    return content if isinstance(content, dict) and all(k in content for k in NEEDED) else None


def warn_of_student(path: str | Path) -> None:
    """Say in the log that a file holds the student alone, where its run releases an ensemble with its start model."""
    content = mapped_checkpoint(Path(path)) if Path(path).is_file() else None
    alpha = (content or {}).get("args", {}).get("alpha", 1.0)
    if alpha < 1:
        log.warning(
            "%s is a training checkpoint, which holds the student alone; its run releases %g x student + %g x start "
            "model as clipself.pt (tools/ensemble_weights.py makes it of this file)", path, alpha, 1 - alpha,
        )  # fmt: skip


def peek_checkpoint(path: Path) -> None:
    """See, without reading it all, that a file is a training checkpoint; damage inside it shows when it is read.

    Raises:
        UserError: as :func:`read_checkpoint`.
    """
    if path.is_dir():
        shards.read_meta(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # of a dozen kinds; reading it as a whole says what is wrong
            content = read_file(path)
        _check_kind(content, path)
    else:
        read_file(path)


def _check_kind(content: Any, path: Path) -> None:
    missing = [k for k in NEEDED if not isinstance(content, dict) or k not in content]
    if missing:
        weights = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
        hint = "; it holds released weights: start from them instead" if weights else ""
        raise UserError(
            f"checkpoint {path} has no {', '.join(missing)}: it is no training checkpoint of this program{hint}"
        )


def remove_unfinished(folder: Path) -> None:
    """Delete what is left of a file, or folder, when the process is killed while it writes; put back what was there."""
    shards.put_back(folder)
    for path in [*folder.glob(".*.pt.*"), *folder.glob(f".*{shards.SUFFIX}.*")]:
        if path.suffix[1:].isdigit():
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def written_at(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970, by what it says: a copy's own time may be another."""
    try:
        content = shards.read_meta(path) if path.is_dir() else mapped_checkpoint(path)
    except UserError:  # damaged
        content = None
    return float((content or {}).get("written") or path.stat().st_mtime)


def checkpoints_in(folder: Path, pattern: str) -> list[Path]:
    """Checkpoints of a folder, in no order.

    Args:
        pattern: of their names, without suffix.
    """
    files = [f for f in folder.glob(f"{pattern}.pt") if f.is_file()]
    return files + [f for f in folder.glob(f"{pattern}{shards.SUFFIX}") if f.is_dir()]


def by_age(folder: Path, pattern: str) -> list[Path]:
    """Checkpoints of a folder, newest first; see :func:`checkpoints_in`."""
    return sorted(checkpoints_in(folder, pattern), key=lambda f: (written_at(f), f.name), reverse=True)


def find_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Newest complete checkpoint of a folder with its content; damaged ones are passed over with a warning.

    Every process calls it. Process 0 says which ones there are, and which are damaged: each for itself might see a
    folder of a network disk as it was, or fail to read for a moment, and go on from another one than the rest.

    Raises:
        UserError: a process cannot read what process 0 can.
    """
    for path in on_master(lambda: by_age(folder, "epoch_*")):
        try:
            with together():
                return path, read_checkpoint(path)
        except UserError as error:
            if error.rank:
                raise UserError(f"{error}; process 0 can read it: {_SHARE}", rank=error.rank) from None
            log.warning("%s", error)
    return None


def prune(folder: Path, keep: int, pattern: str, *, spare: Path | None = None) -> None:
    """Delete all but the ``keep`` newest checkpoints whose names (without suffix) match a pattern, and ``spare``."""
    for path in by_age(folder, pattern)[keep:]:
        if path != spare:
            remove(path)


# -- random states ----------------------------------------------------------------------------------------------------


def seed_generators(seed: int) -> None:
    """Seed Python's and numpy's global generators, so that whatever draws from them is the same in each run."""
    random.seed(seed)
    np.random.seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of this process's generators, as plain values that load without unpickling code."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set this process's generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# -- the files of a run -----------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run's folder: ``checkpoints/epoch_N.pt`` after epochs, ``epoch_N_step_M.pt`` inside them.

    Args:
        folder: of the run.
        keep: newest checkpoints of whole epochs to keep; 0: all.
        flags: what the program calls its options, for messages.

    Attributes:
        last: path of the newest checkpoint that this process knows of, or "none"; for messages.
    """

    def __init__(self, folder: Path, *, keep: int = 0, flags: Flags | None = None) -> None:
        self.run, self.folder, self.keep, self.flags = folder, folder / "checkpoints", keep, flags or Flags()
        self.last = "none"
        self._written: float | None = None  # when the newest was written; None: nobody has looked

    def write(self, name: str, content: dict[str, Any], *, write: bool = True) -> None:
        """Write a checkpoint.

        Args:
            write: False on processes that only take note.
        """
        path = self.folder / name
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_atomically(self._dated(content), path, self.flags.folder)
        self.last = str(path)

    def write_shards(self, name: str, content: dict[str, Any], tensors: dict[str, Tensor], *, rank: int) -> None:
        """As :meth:`write`, with all large tensors apart, of which each process has a part; every process calls it."""
        path = (self.folder / name).with_suffix(shards.SUFFIX)
        dated = self._dated(content) if rank == 0 else content  # process 0 writes it
        shards.write_shards(path, tensors, dated, rank=rank, folder_flag=self.flags.folder)
        self.last = str(path)

    def _dated(self, content: dict[str, Any]) -> dict[str, Any]:
        """Content with the time of day; of a clock that has been set back, a time after all other checkpoints, lest the
        newest one be taken for the oldest."""
        if self._written is None:
            self._written = max(map(written_at, checkpoints_in(self.folder, "epoch_*")), default=0.0)
        self._written = max(time.time(), self._written + 1e-3)
        return content | {"written": self._written}

    def release(self, releases: dict[str, dict[str, Any]]) -> None:
        """Write the files for users: path below the run's folder -> content."""
        for place, release in releases.items():
            save_atomically(release, self.run / place, self.flags.folder)

    def find(self, resume: str | Path) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, with its content: the folder's newest (``"latest"``, ``"auto"``; None if
        there is none) or a file. The same on every process.

        Raises:
            UserError: the file is missing, damaged, no training checkpoint, or not the same file on all machines.
        """
        if resume in ("latest", "auto"):
            found = find_latest(self.folder)
            if found is None:
                log.warning("no complete checkpoint in %s: the run starts from the beginning", self.folder)
                return None
        else:
            with together():
                found = Path(resume), read_checkpoint(Path(resume))
        path, content = found
        seen = gather_objects([content["epoch"], content["step"], content.get("written")])
        for rank, (epoch, step, _) in enumerate(seen):
            if seen[rank] != seen[0]:
                raise UserError(
                    f"checkpoint {path} is another file on process {rank} (epoch {epoch}, step {step}) than on process "
                    f"0 (epoch {seen[0][0]}, step {seen[0][1]}): {_SHARE}", rank=rank,
                )  # fmt: skip
        self.last = str(path)
        return found

    @property
    def inside_epoch(self) -> bool:
        """Whether the newest checkpoint is one inside an epoch."""
        return "_step_" in Path(self.last).name

    def prune_inside_epoch(self) -> None:
        """Of the checkpoints inside epochs keep the newest few."""
        prune(self.folder, STEP_CHECKPOINTS, "epoch_*_step_*", spare=Path(self.last))

    def prune_after_epoch(self) -> None:
        """The epoch's own checkpoint is there: those inside it go, and of whole epochs all but the newest ``keep``."""
        prune(self.folder, 0, "epoch_*_step_*")
        if self.keep:
            prune(self.folder, self.keep, "epoch_[0-9]*", spare=Path(self.last))
