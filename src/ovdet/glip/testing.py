"""Detections of a whole validation set, gathered over processes, and how good they are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ovdet.data.annotations import check_image_root
from ovdet.data.loader import test_loader
from ovdet.evaluation.arrays import Detections
from ovdet.evaluation.coco import evaluate, evaluator_classes, write_results
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.classes import is_background
from ovdet.glip.data.dataset import Collate, TestDataset
from ovdet.glip.data.grounding import load_grounding
from ovdet.glip.data.records import read_spans
from ovdet.glip.data.sets import written_classes
from ovdet.glip.decode import Selection
from ovdet.glip.evaluation.fixed_ap import fixed_ap
from ovdet.glip.evaluation.flickr import boxes_by_phrase, read_entities, recall
from ovdet.glip.inference import Query, encode_knowledge, encode_prompts, find, find_own
from ovdet.glip.model import GLIP, Prompt
from ovdet.glip.phrases import Phrase, caption_prompt
from ovdet.glip.prompts import ClassPrompt, clean_name, knowledge_texts, make_prompts, read_knowledge
from ovdet.glip.tokens import Tokenizer
from ovdet.glip.views import Views
from ovdet.results import write_metrics
from ovdet.testing import read_truth
from training.engine.data.annotations import load_annotations
from training.engine.distributed import Dist, all_reduce_sum, gather_to_master, on_master
from training.engine.errors import UserError
from training.engine.precision import Precision
from training.engine.skips import SkipPolicy

log = logging.getLogger(__name__)

LVIS_PER_IMAGE = 300  # detections of a prompt, where the number per class is what counts


def selection(config: GlipConfig) -> Selection:
    """What a config keeps of the candidates."""
    test = config.test
    per_image = max(test.per_image, LVIS_PER_IMAGE) if config.data.protocol == "lvis" else test.per_image
    return Selection(test.aggregation, test.score, test.per_level, test.nms, per_image)


def views(config: GlipConfig) -> Views | None:
    """The views that a config looks at in place of an image at one size; None for that."""
    test, data = config.test, config.data
    if not (test.scales or test.mirror or test.ranges):
        return None
    ranges = tuple(zip(test.ranges[::2], test.ranges[1::2], strict=True))
    sides, longest = (tuple(test.scales), test.scales_longest) if test.scales else ((data.test_size,), data.longest)
    return Views(sides, longest, test.mirror, ranges, test.merge)


class _Set:
    """Images of a validation set, dealt to processes by batches."""

    def __init__(self, names: Sequence[str], root: str, config: GlipConfig, divisor: int, dist: Dist) -> None:
        data = config.data
        shorter = 0 if views(config) else data.test_size  # views are made of the image itself
        dataset = TestDataset(names, root=root, shorter=shorter, longest=data.longest, exif=data.exif)
        self.loader = test_loader(
            dataset, batch_size=config.test.batch_size, workers=data.workers, rank=dist.rank,
            world_size=dist.world_size, pin=dist.device.type == "cuda", collate=Collate(divisor),
        )  # fmt: skip
        self.size, self.dist = len(dataset), dist
        self.skips = SkipPolicy(data.val_annotations, data.max_skipped, "data.max_skipped")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches with something in them, on the device."""
        self.skips.reset()
        with tqdm(
            total=len(self.loader), desc="test", unit="batch", disable=not self.dist.is_master, dynamic_ncols=True
        ) as bar:
            counts = torch.zeros(2, dtype=torch.float64)
            for batch in self.loader:
                bar.update(1)
                self.skips.name(batch["skipped"])
                counts += torch.tensor([batch["samples"], len(batch["skipped"])], dtype=torch.float64)
                if batch["images"] is not None:
                    yield batch | {"images": batch["images"].to(self.dist.device, non_blocking=True)}
        usable, skipped = all_reduce_sum(counts.to(self.dist.device)).tolist()
        self.skips.count(usable, skipped)
        self.skips.judge(at_end=True)


