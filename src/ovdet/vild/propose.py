"""Proposals of a detector for whole data sets, and their recall."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ovdet.evaluation.arrays import Truth
from ovdet.evaluation.recall import average_recall
from ovdet.testing import Images
from ovdet.vild.config import VildConfig
from ovdet.vild.detector import Detector
from ovdet.vild.proposals import ProposalList, ProposalWriter
from ovdet.vocabulary import Vocabulary
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, barrier, from_master, gather_to_master, on_master, together

log = logging.getLogger(__name__)

RECALLS = (100, 300, 1000)  # proposals an image
MIN_SIDE = 4.0  # pixels of the image; thinner proposals are not worth a crop
NOTHING = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)


def proposal_key(config: VildConfig, weights: str, *, most: int, min_side: float) -> dict[str, Any]:
    """What proposals depend on, besides the images.

    Args:
        weights: hash of the detector's state.
    """
    data, test, model = config.data, config.test, config.model
    return {
        "detector": weights, "image_size": data.image_size, "resize": data.resize, "upright": data.exif,
        "rank": test.rank, "nms": model.rpn_nms, "before_nms": model.rpn_pre_nms_test or model.rpn_pre_nms,
        "after_nms": model.rpn_post_nms, "most": most, "min_side": min_side,
    }  # fmt: skip


def write_proposals(
    writer: ProposalWriter,
    config: VildConfig,
    detector: Detector,
    root: str,
    *,
    dist: Dist,
    most: int,
    min_side: float = MIN_SIDE,
) -> ProposalList:
    """Propose on all images of a list and open it; each process makes parts of its own, and every one must call it.

    Args:
        detector: in eval mode, on its device.
        root: of the images.
        most: proposals an image, the best; min_side: of a box, in pixels of the image.

    Raises:
        UserError: too many images cannot be read, or the disk is full or not writable.
    """
    if not from_master(writer.is_complete):
        with together():
            if dist.is_master:
                writer.create()
        barrier()
        with together():
            for part, found in _parts(writer, config, detector, root, dist, most, min_side):
                writer.write(part, found)
        on_master(lambda: writer.finish() and None)
    return ProposalList.open(writer.folder, "--out")


def _parts(
    writer: ProposalWriter, config: VildConfig, detector: Detector, root: str, dist: Dist, most: int, min_side: float
) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
    """(part, boxes and scores of its images), one after another; one loader serves them all."""
    size, parts = config.test.batch_size, writer.missing(dist.rank, dist.world_size)
    batches = [
        list(range(i, min(i + size, images.stop)))
        for images in map(writer.images_of, parts)
        for i in range(images.start, images.stop, size)
    ]
    images = Images(
        config, writer.annotations.file_names, root, source=writer.annotations.file, title="proposals", dist=dist,
        batches=batches,
    )  # fmt: skip
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the images of a part that could be read
    waiting = list(parts)
    for image in images.detections(detector, detector.proposals):
        # Images come in order: one of a later part ends those before it.
        while image["index"] >= writer.images_of(waiting[0]).stop:
            yield waiting[0], [rows.pop(i, NOTHING) for i in writer.images_of(waiting.pop(0))]
        rows[image["index"]] = best_boxes(image, most=most, min_side=min_side)
    if parts:
        images.policy.judge(at_end=True)
    for part in waiting:
        yield part, [rows.pop(i, NOTHING) for i in writer.images_of(part)]


def best_boxes(image: dict[str, Any], *, most: int, min_side: float) -> tuple[np.ndarray, np.ndarray]:
    """(boxes, scores) of an image that :func:`ovdet.testing.detect` gives: the best ``most`` that are not too thin."""
    sides = image["boxes"][:, 2:] - image["boxes"][:, :2]
    chosen = np.flatnonzero((sides >= min_side).all(1))[:most]
    return image["boxes"][chosen], image["scores"][chosen]


# -- recall -----------------------------------------------------------------------------------------------------------


def class_groups(vocabulary: Vocabulary) -> dict[str, Sequence[int]]:
    """Labels of novel, base and all classes; of all alone where none is novel."""
    novel = [i for i, own in enumerate(vocabulary.novel) if own]
    base = [i for i, own in enumerate(vocabulary.novel) if not own]
    return {"novel": novel, "base": base, "all": [*base, *novel]} if novel else {"all": base}


def recall_of(
    proposals: Callable[[int], np.ndarray], annotations: Annotations, vocabulary: Vocabulary, *, most: int
) -> dict[str, dict[str, float]]:
    """Average recall by group of classes; see :func:`ovdet.evaluation.recall.average_recall`.

    Args:
        proposals: image row -> boxes, best first; vocabulary: of ``annotations``, in the same order.
        most: proposals an image that there are; recall is given at 100, 300, 1000 as far as these are no more.
    """
    steps = [n for n in RECALLS if n < most] + [min(most, RECALLS[-1])]
    return average_recall(Truth.of(annotations), proposals, steps, class_groups(vocabulary))


def recall_on_validation(
    config: VildConfig, detector: Detector, annotations: Annotations, vocabulary: Vocabulary, *, dist: Dist
) -> dict[str, dict[str, float]]:
    """Recall of a detector's proposals on the validation images, under "proposals"; every process calls it.

    Raises:
        UserError: too many unusable images.
    """
    images = Images.of_validation(config, annotations, title="proposing", dist=dist)
    was_training = detector.training
    detector.eval()
    mine = {image["index"]: image["boxes"] for image in images.detections(detector, detector.proposals)}
    detector.train(was_training)
    with together():
        images.policy.judge(at_end=True)
    parts = gather_to_master(mine)
    values: dict[str, float] = {}
    if parts is not None:
        boxes = {index: found for part in parts for index, found in part.items()}
        found = recall_of(lambda row: boxes.get(row, NOTHING[0]), annotations, vocabulary, most=RECALLS[-1])
        values = {f"{key}_{group}": v for group, entries in found.items() for key, v in entries.items()}
        log.info("recall of proposals: %s", "  ".join(f"{k} {100 * v:.1f}" for k, v in values.items()))
    return {"proposals": from_master(values)}
