"""GLIP as library calls::

import ovdet

detector = ovdet.load_detector("model_last.pt")
(found,) = detector("street.jpg", ["cat", "dog", "red car"])
found = detector.ground("street.jpg", "a dog beside a red car")
print(found["names"], found["scores"], found["boxes"])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovdet.glip import phrases as ph
from ovdet.glip.config import GlipConfig
from ovdet.glip.data.dataset import pad_images
from ovdet.glip.data.transforms import resized_view, target_size
from ovdet.glip.inference import Query, encode_prompts, find
from ovdet.glip.model import GLIP
from ovdet.glip.prompts import ClassPrompt, clean_name, make_prompts
from ovdet.glip.tokens import Span
from ovdet.library import Picture, as_pixels
from ovdet.precision import choose_precision

Phrases = Sequence[str] | Sequence[Sequence[Span]] | None


class Grounder:
    """A GLIP that is ready to find classes and phrases.

    Args:
        model: in eval mode on ``device``.
        config: sections ``data``, ``train`` (the precision) and ``test`` are read.
    """

    def __init__(self, model: GLIP, config: GlipConfig, device: torch.device) -> None:
        from ovdet.glip.testing import selection, views

        self.model, self.config, self.device = model.eval(), config, device
        self.precision, self.selection = choose_precision(config.train, device, training=False), selection(config)
        self.views = views(config)
        self._classes: tuple[tuple[str | ClassPrompt, ...], Query] | None = None

    def classes(self, names: Sequence[str | ClassPrompt]) -> Query:
        """Classes as prompts, encoded; those asked last are kept.

        Raises:
            ValueError: one text in place of a list of names.
            UserError: no class, or a name that cannot be written.
        """
        if isinstance(names, str):
            raise ValueError(f"classes are the text {names!r}: give a list of names, such as {names.split(',')}")
        key, last = tuple(names), self._classes
        if last is None or last[0] != key:
            test = self.config.test
            prompts = make_prompts(key, self.model.tokenizer, chunk=test.chunk, separator=test.separator)
            with self.precision.autocast():
                last = key, encode_prompts(self.model, prompts)
            self._classes = last
        return last[1]  # not what another thread may have asked for meanwhile

    def caption(
        self, text: str, phrases: Phrases = None, *, tagger: str = "rule", tagger_data: str | Path | None = None
    ) -> tuple[list[ph.Phrase], Query]:
        """Phrases of a caption, and the caption encoded.

        Args:
            phrases: as texts that stand in the caption, or as characters (a list of (begin, end) for each); None for
                noun phrases.
            tagger, tagger_data: see :func:`ovdet.glip.phrases.noun_phrases`.

        Raises:
            ValueError: one text in place of a list of phrases.
            UserError: no phrases, phrases that are not in the caption, or too long a text.
        """
        if isinstance(phrases, str):
            raise ValueError(f"phrases are the text {phrases!r}: give a list of them, such as {[phrases]}")
        if phrases is None:
            found = ph.noun_phrases(text, tagger, tagger_data)
        elif all(isinstance(p, str) for p in phrases):
            found = ph.phrases_of_texts(text, phrases)
        else:
            found = ph.phrases_of_spans(text, phrases)
        with self.precision.autocast():
            return found, encode_prompts(self.model, [ph.caption_prompt(text, found, self.model.tokenizer)])

    @torch.no_grad()
    def find(self, images: Sequence[Tensor], query: Query) -> list[dict[str, np.ndarray]]:
        """Detections of uint8 images ``[3, H_i, W_i]``, by falling score: boxes within the image, scores, labels."""
        data, originals = self.config.data, [(image.shape[-2], image.shape[-1]) for image in images]
        if self.views is None:
            sizes = [target_size(*size, data.test_size, data.longest) for size in originals]
            nothing = torch.zeros(0, 4)
            images = [resized_view(i, nothing, size, flip=False)[0] for i, size in zip(images, sizes, strict=True)]
        batch, sizes = pad_images(images, self.model.image.divisor)
        with self.precision.autocast():
            results = find(self.model, batch.to(self.device), sizes, originals, query, self.selection, self.views)
        for result, (height, width) in zip(results, originals, strict=True):
            limit = torch.tensor([width, height] * 2, device=result["boxes"].device)
            result["boxes"] = torch.minimum(result["boxes"].clamp(min=0), limit)
        return [{key: value.float().cpu().numpy() for key, value in result.items()} for result in results]

    def __call__(
        self, images: Picture | Iterable[Picture], classes: Sequence[str | ClassPrompt], *, batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """Detections of classes in images, by falling score.

        Args:
            images: one image or several: paths, Pillow images, uint8 tensors ``[3, H, W]`` or arrays ``[H, W, 3]``.
            classes: names, or class prompts with words around them.
            batch_size: images at a time.

        Returns:
            Per image ``boxes`` float32 ``[N, 4]`` (xyxy in pixels of the image, which is turned as its EXIF
            orientation says where ``data.exif`` is set), ``scores`` ``[N]``, ``labels`` ``[N]`` (rows of ``classes``),
            ``names`` (N of them) and ``size`` (height, width).

        Raises:
            ImageError: an image that cannot be read.
            ValueError: an array that is no image, a batch size below 1, or see :meth:`classes`.
            UserError: see :meth:`classes`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        classes = classes if isinstance(classes, str) else tuple(classes)
        query = self.classes(classes)  # before many images are read
        if isinstance(images, (str, Path, Tensor, np.ndarray, Image.Image)):
            images = [images]
        pixels = [as_pixels(picture, exif=self.config.data.exif) for picture in images]
        names = [clean_name(c).strip() if isinstance(c, str) else c.text.strip() for c in classes]
        results = []
        for start in range(0, len(pixels), batch_size):
            part = pixels[start : start + batch_size]
            results += [_named(r, names, image) for r, image in zip(self.find(part, query), part, strict=True)]
        return results

    def ground(self, image: Picture, caption: str, phrases: Phrases = None, **tagger: Any) -> dict[str, Any]:
        """Where the phrases of a caption are in an image; see :meth:`caption` and :meth:`__call__`.

        Returns:
            What :meth:`__call__` gives for an image; labels are rows of ``phrases``, a list of
            :class:`ovdet.glip.phrases.Phrase`, which is in the result as well.
        """
        pixels = as_pixels(image, exif=self.config.data.exif)
        found, query = self.caption(caption, phrases, **tagger)
        (result,) = self.find([pixels], query)
        return _named(result, [p.text for p in found], pixels) | {"phrases": found}


def _named(result: dict[str, np.ndarray], names: Sequence[str], image: Tensor) -> dict[str, Any]:
    labels = result["labels"].astype(np.int64)
    found = {"labels": labels, "names": [names[i] for i in labels], "size": tuple(image.shape[-2:])}
    return result | found