class ClassTest:
    """AP of a list of classes: COCO's, or LVIS's with a fixed number for each class.

    Everything is read when it is made. Every process must call it.

    Args:
        config: sections ``data`` and ``test``.
        tokenizer, divisor: of the model, see :class:`ovdet.glip.image.ImageEncoder`.

    Raises:
        UserError: missing or faulty files, or the package that computes AP is not installed.
    """

    def __init__(self, config: GlipConfig, tokenizer: Tokenizer, divisor: int, dist: Dist) -> None:
        evaluator_classes()
        data = config.data
        self.config, self.dist, self.path = config, dist, config.locate(data.val_annotations)
        annotations = load_annotations(self.path, flag="data.val_annotations", labelled=True)
        root = config.locate(data.val_images)
        check_image_root(annotations, root, key="data.val_images")
        self.truth, self.names = read_truth(self.path, data.protocol, annotations), annotations.names
        unknown = sorted(set(data.novel) - set(self.names))
        if unknown:
            raise UserError(f'data.novel: "{unknown[0]}" is no class of {self.path}: write the names as it does')
        written = written_classes(data.names, config.locate(data.prompts), self.names, "data.names")
        entries = written or [ClassPrompt(clean_name(name)) for name in self.names]
        labels = [i for i, name in enumerate(self.names) if not is_background(int(annotations.category_ids[i]), name)]
        self.labels = labels
        self.knowledge: list[str] | None = None
        if config.test.knowledge:
            known = read_knowledge(config.locate(config.test.knowledge))
            self.knowledge = knowledge_texts(known, [self.names[i] for i in labels], config.test.knowledge_kind)
        else:
            self.prompts = make_prompts(
                [entries[i] for i in labels], tokenizer, chunk=config.test.chunk, separator=config.test.separator,
                labels=labels,
            )  # fmt: skip
        self.images = _Set(annotations.file_names, root, config, divisor, dist)

    @torch.no_grad()
    def detect(self, model: GLIP, precision: Precision) -> Detections | None:
        """Detections of all processes on process 0, None on the others; the model is in eval mode."""
        options, looks, mine = selection(self.config), views(self.config), []
        with precision.autocast():
            query = self._query(model)
            for batch in self.images:
                found = find(model, batch["images"], batch["sizes"], batch["original"], query, options, looks)
                mine += [{"index": i, **_on_cpu(one)} for i, one in zip(batch["index"], found, strict=True)]
        parts = gather_to_master(Detections.gather(mine))
        return None if parts is None else Detections.merge(parts)

    def _query(self, model: GLIP) -> Query:
        if self.knowledge is None:
            return encode_prompts(model, self.prompts)
        return encode_knowledge(model, self.knowledge, self.config.test.knowledge_pooling, self.labels)

    def __call__(
        self, model: GLIP, precision: Precision, folder: Path | None = None, about: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Metrics, on every process; with a folder process 0 writes ``results.bbox.json`` and ``metrics.json``.

        Args:
            about: what was tested; stands in ``metrics.json`` as ``run``.

        Raises:
            UserError: too many images could not be read, or nothing can be written.
        """
        found = self.detect(model, precision)

        def judge() -> dict[str, float]:
            if self.config.data.protocol == "lvis":
                metrics = fixed_ap(self.truth, found)
            else:
                metrics = evaluate(self.truth, found, novel=self.config.data.novel)
            if folder is not None:
                write_results(folder / "results.bbox.json", self.truth, found, kind="bbox")
                write_metrics(folder, metrics, about)
            return metrics

        return on_master(judge)


def _on_cpu(result: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        key: value.float().cpu().numpy() if key != "labels" else value.cpu().numpy() for key, value in result.items()
    }


class PhraseTest:
    """Recall of the phrases of Flickr30k Entities; otherwise as :class:`ClassTest`.

    ``data.val_annotations`` lists a sentence of an image in each entry, with the phrases that are asked for
    (``tokens_positive_eval``); ``data.sentences`` holds the true boxes.
    """

    def __init__(self, config: GlipConfig, tokenizer: Tokenizer, divisor: int, dist: Dist) -> None:
        data = config.data
        self.config, self.dist, self.path = config, dist, config.locate(data.val_annotations)
        records = load_grounding(self.path, key="data.val_annotations", evaluation=True)
        self.prompts, self.keys, names = [], [], []
        for row in range(len(records)):
            caption, extra = records.captions[row], records.extra[row]
            prompt = self._prompt(caption, extra, tokenizer, int(records.ids[row]))
            if prompt is not None:
                self.prompts.append(prompt)
                self.keys.append((str(extra["original_img_id"]), int(extra["sentence_id"])))
                names.append(records.images[row])
        if not self.prompts:
            raise UserError(
                f"data.val_annotations {self.path}: no image has tokens_positive_eval, sentence_id and "
                "original_img_id: give the evaluation file of Flickr30k Entities"
            )
        images = list(dict.fromkeys(image for image, _ in self.keys))
        self.sentences, self.boxes = read_entities(config.locate(data.sentences), images)
        self.images = _Set(names, config.locate(data.val_images), config, divisor, dist)

    @staticmethod
    def _prompt(caption: str, extra: Mapping[str, Any], tokenizer: Tokenizer, image: int) -> Prompt | None:
        """The prompt of a sentence; None where nothing is asked."""
        asked = extra.get("tokens_positive_eval")
        if not asked or "sentence_id" not in extra or "original_img_id" not in extra:
            return None
        phrases = []
        for value in asked:
            reason, spans = read_spans(value, caption)
            if reason:
                raise UserError(f"data.val_annotations: image {image} asks for a {reason}: mend tokens_positive_eval")
            phrases.append(Phrase(" ".join(caption[b:e] for b, e in spans), tuple(spans)))
        return caption_prompt(caption, phrases, tokenizer)

    @torch.no_grad()
    def __call__(
        self, model: GLIP, precision: Precision, folder: Path | None = None, about: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Recalls of all phrases and by their type (``"R@1"``, ``"R@1 people"``), on every process."""
        options, looks, mine = selection(self.config), views(self.config), []
        with precision.autocast():
            for batch in self.images:
                prompts = [self.prompts[i] for i in batch["index"]]
                found = find_own(model, batch["images"], batch["sizes"], batch["original"], prompts, options, looks)
                mine += [(i, _on_cpu(result)) for i, result in zip(batch["index"], found, strict=True)]
        parts = gather_to_master(mine)

        def judge() -> dict[str, float]:
            answers = {}
            for index, found in (pair for part in parts for pair in part):
                phrases = len(self.prompts[index].tokens)
                boxes = found["boxes"] - np.array([0, 0, 1, 1], found["boxes"].dtype)  # their last pixels, as judged
                answers[self.keys[index]] = boxes_by_phrase(boxes, found["scores"], found["labels"], phrases)
            table = recall(self.sentences, self.boxes, answers)
            metrics = {
                name if kind == "all" else f"{name} {kind}": value
                for name, kinds in table.items()
                for kind, value in kinds.items()
            }
            if folder is not None:
                write_metrics(folder, metrics, about)
            return metrics

        return on_master(judge)


Test = ClassTest | PhraseTest


def open_test(config: GlipConfig, tokenizer: Tokenizer, divisor: int, dist: Dist) -> Test:
    """The test that ``data.protocol`` names. UserError: see :class:`ClassTest`."""
    kind = PhraseTest if config.data.protocol == "flickr" else ClassTest
    return kind(config, tokenizer, divisor, dist)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics in percent, a line each; "-" where there is nothing to find."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{k:<{width}}  {'-' if v < 0 else f'{100 * v:.2f}':>6}" for k, v in metrics.items())
