"""The folder of a run: whether it may be begun or gone on with, and its opening."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from training.engine.checkpoint import find_latest, peek_checkpoint, remove_unfinished
from training.engine.distributed import Dist, together
from training.engine.errors import Flags, UserError
from training.engine.files import write_atomically
from training.engine.launch import opened_by, sign, this_launch
from training.engine.lock import FolderLock

log = logging.getLogger(__name__)

RESUME = ("latest", "auto")  # besides the path of a checkpoint


def named_folder(parent: str | Path, name: str, *, flag: str = "--name") -> Path:
    """The folder of a run among others.

    Raises:
        UserError: the name leads out of the parent folder, or one of the two is empty.
    """
    if not str(parent):
        raise UserError("--logs is an empty word, which is no folder: is a shell variable unset?")
    folder = Path(parent) / name
    inside = os.path.relpath(os.path.abspath(folder), os.path.abspath(parent))
    if not name.strip() or os.path.isabs(name) or inside.split(os.sep)[0] in (os.pardir, os.curdir):
        raise UserError(f'{flag} "{name}" leads out of {parent}: give a name without ".."')
    return folder


def check_folder(folder: Path, resume: str | None, flags: Flags) -> None:
    """See, before anything is loaded or written, that the run can begin or go on.

    Args:
        folder: of the run.
        resume: None for a new run; ``"latest"``: its newest checkpoint; ``"auto"``: the same where there is a run, else
            a new one; or the path of a checkpoint.

    Raises:
        UserError: a new run in a folder that exists, ``latest`` of one that does not, or a file that is no checkpoint.
    """
    if resume is None and folder.exists():
        raise UserError(f"experiment {folder} exists: choose another {flags.name}, or go on with {flags.resume}")
    if resume == "latest" and not folder.exists():
        others = [f.name for f in folder.parent.iterdir() if f.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, others, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise UserError(f"there is no experiment {folder} to go on with: check {flags.name}{hint}")
    if resume not in (None, *RESUME):
        peek_checkpoint(Path(resume))


def resume_after_restart(folder: Path | None, resume: str | None, flags: Flags) -> str | None:
    """What to resume when torchrun may have started the processes anew; every process calls it, and all get the same.

    Args:
        folder: of the run; None where its name is made up at each start.
        resume: what the user asked for.

    Returns:
        The same at a first start, and after it where that was refused; once this launch has opened the folder
        ``"latest"``, unless there is nothing newer than the given file.

    Raises:
        UserError: restarts are asked for without a name, by which they find the run.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and folder is None:
        raise UserError(f"torchrun's --max-restarts needs {flags.name}, by which a restarted run finds its checkpoints")
    if folder is None or not opened_by(folder, this_launch()):
        return resume
    from_file = resume not in (None, *RESUME)
    return resume if from_file and find_latest(folder / "checkpoints") is None else "latest"


def open_folder(folder: Path, resume: str | None, dist: Dist, flags: Flags) -> AbstractContextManager:
    """Make a run's folder, or take it over; every process calls it, process 0 alone writes.

    What a killed save left behind is removed.

    Returns:
        A context that holds the folder: a second run on it is refused.

    Raises:
        UserError: it cannot be made, or another run is at work in it.
    """
    held: AbstractContextManager = nullcontext()
    launch = this_launch()
    with together():
        if dist.is_master:
            check_folder(folder, resume if resume in (None, *RESUME) else "auto", flags)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held = FolderLock(folder)
                sign(folder, launch)
                (folder / "checkpoints").mkdir(exist_ok=True)
                for place in (folder, folder / "checkpoints"):  # files for users lie in either
                    remove_unfinished(place)
            except OSError as error:
                held.__exit__(None, None, None)
                raise _unwritable(folder, error, flags) from error
    return held


def write_texts(folder: Path, texts: Mapping[str, str], dist: Dist, flags: Flags) -> None:
    """Write what tells of a run into its folder; every process calls it, process 0 alone writes.

    Args:
        texts: by the names of their files.

    Raises:
        UserError: it cannot be written.
    """
    with together():
        if dist.is_master:
            try:
                for name, text in texts.items():
                    write_atomically(folder / name, text)
            except OSError as error:
                raise _unwritable(folder, error, flags) from error


def _unwritable(folder: Path, error: OSError, flags: Flags) -> UserError:
    return UserError(f"{folder} cannot be written ({error.strerror}): free some space or choose another {flags.folder}")
