"""Detections of a whole validation set, gathered over processes, and their AP."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ovdet.data.annotations import read_json
from ovdet.data.dataset import TestDataset
from ovdet.data.loader import test_loader
from ovdet.evaluation.arrays import Detections, Truth
from ovdet.evaluation.coco import evaluate, evaluator_classes, format_table, write_results
from ovdet.parts.masks import encode_pasted
from ovdet.precision import choose_precision
from ovdet.results import write_metrics
from ovdet.vocabulary import Vocabulary
from training.engine.data.records import Annotations
from training.engine.distributed import Dist, from_master, gather_to_master
from training.engine.errors import UserError
from training.engine.precision import Precision
from training.engine.skips import SkipPolicy

log = logging.getLogger(__name__)

Found = list[dict[str, Tensor]]
RESULTS = ("boxes", "scores", "labels", "attributes")


def to_original(result: dict[str, Tensor], size: Sequence[int], original: Sequence[int]) -> dict[str, Tensor]:
    """Detections with their boxes in pixels of the file, clipped to it.

    Args:
        size: (height, width) of the image in the padded input; original: of the file. Their ratios differ by rounding.
    """
    factors = [original[1] / size[1], original[0] / size[0]] * 2
    bounds = [original[1], original[0]] * 2
    boxes = result["boxes"].float() * torch.tensor(factors, device=result["boxes"].device)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor(bounds, device=boxes.device, dtype=boxes.dtype))
    return {**result, "boxes": boxes}


@torch.inference_mode()
def detect(
    detector: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    device: torch.device,
    precision: Precision,
    mask_threshold: float = 0.5,
    repeat_edges: bool = False,
    forward: Callable[[Tensor, list[tuple[int, int]]], Found] | None = None,
    on_skipped: Callable[[list[tuple[str, str]], int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Detections of images, one dict each, as numpy arrays in pixels of the file.

    ``index``, ``original`` (height, width of the upright image), ``boxes`` float32 ``[N, 4]`` xyxy, ``scores``,
    ``labels``, with masks ``masks``: N run-length dicts, with attributes ``attributes``, and what else the data set
    gives of an image (``pixels``, ``crops``).

    Args:
        detector: in eval mode. ``prepare(images, sizes)`` makes its input of uint8 images, ``detector(input, sizes)``
            gives its detections in pixels of the input.
        batches: of :func:`~ovdet.data.loader.test_loader`.
        mask_threshold, repeat_edges: see :func:`ovdet.parts.masks.paste_masks`.
        forward: run in place of the detector, such as ``detector.proposals`` (no labels then).
        on_skipped: told the unusable (file, reason) pairs of a batch and the number of its usable images.
    """
    for batch in batches:
        if on_skipped is not None:
            on_skipped(batch["skipped"], len(batch["indices"]))
        if batch["images"] is None:
            continue
        sizes = batch["sizes"]
        with precision.autocast():
            images = detector.prepare(batch["images"].to(device, non_blocking=True), sizes)
            results = (forward or detector)(images, sizes)
        for i, result in enumerate(results):
            yield found_in(batch, i, result, mask_threshold=mask_threshold, repeat_edges=repeat_edges)


def found_in(
    batch: dict[str, Any], i: int, result: dict[str, Tensor], *, mask_threshold: float, repeat_edges: bool
) -> dict[str, Any]:
    """What :func:`detect` gives of the i-th image of a batch, for the detector's result in the padded input."""
    original = batch["originals"][i]
    result = to_original(result, batch["sizes"][i], original)
    found = {
        "index": batch["indices"][i],
        "original": original,
        **{key: batch[key][i] for key in ("pixels", "crops") if key in batch},
        **{key: result[key].cpu().numpy() for key in RESULTS if key in result},
    }
    if "masks" in result:
        found["masks"] = encode_pasted(
            result["masks"], result["boxes"], tuple(original), mask_threshold, repeat_edges=repeat_edges
        )
    return found


def count_skips(policy: SkipPolicy) -> Callable[[list[tuple[str, str]], int], None]:
    """For ``on_skipped`` of :func:`detect`: names and counts, and does not judge."""

    def note(skipped: list[tuple[str, str]], usable: int) -> None:
        policy.name(skipped)
        policy.count(usable, len(skipped))

    return note


class Images:
    """Images to detect on, read as a config says: this process's share of them, in batches, with a progress bar.

    Args:
        config: sections ``data``, ``train`` (the precision) and ``test`` are read.
        names: of the files; root: of the images.
        source: of the names, for messages.
        title: of the bar.
        keep_pixels: see :class:`~ovdet.data.dataset.TestDataset`.
        batches: see :func:`~ovdet.data.loader.test_loader`.

    Attributes:
        note: for ``on_skipped`` of :func:`detect`; policy: what it counts the images that cannot be used with.
    """

    def __init__(
        self,
        config: Any,
        names: Sequence[str],
        root: str,
        *,
        source: str,
        title: str,
        dist: Dist,
        keep_pixels: bool = False,
        batches: Sequence[list[int]] | None = None,
    ) -> None:
        data = config.data
        self.config, self.dist, self.title = config, dist, title
        dataset = TestDataset(
            names, root=root, image_size=data.image_size, resize=data.resize, exif=data.exif, keep_pixels=keep_pixels
        )
        self.loader = test_loader(
            dataset, batch_size=config.test.batch_size, workers=data.workers, rank=dist.rank,
            world_size=dist.world_size, pin=dist.device.type == "cuda" and not keep_pixels, batches=batches,
        )  # fmt: skip
        self.policy = SkipPolicy(source, data.max_skipped, "data.max_skipped")
        self.note = count_skips(self.policy)

    @classmethod
    def of_validation(cls, config: Any, annotations: Annotations, **more: Any) -> Images:
        """Those of the validation set."""
        root = config.locate(config.data.val_images)
        return cls(config, annotations.file_names, root, source=annotations.file, **more)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        silent = not self.dist.is_master or not len(self.loader)
        bar = tqdm(self.loader, desc=self.title, unit="batch", disable=silent, mininterval=1, dynamic_ncols=True)
        return iter(bar)

    def detections(
        self, detector: nn.Module, forward: Callable[[Tensor, list[tuple[int, int]]], Found] | None = None
    ) -> Iterator[dict[str, Any]]:
        """What :func:`detect` gives of them, as the config says."""
        test = self.config.test
        return detect(
            detector, self, device=self.dist.device,
            precision=choose_precision(self.config.train, self.dist.device, training=False),
            mask_threshold=test.mask_threshold, repeat_edges=test.mask_edges == "repeated", forward=forward,
            on_skipped=self.note,
        )  # fmt: skip


