"""Detections of a whole validation set, gathered over processes, and their AP."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from open_clip.transform import normalize
from ovdet.data.annotations import Annotations
from ovdet.data.dataset import TestDataset
from ovdet.data.loader import test_loader
from ovdet.distributed import Process, from_master, gather_to_master
from ovdet.errors import UserError
from ovdet.evaluation.coco import evaluate_detections, format_table, read_truth, write_json
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.detector import Detector
from ovdet.parts.masks import encode_pasted
from ovdet.vocabulary import Vocabulary

log = logging.getLogger(__name__)

NAMED_SKIPS = 20  # unusable images named in the log; the others are counted
MAX_SKIPPED = 0.1  # share of unusable images that ends a run
FEW = 32  # images before that share is judged


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision of ``train.precision`` on a device; on a CPU float16 becomes bfloat16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    half = torch.float16 if precision == "amp_fp16" and device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=half)


def to_device(batch: dict[str, Any], detector: Detector, device: torch.device) -> Tensor:
    """Normalised images ``[B, 3, S, S]`` of a batch, on the device."""
    vit = detector.backbone.vit
    images = batch["images"].to(device, non_blocking=True)
    return normalize(images, vit.image_mean, vit.image_std)


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
    detector: Detector,
    batches: Iterator[dict[str, Any]],
    *,
    process: Process,
    precision: str,
    mask_threshold: float = 0.5,
    repeat_edges: bool = False,
    forward: Callable[[Tensor, list[tuple[int, int]]], list[dict[str, Tensor]]] | None = None,
    on_skipped: Callable[[list[tuple[str, str]], int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Detections of images, one dict each, as numpy arrays in pixels of the file.

    ``index``, ``original`` (height, width of the file), ``boxes`` float32 ``[N, 4]`` xyxy, ``scores``, ``labels`` and,
    with masks, ``masks``: N run-length dicts. The detector must be in eval mode.

    Args:
        batches: of :func:`~ovdet.data.loader.test_loader`.
        mask_threshold, repeat_edges: see :func:`ovdet.parts.masks.paste_masks`.
        forward: run in place of the detector, such as ``detector.proposals`` (no labels then).
        on_skipped: told the unusable (file, reason) pairs of a batch and the number of its images.
    """
    for batch in batches:
        if on_skipped is not None:
            on_skipped(batch["skipped"], len(batch["indices"]) + len(batch["skipped"]))
        if batch["images"] is None:
            continue
        with autocast(precision, process.device):
            results = (forward or detector)(to_device(batch, detector, process.device), batch["sizes"])
        for i, result in enumerate(results):
            result = to_original(result, batch["sizes"][i], batch["originals"][i])
            found = {
                "index": batch["indices"][i],
                "original": batch["originals"][i],
                **{key: result[key].cpu().numpy() for key in ("boxes", "scores", "labels") if key in result},
            }
            if "masks" in result:
                found["masks"] = encode_pasted(
                    result["masks"], result["boxes"], tuple(batch["originals"][i]), mask_threshold,
                    repeat_edges=repeat_edges,
                )  # fmt: skip
            yield found


class SkipJudge:
    """Counts unusable images, names some, and ends the run when they are too many."""

    def __init__(self, what: str) -> None:
        self.what, self.skipped, self.seen = what, 0, 0

    def __call__(self, skipped: list[tuple[str, str]], seen: int) -> None:
        for file, reason in skipped:
            if self.skipped < NAMED_SKIPS:
                log.warning("skipped %s: %s", file, reason)
            self.skipped += 1
        self.seen += seen

    def check(self, skipped: float, seen: float) -> None:
        """Judge counts of all processes. Raises UserError when more than a tenth of the images cannot be used."""
        if skipped > MAX_SKIPPED * seen:
            raise UserError(
                f"{skipped:.0f} of {seen:.0f} images of {self.what} could not be used, more than "
                f"{MAX_SKIPPED:.0%}: see the files named above"
            )


