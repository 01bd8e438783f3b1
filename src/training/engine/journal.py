"""Messages to the terminal and the experiment's log file; scalars and pictures to TensorBoard; results.json."""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from training.engine.distributed import together
from training.engine.errors import UserError
from training.engine.files import write_atomically

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


class _Terminal(logging.StreamHandler):
    """Prints above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # a terminal that has gone must not end a run
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that cannot be written to (a full disk) is said once, in one line; the run does not end of it."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"warning: {self.baseFilename} cannot be written ({error.strerror})", file=sys.stderr)


def setup_logging(rank: int, file: Path | None = None) -> None:
    """Process 0 reports what happens, the others only warnings (with their number). ``file`` is appended to."""
    root = logging.getLogger()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in list(root.handlers):
        if getattr(handler, "of_training", False):
            root.removeHandler(handler)
            handler.close()
    text = _FORMAT if rank == 0 else _FORMAT.replace("%(message)s", f"[process {rank}] %(message)s")
    handlers: list[logging.Handler] = [_Terminal()]
    if file is not None:
        handlers.append(_LogFile(file))
    for handler in handlers:
        handler.of_training = True
        handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
        root.addHandler(handler)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


REPORTS = ("tensorboard", "wandb", "none")
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_report(report_to: str) -> None:
    """See that what sends scalars there is installed; for programs, before they write anything.

    Args:
        report_to: one of :data:`REPORTS`.

    Raises:
        UserError: it is not.
    """
    try:
        if report_to in _MODULES:
            importlib.import_module(_MODULES[report_to])
    except ImportError as error:
        raise UserError(
            f"--report-to {report_to}: {report_to} is not installed ({error}); pip install {report_to}, or give "
            "--report-to none"
        ) from error


class _Wandb:
    """Scalars to Weights & Biases, with the calls of a SummaryWriter. The run is named after the folder.

    Raises:
        UserError: wandb begins no run.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        import wandb

        try:
            # The same id for every start of a run, so that a resumed one goes on in its own curves.
            self.run = wandb.init(
                dir=str(folder), name=folder.name, id=folder.name, resume="allow" if resumed else None,
                project=os.environ.get("WANDB_PROJECT", "clipself"),
            )  # fmt: skip
        except Exception as error:  # no key, no network, a folder that cannot be written: wandb has kinds of its own
            raise UserError(
                f"--report-to wandb: {' '.join(str(error).split())}; mend it, or give --report-to tensorboard"
            ) from error

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One value of one step; W&B gathers those of a step."""
        self.run.log({name: value}, step=step)

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        """A picture uint8 ``[3, H, W]`` of one step."""
        import wandb

        self.run.log({name: wandb.Image(picture.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


class Journal:
    """Scalars and ``results.json`` of one experiment; does nothing on processes other than 0.

    Every process makes its own, at the same time: where process 0 cannot, all raise.

    Args:
        folder: the experiment's; None for a journal that keeps nothing.
        keep_until: records of later optimizer steps (of a run that was resumed from before them) are dropped.
        report_to: where scalars go: one of :data:`REPORTS`.

    Raises:
        UserError: scalars cannot go there.
    """

    def __init__(self, folder: Path | None, keep_until: int | None = None, report_to: str = "tensorboard") -> None:
        self.folder, self.writer, self.records = folder, None, []
        with together():
            if folder is not None:
                self._open(folder, keep_until, report_to)

    def _open(self, folder: Path, keep_until: int | None, report_to: str) -> None:
        check_report(report_to)
        if report_to == "wandb":
            self.writer = _Wandb(folder, resumed=keep_until is not None)
        elif report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until)
        if (folder / "results.json").is_file():
            self.records = json.loads((folder / "results.json").read_text())
        if keep_until is not None:
            self.records = [r for r in self.records if r["step"] <= keep_until]

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Scalars by tag."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def pictures(self, values: dict[str, Tensor], step: int) -> None:
        """Pictures uint8 ``[3, H, W]`` by tag."""
        if self.writer is not None:
            for name, picture in values.items():
                self.writer.add_image(name, picture, step)

    def result(self, record: dict[str, Any]) -> None:
        """Append a record (``epoch``, ``step``, metrics) to results.json; one of the same step and kind is replaced."""
        if self.folder is None:
            return
        same = ("step", "kind")
        self.records = [r for r in self.records if any(r.get(k) != record.get(k) for k in same)] + [record]
        write_atomically(self.folder / "results.json", json.dumps(self.records, indent=1) + "\n")

    def knows(self, step: int) -> bool:
        """Whether there is a record of this step."""
        return any(record["step"] == step for record in self.records)

    def close(self) -> None:
        """Flush to disk; on a full disk the last scalars are lost, with a warning."""
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                log.warning("the last TensorBoard scalars cannot be written (%s)", error.strerror)


@dataclass
class Pace:
    """Sums since the last line of the log, so that a line shows means: one slow step says little.

    Attributes:
        steps, samples: done; samples of all processes.
        waiting, whole: seconds spent waiting for data, and in all.
    """

    steps: int = 0
    samples: float = 0.0
    waiting: float = 0.0
    whole: float = 0.0

    def add(self, samples: float, waiting: float, whole: float) -> None:
        """Count one optimizer step."""
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.waiting, self.whole = self.waiting + waiting, self.whole + whole

    @property
    def samples_per_second(self) -> float:
        """Of all processes together."""
        return self.samples / max(self.whole, 1e-9)

    def scalars(self) -> dict[str, float]:
        """Means by TensorBoard tag."""
        return {
            "train/images_per_second": self.samples_per_second,
            "train/data_time": self.waiting / self.steps,
            "train/step_time": self.whole / self.steps,
        }

    def text(self, steps_left: int) -> str:
        """For a line of the log, with the time that the remaining steps will take."""
        step = self.whole / self.steps
        left = datetime.timedelta(seconds=round(steps_left * step))
        speed = f"{self.samples_per_second:.1f} images/s"
        return f"{speed}  data {self.waiting / self.steps:.3f} s  step {step:.3f} s  left {left}"
