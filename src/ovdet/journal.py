"""Messages to the terminal and the log file, scalars to TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path

from tqdm import tqdm


class _Terminal(logging.StreamHandler):
    """Prints above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # a terminal that has gone must not end a run
            self.handleError(record)


def setup_logging(rank: int, file: Path | None = None) -> None:
    """Process 0 reports what happens, the others only warnings, with their number. ``file`` is appended to."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in list(root.handlers):
        if getattr(handler, "of_fvit", False):
            root.removeHandler(handler)
            handler.close()
    text = "%(asctime)s %(levelname).1s " + ("" if rank == 0 else f"[process {rank}] ") + "%(message)s"
    handlers: list[logging.Handler] = [_Terminal()]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.of_fvit = True
        handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
        root.addHandler(handler)


class Scalars:
    """TensorBoard scalars of a run; keeps nothing when the folder is None.

    Args:
        resume_at: scalars of this step and later ones, of a run that was resumed from before them, are dropped.
    """

    def __init__(self, folder: Path | None, resume_at: int = 0) -> None:
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at or None)

    def add(self, values: dict[str, float], step: int) -> None:
        """Scalars by tag."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush to disk."""
        if self.writer is not None:
            self.writer.close()
