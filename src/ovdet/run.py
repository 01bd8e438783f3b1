"""A training run of a detector: everything is read and checked before anything is written."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ovdet.config import config_to_dict, format_config
from ovdet.data.annotations import load
from ovdet.data.dataset import TrainDataset, ViewOptions
from ovdet.evaluation.coco import evaluator_classes
from ovdet.files import FORMAT, detector_content
from ovdet.precision import choose_precision
from ovdet.task import FLAGS, DetectionTask, loop_options
from ovdet.testing import test
from ovdet.vocabulary import Vocabulary, make_vocabulary
from training.engine.checkpoint import read_file, seed_generators
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, together
from training.engine.errors import Flags, UserError
from training.engine.folder import open_folder, resume_after_restart
from training.engine.journal import setup_logging
from training.engine.loop import Loop, Task

log = logging.getLogger(__name__)

T = TypeVar("T", bound=DetectionTask)
Validate = Callable[[nn.Module, Path], dict[str, dict[str, float]]]


class RunData(NamedTuple):
    """What a detector is trained on, what it is tested on (None: nothing), and the classes of both."""

    training: Annotations
    validation: Annotations | None
    vocabulary: Vocabulary


def open_data(config: Any) -> RunData:
    """The data sets of a config; every process calls it. UserError where one is missing or cannot be used."""
    data, masks = config.data, config.model.masks
    training = load(config, "train", masks=masks, images=True)
    validation = None
    if data.val_annotations:
        validation = load(config, "val", masks=masks, images=config.train.eval_every > 0)
    return RunData(training, validation, make_vocabulary(config, validation or training))


def sample_settings(config: Any) -> dict[str, Any]:
    """How a config makes training samples: arguments of :class:`~ovdet.data.dataset.TrainDataset`."""
    data = config.data
    options = ViewOptions(
        image_size=data.image_size, jitter=tuple(data.jitter), flip=data.flip, whole_target=data.whole_target,
        resize=data.resize, exif=data.exif, mask_centres=data.mask_centres, min_box_side=data.min_box_side,
        replace_thin=data.replace_thin,
    )  # fmt: skip
    return {
        "root": config.locate(data.train_images), "options": options, "keep_empty": data.keep_empty,
        "min_image_side": data.min_image_side, "min_object_side": data.min_object_side, "seed": config.train.seed,
        "masks": config.model.masks,
    }  # fmt: skip


def ap_on_validation(config: Any, data: RunData, dist: Dist) -> Validate:
    """AP of boxes and, of a config with masks, of masks; see :func:`ovdet.testing.test`.

    Raises:
        UserError: the run is to compute AP, and the package that does is not installed.
    """
    if data.validation is not None and config.train.eval_every:
        evaluator_classes()  # not after the first epoch
    kinds = ["bbox", "segm"] if config.model.masks else ["bbox"]

    def validate(detector: nn.Module, place: Path) -> dict[str, dict[str, float]]:
        return test(config, detector, data.validation, data.vocabulary, dist=dist, kinds=kinds, folder=place)

    return validate


def check_objects(dataset: TrainDataset) -> None:
    """See that samples will hold objects. UserError where each is lost, see :attr:`TrainDataset.lost`."""
    wanted = dataset.wanted & dataset.annotations.has_mask() if dataset.masks else dataset.wanted
    if not wanted.any():
        reasons = ", ".join(f"{number} x {reason}" for reason, number in dataset.lost.items())
        raise UserError(
            f"data.train_annotations {dataset.annotations.file}: no object can be learned ({reasons}); mend the file, "
            "or change data.min_object_side or model.masks"
        )


def classes_in_short(vocabulary: Vocabulary) -> str:
    """A vocabulary in a few words that tell it from any other: how many classes, how many novel, and a fingerprint."""
    told = json.dumps([vocabulary.names, [bool(new) for new in vocabulary.novel]])
    digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
    return f"{len(vocabulary.names)}, {sum(vocabulary.novel)} of them novel ({digest})"


def build_task(
    kind: type[T],
    detector: nn.Module,
    dataset: TrainDataset,
    config: Any,
    dist: Dist,
    folder: Path,
    *,
    validate: Validate | None,
    identity: dict[str, Any],
    vit: dict[str, str],
    vocabulary: Vocabulary,
    form: str = FORMAT,
) -> T:
    """The task of a run, whose detector files hold the config as it is now.

    Args:
        kind: of task; detector, dataset, dist, folder, identity: see :class:`~ovdet.task.DetectionTask`.
        validate: (detector, folder for results) -> metrics by kind; None where there is no validation set.
        vit, vocabulary, form: ``vit``, ``names`` with ``novel``, and ``kind`` of :func:`ovdet.files.detector_content`.
    """
    check_objects(dataset)
    values = config_to_dict(config)

    def content() -> dict[str, Any]:
        return detector_content(
            task.detector, vit=vit, config=values, names=vocabulary.names, novel=vocabulary.novel, kind=form
        )

    task = kind(
        detector, dataset, data=config.data, train=config.train, dist=dist, content=content,
        validate=None if validate is None else lambda place: validate(task.detector, place), folder=folder,
        identity=identity | {"the classes": classes_in_short(vocabulary)},
        options={f"{section}.{key}": value for section, part in values.items() for key, value in part.items()},
    )  # fmt: skip
    return task


def train(
    make_task: Callable[[Any, Dist, Path], Task],
    config: Any,
    dist: Dist,
    folder: Path,
    *,
    resume: bool = False,
    max_steps: int = 0,
    save_every_steps: int = 0,
    check: Callable[[Path, str | None], None] | None = None,
    flags: Flags = FLAGS,
) -> int:
    """One training run. Its folder holds ``config.toml``, ``train.log``, ``tensorboard/``, ``checkpoints/`` to resume
    from, and files for users: of a :class:`~ovdet.task.DetectionTask` small ``latest.pt`` and ``epoch_N.pt``.

    Args:
        make_task: (config, dist, folder) to what trains; every process calls it, and it may raise UserError.
        config: sections ``train`` and ``data`` are read.
        resume: go on from the newest checkpoint, where there is one.
        max_steps, save_every_steps: see :func:`ovdet.task.loop_options`.
        check: in place of :func:`check_former`.
        flags: what the program calls its options.

    Returns:
        Exit status: 0 done, 75 interrupted and saved.

    Raises:
        UserError: faulty input, before anything is written.
    """
    start = resume_after_restart(folder, "latest" if resume else None, flags)
    with together():
        (check or check_former)(folder, start)
    seed_generators(config.train.seed + dist.rank)
    precision = choose_precision(config.train, dist.device, training=True)
    loop = Loop(
        make_task(config, dist, folder),
        loop_options(config.train, config.data, max_steps=max_steps, save_every_steps=save_every_steps, flags=flags),
        dist=dist, precision=precision,
    )  # fmt: skip
    # A folder without a run in it is as good as none.
    with open_folder(folder, "auto", dist, flags):
        setup_logging(dist.rank, folder / "train.log" if dist.is_master else None)
        log.info("%s on %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name)
        return loop.train(folder, start, texts={"config.toml": format_config(config)})


def check_former(folder: Path, start: str | None) -> None:
    """See that a folder holds no run that would be lost, or that cannot go on.

    Args:
        start: what to go on from; None for a new run.

    Raises:
        UserError: it does.
    """
    if start is None and any((folder / "checkpoints").glob("epoch_*.pt")):
        raise UserError(f"--work-dir {folder} holds a run already: give --resume to go on with it, or another folder")
    former = folder / "latest.pt"
    if former.is_file() and not (folder / "checkpoints").is_dir():
        content = read_file(former)
        if isinstance(content, dict) and "progress" in content:
            raise UserError(
                f"--work-dir {folder} holds a run of a former version, which cannot go on: its detector {former} can "
                "be tested and used; train in another folder"
            )
