"""A training run of F-ViT: everything is read and checked before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path

from ovdet import files
from ovdet.config import config_to_dict, format_config
from ovdet.data.annotations import check_image_root, load
from ovdet.data.dataset import TrainDataset, ViewOptions
from ovdet.fvit.assemble import load_vit, make_detector
from ovdet.fvit.config import FViTConfig
from ovdet.precision import choose_precision
from ovdet.task import FLAGS, DetectionTask, loop_options
from ovdet.testing import test
from ovdet.vocabulary import Vocabulary, make_vocabulary, training_labels
from training.engine.checkpoint import read_file, remove_unfinished
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, together
from training.engine.errors import UserError
from training.engine.folder import open_folder, resume_after_restart
from training.engine.journal import setup_logging
from training.engine.loop import Loop

log = logging.getLogger(__name__)


def make_dataset(config: FViTConfig, annotations: Annotations, vocabulary: Vocabulary) -> TrainDataset:
    """Training samples of a config. UserError where nothing is left to train on."""
    data = config.data
    options = ViewOptions(
        image_size=data.image_size, jitter=tuple(data.jitter), flip=data.flip, whole_target=data.whole_target,
        resize=data.resize, exif=data.exif, mask_centres=data.mask_centres, min_box_side=data.min_box_side,
        replace_thin=data.replace_thin,
    )  # fmt: skip
    return TrainDataset(
        annotations, labels=training_labels(annotations, vocabulary), root=config.locate(data.train_images),
        options=options, keep_empty=data.keep_empty, min_image_side=data.min_image_side,
        min_object_side=data.min_object_side, seed=config.train.seed, masks=config.model.masks,
    )  # fmt: skip


def make_task(config: FViTConfig, dist: Dist, folder: Path) -> DetectionTask:
    """What a run trains, evaluates and writes; every process calls it.

    Raises:
        UserError: whatever is missing or does not fit.
    """
    data = config.data
    with together():
        training = load(config, "train", masks=config.model.masks)
        check_image_root(training, config.locate(data.train_images), key="data.train_images")
        validation = load(config, "val", masks=config.model.masks) if data.val_annotations else None
        if validation is not None and config.train.eval_every:
            check_image_root(validation, config.locate(data.val_images), key="data.val_images")
        vocabulary = make_vocabulary(config, validation or training)
        dataset = make_dataset(config, training, vocabulary)
        vit = load_vit(config)
    detector = make_detector(config, vit, vocabulary, device=dist.device, progress=dist.is_master)
    values = config_to_dict(config)

    def content() -> dict:
        return files.detector_content(
            task.detector, vit=vit.identity, config=values, names=vocabulary.names, novel=vocabulary.novel
        )

    def validate(place: Path) -> dict[str, dict[str, float]]:
        kinds = ["bbox", "segm"] if config.model.masks else ["bbox"]
        return test(config, task.detector, validation, vocabulary, dist=dist, kinds=kinds, folder=place)

    identity = {"the ViT": vit.identity["name"], "its weights": vit.identity["hash"], "train.seed": config.train.seed}
    task = DetectionTask(
        detector, dataset, data=data, train=config.train, dist=dist, content=content,
        validate=validate if validation is not None else None, folder=folder, identity=identity,
        options={f"{section}.{key}": value for section, part in values.items() for key, value in part.items()},
    )  # fmt: skip
    del vit.model.text  # it has done its work
    return task


def train(
    config: FViTConfig,
    dist: Dist,
    folder: Path,
    *,
    resume: bool = False,
    max_steps: int = 0,
    save_every_steps: int = 0,
) -> int:
    """One training run. Its folder holds ``config.toml``, ``train.log``, ``tensorboard/``, ``checkpoints/`` to resume
    from, and small detector files ``latest.pt`` and ``epoch_N.pt``.

    Args:
        resume: go on from the newest checkpoint, where there is one.
        max_steps, save_every_steps: see :func:`ovdet.task.loop_options`.

    Returns:
        Exit status: 0 done, 75 interrupted and saved.

    Raises:
        UserError: faulty input, before anything is written.
    """
    start = resume_after_restart(folder, "latest" if resume else None, FLAGS)
    with together():
        check_former(folder, start)
    precision = choose_precision(config.train, dist.device, training=True)
    loop = Loop(
        make_task(config, dist, folder),
        loop_options(config.train, config.data, max_steps=max_steps, save_every_steps=save_every_steps),
        dist=dist, precision=precision,
    )  # fmt: skip
    # A folder without a run in it is as good as none.
    with open_folder(folder, "auto", dist, FLAGS, {"config.toml": format_config(config)}):
        if dist.is_master:
            remove_unfinished(folder)  # detector files that a killed run was writing
        setup_logging(dist.rank, folder / "train.log" if dist.is_master else None)
        log.info("%s on %d process(es) on %s, precision %s", folder, dist.world_size, dist.device, precision.name)
        return loop.train(folder, start)


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
