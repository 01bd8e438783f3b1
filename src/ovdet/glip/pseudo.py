"""Self-training: a teacher's boxes for the noun phrases of captions, written in shards that a student reads.

The paper's GLIP-T and GLIP-L learn from captions labelled so by a smaller GLIP (section 3.3). The reference has no
program that makes such labels; this one is ours.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovdet.data.images import read_image
from ovdet.glip.data.dataset import pad_images
from ovdet.glip.data.records import is_id
from ovdet.glip.data.transforms import resized_view, target_size
from ovdet.glip.decode import Selection
from ovdet.glip.inference import find_own
from ovdet.glip.model import GLIP, Prompt
from ovdet.glip.phrases import Phrase, caption_prompt, noun_phrases
from ovdet.glip.views import Views
from training.engine.data.images import ImageError, resolve
from training.engine.data.parsing import image_file_name, read_json
from training.engine.errors import UserError
from training.engine.files import write_atomically, write_json
from training.engine.precision import Precision

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Caption:
    """An image and what is said of it."""

    identity: int
    image: str
    text: str


@dataclass(frozen=True)
class LabelOptions:
    """How captions are labelled; kept in the manifest, and a shard made otherwise is not continued.

    Attributes:
        score: boxes must exceed it, after NMS.
        tagger: what finds noun phrases.
        shard: captions of a shard; seed, limit: of the choice of captions (0: all, in their order).
        shorter, longest: size of the images; exif: turn them as their EXIF orientation says.
    """

    score: float = 0.5
    tagger: str = "rule"
    shard: int = 1000
    limit: int = 0
    seed: int = 0
    shorter: int = 800
    longest: int = 1333
    exif: bool = False


def read_captions(path: str | Path) -> list[Caption]:
    """Captions of a COCO captions file (one of each image's captions an entry), or of json lines (image, caption).

    Raises:
        UserError: missing, of another form, or without any caption.
    """
    path = Path(path)
    captions = []
    if path.suffix == ".jsonl":
        try:
            with open(path, encoding="utf-8-sig") as file:
                entries = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"captions {path}: cannot be read ({str(error)[:120]}); give json lines") from error
        for i, entry in enumerate(entries):
            image = entry.get("image") or entry.get("file_name") if isinstance(entry, dict) else None
            if isinstance(image, str) and isinstance(entry.get("caption"), str):
                captions.append(Caption(entry["id"] if is_id(entry.get("id")) else i, image, entry["caption"]))
    else:
        content = read_json(str(path), "captions")
        names = {i.get("id"): image_file_name(i) for i in content["images"] if isinstance(i, dict)}
        entries = content.get("annotations")
        for entry in entries if isinstance(entries, list) else []:
            image = names.get(entry.get("image_id")) if isinstance(entry, dict) else None
            if image and isinstance(entry.get("caption"), str):
                captions.append(Caption(int(entry.get("id", len(captions))), image, entry["caption"]))
    left_out = len(entries or []) - len(captions)
    if left_out:
        log.warning("captions %s: %d entries without image or caption (left out)", path, left_out)
    if not captions:
        raise UserError(f"captions {path}: holds no image with a caption; give a COCO captions file or json lines")
    return captions


def choose(captions: Sequence[Caption], options: LabelOptions) -> list[Caption]:
    """All captions, or ``limit`` of them by the seed, in the file's order."""
    if not options.limit or options.limit >= len(captions):
        return list(captions)
    chosen = np.random.default_rng(options.seed).choice(len(captions), options.limit, replace=False)
    return [captions[i] for i in sorted(chosen.tolist())]


class Labeller:
    """Labels captions shard by shard; what is there already is not made again.

    Args:
        model: the teacher, in eval mode; teacher: what identifies it.
        root: image root.
        options, selection, views: how; see :class:`ovdet.glip.views.Views`.
        folder: of the shards and the manifest.
        tagger_data: folder of the tagger's data.

    Raises:
        UserError: the folder holds shards made otherwise.
    """

    def __init__(
        self,
        model: GLIP,
        teacher: str,
        root: str,
        folder: Path,
        *,
        options: LabelOptions,
        selection: Selection,
        precision: Precision,
        source: str,
        batch_size: int = 4,
        tagger_data: str | None = None,
        views: Views | None = None,
    ) -> None:
        self.model, self.root, self.folder, self.options = model, root, folder, options
        self.selection, self.precision, self.batch_size, self.tagger_data = (
            selection,
            precision,
            batch_size,
            tagger_data,
        )
        self.teacher, self.views = teacher, views
        self.identity = {"teacher": teacher, "source": source, **asdict(options), **asdict(selection)}
        if views is not None:
            self.identity["views"] = json.loads(json.dumps(asdict(views)))  # as the manifest gives it back

    def check_folder(self, *, write: bool) -> None:
        """See that the folder belongs to this very labelling; with ``write`` it is made."""
        manifest = self.folder / MANIFEST
        if manifest.is_file():
            before = {"exif": False} | json.loads(manifest.read_text()).get("identity", {})  # once there was no choice
            differing = [k for k, v in self.identity.items() if before.get(k) != v]
            if differing:
                key = differing[0]
                raise UserError(
                    f"{self.folder} was made with {key} {before.get(key)!r}, now it is {self.identity[key]!r}: "
                    "give the same, or another --out"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and no folder of pseudo boxes: choose another --out")
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(manifest, {"identity": self.identity})

    def shard_file(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard_{number:06d}.jsonl"

    def label(self, captions: Sequence[Caption], numbers: Sequence[int], done: Callable[[int], None]) -> None:
        """Make the shards of these numbers; ``done`` is told of every caption."""
        size = self.options.shard
        for number in numbers:
            part = captions[number * size : (number + 1) * size]
            if not self.shard_file(number).is_file():
                counts: Counter[str] = Counter()
                lines = [json.dumps(record, separators=(",", ":")) for record in self._records(part, counts, done)]
                counts["captions"] = len(part)
                counts["captions with boxes"] = len(lines)
                # The counts first: a shard that is there is complete.
                write_json(self.shard_file(number).with_suffix(".counts.json"), dict(counts))
                write_atomically(self.shard_file(number), "".join(line + "\n" for line in lines))
            else:
                done(len(part))

    def _records(
        self, captions: Sequence[Caption], counts: Counter[str], done: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        ready = []
        for caption in captions:
            item = self._prepare(caption, counts)
            done(1)
            if item is not None:
                ready.append(item)
            if len(ready) == self.batch_size:
                yield from self._detect(ready, counts)
                ready = []
        if ready:
            yield from self._detect(ready, counts)

    def _prepare(self, caption: Caption, counts: Counter[str]) -> tuple | None:
        """(caption, phrases, prompt, image, original size); None where the caption or its image cannot be used."""
        text = " ".join(caption.text.split())
        phrases = noun_phrases(text, self.options.tagger, self.tagger_data)
        if not phrases:
            counts["dropped: no noun phrase"] += 1
            return None
        try:
            prompt = caption_prompt(text, phrases, self.model.tokenizer)
        except UserError:
            counts["dropped: more tokens than the text encoder takes"] += 1
            return None
        try:
            image = read_image(resolve(self.root, caption.image), exif=self.options.exif)
        except ImageError as error:
            log.warning("skipped %s", error)
            counts["dropped: image cannot be read"] += 1
            return None
        original = (image.shape[-2], image.shape[-1])
        if self.views is None:
            size = target_size(*original, self.options.shorter, self.options.longest)
            image = resized_view(image, torch.zeros(0, 4), size, flip=False)[0]
        return caption, text, phrases, prompt, image, original

    @torch.no_grad()
    def _detect(self, items: Sequence[tuple], counts: Counter[str]) -> Iterator[dict[str, Any]]:
        captions, texts, phrases, prompts, images, originals = zip(*items, strict=True)
        batch, sizes = pad_images(images, self.model.image.divisor)
        device = self.model.head.bias0.device
        prompts_: Sequence[Prompt] = prompts
        with self.precision.autocast():
            found = find_own(self.model, batch.to(device), sizes, originals, prompts_, self.selection, self.views)
        for caption, text, named, result, original in zip(captions, texts, phrases, found, originals, strict=True):
            record = self._record(caption, text, named, result, original, counts)
            if record is not None:
                yield record

    def _record(
        self, caption: Caption, text: str, phrases: Sequence[Phrase], result: dict[str, Tensor],
        original: tuple[int, int], counts: Counter[str],
    ) -> dict[str, Any] | None:  # fmt: skip
        sure = result["scores"] > self.options.score
        counts["boxes dropped: score"] += int((~sure).sum())
        boxes, scores, labels = (result[k][sure].cpu() for k in ("boxes", "scores", "labels"))
        if not len(boxes):
            counts["dropped: no box is good enough"] += 1
            return None
        limit = torch.tensor([original[1], original[0]] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        counts["boxes"] += len(boxes)
        counts["phrases with boxes"] += len(labels.unique())
        return {
            "id": caption.identity, "image": caption.image, "caption": text, "teacher": self.teacher[:12],
            "bboxes": [[round(v, 2) for v in box] for box in boxes.tolist()],
            "scores": [round(v, 4) for v in scores.tolist()],
            "tokens_positive": [[list(span) for span in phrases[i].spans] for i in labels.tolist()],
        }  # fmt: skip

    def summary(self, shards: int) -> dict[str, int]:
        """Counts over all shards, written into the manifest."""
        total: Counter[str] = Counter()
        for number in range(shards):
            total.update(json.loads(self.shard_file(number).with_suffix(".counts.json").read_text()))
        write_json(self.folder / MANIFEST, {"identity": self.identity, "counts": dict(total)})
        return dict(total)
