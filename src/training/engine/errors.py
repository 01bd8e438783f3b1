"""What goes wrong outside the program's own code, told in one line, and the exit status that it ends with."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from training.engine.signals import until_told

EXIT_DONE = 0
EXIT_USER = 2  # something for the user to mend, as for a wrong command line
EXIT_FAILED = 71  # the system around the program failed; nothing to mend in the arguments, to be resumed (EX_OSERR)
EXIT_INTERRUPTED = 75  # a signal asked for it: saved, to be resumed (EX_TEMPFAIL)
EXIT_BROKEN_OFF = 130  # Ctrl-C where nothing could be saved (128 + SIGINT)


class UserError(Exception):
    """Something the user can mend. The text is one line that names the file or flag, the value and the remedy.

    :func:`run_program` prints the text without a traceback and ends with status 2.

    Attributes:
        rank: the process that it is from, where all processes have it; None where this one alone may know of it.
    """

    def __init__(self, text: str, *, rank: int | None = None) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass(frozen=True)
class Flags:
    """What a program calls its options, for the messages of the engine."""

    resume: str = "--resume latest"
    name: str = "--name"
    folder: str = "--logs"
    batch_size: str = "--batch-size"
    accum_freq: str = "--accum-freq"
    workers: str = "--workers"
    checkpointing: str = "--grad-checkpointing"
    lr: str = "--lr"
    warmup: str = "--warmup"
    max_skipped: str = "--max-skipped"
    precision: str = "--precision"


def as_user_error(function: Callable | None = None, *args: Any, **kwargs: Any) -> Any:
    """What a library says of names, files and shapes is for the user: its errors become :class:`UserError`.

    ``as_user_error(function, ...)`` calls and gives the result; ``with as_user_error():`` translates a stretch of code.
    For set-up only: inside the training loop the same kinds of error are faults of the program.
    """
    if function is None:
        return _translated()
    with _translated():
        return function(*args, **kwargs)


# What a wrong path raises; failures of the disk itself are told by explain().
_PATHS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)


def reason_of(error: Exception) -> str:
    """What an error says, in one line; of one that the system reports, without its number and the file's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _PATHS as error:
        bare = error.filename and error.strerror  # the system's own error, without a remedy
        text = f"{error.filename}: {error.strerror}; check the path" if bare else " ".join(str(error).split())
        raise UserError(text) from error
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


# -- failures of the system: disk, memory, other processes ------------------------------------------------------------

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file has reached the largest size that is allowed",
    errno.EROFS: "the disk has become read-only",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the network disk is gone",
}
# What gloo and the rendezvous store say of a partner that is gone (plain RuntimeErrors); NCCL has errors of its own.
_PARTNER = re.compile(
    r"gloo/|Connection (closed|reset)|Broken pipe|Timed out waiting|collective operation timeout|Socket Timeout|"
    r"failed to recv|application timeout",
    re.IGNORECASE,
)
_WORKER = re.compile(r"DataLoader worker")
_MEMORY = "DefaultCPUAllocator"  # what asked, when a tensor on the CPU is too large


def explain(error: BaseException, flags: Flags | None = None) -> str | None:
    """One line on what happened and what to do; None for an error that is not of the system around the program."""
    flags = flags or Flags()
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    again = f"then go on with {flags.resume}"
    if isinstance(error, OSError) and error.errno in _DISK:
        file = f" ({error.filename})" if error.filename else ""
        return f"{_DISK[error.errno]}{file}: free some space or choose another {flags.folder}, {again}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and _MEMORY in text:
        return f"out of memory ({text}): lower {flags.batch_size}, or use {flags.checkpointing}"
    if any(c.__name__ == "TorchDynamoException" for c in type(error).__mro__):  # by name: its module loads slowly
        version = torch.__version__
        return f"the compiler of PyTorch {version} failed ({text}): leave --compile out, or use another PyTorch"
    if isinstance(error, RuntimeError) and _WORKER.search(text):
        return (
            f"a loader worker has died ({text}): most often memory ran out; lower {flags.workers} or "
            f"{flags.batch_size}, {again}"
        )
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and _PARTNER.search(text):
        return (
            f"another process of this run has died or hangs ({text}): its own message says why; "
            f"go on with {flags.resume}"
        )
    return None


def _died_worker(error: BaseException | None) -> RuntimeError | None:
    """The death of a loader worker that an error arose from. torch raises it wherever the program happens to be: inside
    a save it looks like a file that cannot be written."""
    while error is not None and not (isinstance(error, RuntimeError) and _WORKER.search(str(error))):
        error = error.__context__
    return error


def run_program(main: Callable[[], int | None], flags: Flags | None = None) -> int:
    """Run a program's main function and give its exit status; every command of the project ends through here.

    Status 0: done; 2: a :class:`UserError`; 71: the system failed (a full disk, a process that died); 75: interrupted
    and saved; 130: Ctrl-C. 2 and 71 are explained in one line; any other failure is a traceback.
    """
    with until_told():
        return _run(main, flags)


def _run(main: Callable[[], int | None], flags: Flags | None) -> int:
    orderly = True
    try:
        return main() or EXIT_DONE
    except KeyboardInterrupt:
        return EXIT_BROKEN_OFF
    except Exception as raised:
        error, rank = _died_worker(raised) or raised, int(os.environ.get("RANK", "0"))
        if isinstance(error, UserError):
            if _is_to_tell(error, rank):
                own = rank and error.rank is None and dist.is_initialized()
                print(f"error: process {rank}: {error}" if own else f"error: {error}", file=sys.stderr, flush=True)
            return EXIT_USER
        reason = explain(error, flags)
        if reason is None:
            raise
        orderly = False
        # Every process speaks for itself: it may be the only one that knows. Process 0 may have left a progress bar.
        print(f"\nerror: process {rank}: {reason}" if rank else f"error: {reason}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    finally:
        _end_workers()
        if orderly and dist.is_initialized():  # leaving the group in an orderly way needs the others
            dist.destroy_process_group()


def _is_to_tell(error: UserError, rank: int) -> bool:
    """Whether this process prints an error: of those that have it, one does."""
    if error.rank is not None:  # all have it
        return rank == 0
    if not dist.is_initialized():  # a wrong flag, too few GPUs: all processes of a machine find the same
        return os.environ.get("LOCAL_RANK", str(rank)) == "0"
    # Whether others have it nobody knows, and they cannot be asked: the first one to say it tells it.
    said = f"error {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')} {error}"
    try:
        return dist.distributed_c10d._get_default_store().add(said, 1) == 1
    except Exception:  # the store has gone with process 0: better twice than not at all
        return True


def _end_workers() -> None:
    """End loader processes that an error left behind: they outlive a SIGTERM on purpose, and Python waits for them."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for child in children:
        child.kill()
        child.join()