def read_truth(path: str, protocol: str, annotations: Annotations) -> Truth:
    """What detections are judged by: the annotations at hand, or the file where these do not tell all.

    LVIS's lists of absent classes and VOC's difficult objects are in the file alone, which is read once in a run; masks
    are those of the annotations.
    """
    if protocol == "coco":
        return Truth.of(annotations)
    told = _truth_of_file(path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)
    if protocol == "voc":
        return told
    truth, rows = Truth.of(annotations), {int(i): row for row, i in enumerate(told.image_ids)}
    if told.absent is not None and told.unsure is not None:
        order = [rows[int(i)] for i in truth.image_ids]
        truth.absent, truth.unsure = [told.absent[i] for i in order], [told.unsure[i] for i in order]
    return truth


@lru_cache(maxsize=1)
def _truth_of_file(path: str, changed: int) -> Truth:
    """Truth of a file as it was when it last changed, without masks."""
    truth = Truth.from_json(read_json(path, "data.val_annotations"), path)
    truth.masks = ()
    return truth


def test(
    config: Any,
    detector: nn.Module,
    annotations: Annotations,
    vocabulary: Vocabulary,
    *,
    dist: Dist,
    kinds: Sequence[str],
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    level: int = logging.INFO,
) -> dict[str, dict[str, float]]:
    """Detect on the validation set and compute AP; every process calls it and gets the metrics.

    Args:
        config: sections ``data``, ``train`` (the precision) and ``test`` are read.
        detector: see :func:`detect`.
        annotations: of the validation set; for mask AP read with their masks.
        kinds: ``"bbox"``, ``"segm"``.
        folder: where process 0 writes ``results.{kind}.json`` (COCO results) and ``metrics.json``; None: nowhere.
        about: what was tested; stands in ``metrics.json`` as ``run``, beside the kinds.
        level: of the table in the log, for a program that prints it itself.

    Raises:
        UserError: too many unusable images, masks asked of a detector or file that has none, or the package that
            computes AP is not installed.
    """
    evaluator_classes()
    if "segm" in kinds and getattr(detector, "mask_head", None) is None:
        raise UserError("--eval segm needs a detector with masks: use a config with model.masks=true, or --eval bbox")
    images = Images.of_validation(config, annotations, title="detecting", dist=dist)
    was_training = detector.training
    detector.eval()
    found = images.detections(detector)
    metrics = score(
        config, found, images.policy, annotations, vocabulary, kinds=kinds, folder=folder, about=about, level=level
    )
    detector.train(was_training)
    return metrics


test.__test__ = False


def score(
    config: Any,
    images: Iterable[dict[str, Any]],
    policy: SkipPolicy,
    annotations: Annotations,
    vocabulary: Vocabulary,
    *,
    kinds: Sequence[str],
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    level: int = logging.INFO,
) -> dict[str, dict[str, float]]:
    """AP of the detections of all processes; every process calls it with its own and gets the metrics.

    Args:
        images: as :func:`detect` gives them; policy: has counted this process's images once they are through.
        annotations, vocabulary, kinds, folder, about, level: see :func:`test`.

    Raises:
        UserError: too many unusable images.
    """
    mine = Detections.gather(images)
    parts = gather_to_master((mine, policy.usable, policy.skipped))
    outcome: dict[str, dict[str, float]] | str = {}
    if parts is not None:
        try:
            policy.reset()
            policy.count(sum(part[1] for part in parts), sum(part[2] for part in parts))
            policy.judge(at_end=True)
            found = Detections.merge([part[0] for part in parts])
            outcome = _score(config, found, annotations, vocabulary, kinds, folder, about, level)
        except UserError as error:
            outcome = str(error)
    outcome = from_master(outcome)
    if isinstance(outcome, str):
        raise UserError(outcome)
    return outcome


def _score(
    config: Any,
    found: Detections,
    annotations: Annotations,
    vocabulary: Vocabulary,
    kinds: Sequence[str],
    folder: Path | None,
    about: Mapping[str, Any] | None,
    level: int,
) -> dict[str, dict[str, float]]:
    path, protocol = config.locate(config.data.val_annotations), config.data.protocol
    truth = read_truth(path, protocol, annotations)
    novel = [name for name, is_novel in zip(vocabulary.names, vocabulary.novel, strict=True) if is_novel]
    metrics = {}
    for kind in kinds:
        if folder is not None:
            write_results(folder / f"results.{kind}.json", truth, found, kind=kind)
        metrics[kind] = evaluate(
            truth, found, kind=kind, protocol=protocol, novel=novel if len(novel) < len(vocabulary.names) else ()
        )
    if folder is not None:
        write_metrics(folder, metrics, about)
    log.log(level, "AP in %% on %s\n%s", path, format_table(metrics, protocol))
    return metrics
