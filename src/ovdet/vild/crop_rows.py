"""Reference rows: the teacher itself judges the crops of a detector's boxes. Slow; an upper and a lower bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovdet.evaluation.coco import evaluator_classes
from ovdet.parts.scores import fuse, select_detections
from ovdet.precision import choose_precision
from ovdet.testing import Images, found_in, score, to_original
from ovdet.vild.config import VildConfig
from ovdet.vild.detector import Detector
from ovdet.vild.embed import Embedder
from ovdet.vild.scores import cosine_logits, plain_probabilities, scores_with_objectness
from ovdet.vocabulary import Vocabulary
from training.engine.data.records import Annotations
from training.engine.distributed import Dist

ROWS = {
    "clip": "CLIP on cropped regions",
    "clip-objectness": "CLIP on cropped regions, with objectness",
    "text-clip": "the detector's own scores and CLIP on its boxes",
}


class CropJudge:
    """Class probabilities of boxes by the teacher's embeddings of their crops.

    Args:
        table: class embeddings ``[C, D]``, unit length, of the evaluated vocabulary.
        base_mask: bool ``[C]``.
        config: sections ``model`` and ``test`` are read.
        row: one of :data:`ROWS`.
    """

    def __init__(self, embedder: Embedder, table: Tensor, base_mask: Tensor, config: VildConfig, row: str) -> None:
        self.embedder, self.config, self.row = embedder, config, row
        self.table, self.base_mask = table.to(embedder.device), base_mask.to(embedder.device)

    def __call__(self, pixels: Tensor, boxes: np.ndarray, objectness: Tensor, own: Tensor) -> Tensor:
        """Scores ``[K, C]``.

        Args:
            pixels: the image, uint8 ``[3, H, W]``; boxes: ``[K, 4]`` in it.
            objectness: ``[K]``; own: the detector's class probabilities ``[K, C]``, for the row that has them.
        """
        test = self.config.test
        temperature = test.temperature or self.config.model.temperature
        judged = plain_probabilities(cosine_logits(self.embedder.embed(pixels, boxes), self.table, temperature))
        if self.row == "clip-objectness":
            return scores_with_objectness(judged, objectness)
        if self.row == "text-clip":
            weights = {"weight_base": test.image_weight_base, "weight_novel": test.image_weight_novel}
            return fuse(own, judged, self.base_mask, **weights)
        return judged


@torch.inference_mode()
def detect_with_crops(
    detector: Detector,
    judge: CropJudge,
    images: Images,
    *,
    config: VildConfig,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """As :func:`ovdet.testing.detect`, with scores by the teacher; the images keep their pixels."""
    test, precision = config.test, choose_precision(config.train, device, training=False)
    for batch in images:
        images.note(batch["skipped"], len(batch["indices"]))
        if batch["images"] is None:
            continue
        sizes = batch["sizes"]
        with precision.autocast():
            maps, regions = detector.judge(detector.prepare(batch["images"].to(device), sizes), sizes)
        results = []
        for i, one in enumerate(regions):
            best = one.objectness.argsort(descending=True, stable=True)[: test.crops]
            boxes = to_original({"boxes": one.boxes[best]}, sizes[i], batch["originals"][i])["boxes"]
            scores = judge(batch["pixels"][i], boxes.cpu().numpy(), one.objectness[best], one.scores[best])
            results.append(
                select_detections(one.boxes[best], scores, score=test.score, iou=test.nms, most=test.per_image)
            )
        with precision.autocast():
            detector.add_masks(maps, results)
        without_pixels = {key: value for key, value in batch.items() if key != "pixels"}  # results are all kept
        for i, result in enumerate(results):
            yield found_in(
                without_pixels, i, result, mask_threshold=test.mask_threshold,
                repeat_edges=test.mask_edges == "repeated",
            )  # fmt: skip


def test_crops(
    config: VildConfig,
    detector: Detector,
    judge: CropJudge,
    annotations: Annotations,
    vocabulary: Vocabulary,
    *,
    dist: Dist,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """AP of a reference row on the validation set; every process calls it. See :func:`ovdet.testing.test`.

    Args:
        options: ``kinds``, ``folder``, ``about`` and ``level``.
    """
    evaluator_classes()
    images = Images.of_validation(config, annotations, title="judging crops", dist=dist, keep_pixels=True)
    detector.eval()
    found = detect_with_crops(detector, judge, images, config=config, device=dist.device)
    return score(config, found, images.policy, annotations, vocabulary, **options)


test_crops.__test__ = False