def coco_results(
    found: Sequence[dict[str, Any]], image_ids: np.ndarray, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """COCO results of detections: image_id, category_id, bbox (xywh), score and, with masks, segmentation."""
    results = []
    for image in found:
        corner, side = image["boxes"][:, :2], image["boxes"][:, 2:] - image["boxes"][:, :2]
        boxes = np.concatenate([corner, side], axis=1).astype(np.float64).round(3)
        for i in range(len(boxes)):
            result = {
                "image_id": int(image_ids[image["index"]]),
                "category_id": vocabulary.category_ids[int(image["labels"][i])],
                "bbox": boxes[i].tolist(),
                "score": float(image["scores"][i]),
            }
            if "masks" in image:
                result["segmentation"] = image["masks"][i]
            results.append(result)
    return results


def test(
    config: FViTConfig,
    detector: Detector,
    annotations: Annotations,
    vocabulary: Vocabulary,
    *,
    process: Process,
    kinds: Sequence[str],
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Detect on the validation set and compute AP; every process calls it and gets the metrics.

    Args:
        kinds: ``"bbox"``, ``"segm"``.
        folder: where process 0 writes ``results.{kind}.json`` (COCO results) and ``metrics.json``; None: nowhere.

    Raises:
        UserError: too many unusable images, or masks asked of a detector or file that has none.
    """
    if "segm" in kinds and detector.mask_head is None:
        raise UserError("--eval segm needs a detector with masks: use a config with model.masks=true, or --eval bbox")
    data = config.data
    dataset = TestDataset(annotations.file_names, root=config.locate(data.val_images), image_size=data.image_size)
    loader = test_loader(
        dataset, batch_size=config.test.batch_size, workers=data.workers, rank=process.rank,
        world_size=process.world_size, pin=process.device.type == "cuda",
    )  # fmt: skip
    judge = SkipJudge(annotations.file)
    was_training = detector.training
    detector.eval()
    bar = tqdm(loader, desc="detecting", unit="batch", disable=not process.is_master, mininterval=1, dynamic_ncols=True)
    found = list(
        detect(
            detector, bar, process=process, precision=config.train.precision,
            mask_threshold=config.test.mask_threshold, on_skipped=judge,
        )
    )  # fmt: skip
    detector.train(was_training)
    parts = gather_to_master((found, judge.skipped, judge.seen))
    outcome: dict[str, dict[str, float]] | str = {}
    if parts is not None:
        try:
            judge.check(sum(p[1] for p in parts), sum(p[2] for p in parts))
            everything = sorted((image for p in parts for image in p[0]), key=lambda image: image["index"])
            results = coco_results(everything, annotations.image_ids, vocabulary)
            outcome = _score(config, results, vocabulary, kinds, folder)
        except UserError as error:
            outcome = str(error)
    outcome = from_master(outcome)
    if isinstance(outcome, str):
        raise UserError(outcome)
    return outcome


test.__test__ = False


def _score(
    config: FViTConfig, results: list[dict[str, Any]], vocabulary: Vocabulary, kinds: Sequence[str], folder: Path | None
) -> dict[str, dict[str, float]]:
    path = config.locate(config.data.val_annotations)
    truth = read_truth(path)
    novel = [name for name, is_novel in zip(vocabulary.names, vocabulary.novel, strict=True) if is_novel]
    metrics = {}
    for kind in kinds:
        field = {"bbox": "bbox", "segm": "segmentation"}[kind]
        keys = ("image_id", "category_id", "score", field)
        if folder is not None:
            write_json(folder / f"results.{kind}.json", [{k: r[k] for k in keys} for r in results])
        metrics[kind] = evaluate_detections(
            truth, results, kind=kind, protocol=config.data.protocol, file=path,
            novel=novel if len(novel) < len(vocabulary.names) else (),
        )  # fmt: skip
    if folder is not None:
        write_json(folder / "metrics.json", metrics)
    log.info("AP in %% on %s\n%s", path, format_table(metrics, config.data.protocol))
    return metrics
