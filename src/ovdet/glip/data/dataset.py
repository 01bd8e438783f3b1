"""Examples as tensors: resized, mirrored, with the tokens of every box. All chance comes from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ovdet.data.dataset import ImageFiles, Skipped
from ovdet.data.images import read_image
from ovdet.glip.data.sources import Source
from ovdet.glip.data.transforms import names_a_side, resized_view, target_size, usable_boxes
from ovdet.glip.losses import GroundTruth
from ovdet.glip.tokens import Tokenizer, positive_map, tokens_of_spans
from training.engine.data.images import ImageError, decode
from training.engine.errors import UserError


class TrainDataset(Dataset):
    """Training sets, each as often as its copies say.

    Args:
        sources: the sets; copies: of each.
        tokenizer: encodes texts.
        sizes: shorter sides, one of which is drawn for each image; longest: largest longer side.
        flip: probability of mirroring, but for texts that speak of left or right.
        seed: of all choices; exif: turn images of files as their EXIF orientation says.

    Items, by key (epoch, index): a dict of ``image`` uint8 ``[3, h, w]``, ``text`` (:class:`Encoded`), ``truth``
    (:class:`GroundTruth` with one column for every token that a text may have) and ``image_id``; or a
    :class:`~ovdet.data.dataset.Skipped`. Boxes whose phrase has no token are left out with it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        copies: Sequence[int],
        tokenizer: Tokenizer,
        *,
        sizes: Sequence[int],
        longest: int,
        flip: float,
        seed: int,
        exif: bool = False,
    ) -> None:
        self.sources, self.tokenizer = list(sources), tokenizer
        self.sizes, self.longest, self.flip, self.seed, self.exif = tuple(sizes), longest, flip, seed, exif
        self.ends = np.cumsum([len(source) * n for source, n in zip(sources, copies, strict=True)])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Skipped:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        which = int(np.searchsorted(self.ends, index, side="right"))
        source = self.sources[which]
        row = (index - (int(self.ends[which - 1]) if which else 0)) % len(source)
        name = f"row {row}"
        try:
            example = source.read(row, rng)
            name = example.name
            image = self._pixels(example.image, name)
            encoded = self.tokenizer.encode(example.text)
        except ImageError as error:
            return Skipped(error.file, error.reason)
        except (ValueError, UserError) as error:  # of the tokenizer: a text that it would change
            return Skipped(name, str(error))
        if len(encoded.ids) > self.tokenizer.limit:
            return Skipped(
                name, f"its text has {len(encoded.ids)} tokens, but the text encoder takes {self.tokenizer.limit}"
            )
        height, width = image.shape[-2:]
        boxes, good = usable_boxes(torch.from_numpy(example.boxes).reshape(-1, 4).float(), (height, width))
        tokens = [tokens_of_spans(encoded, spans) for spans in example.spans]
        keep = [i for i in range(len(tokens)) if good[i] and tokens[i]]
        size = target_size(height, width, int(rng.choice(self.sizes)), self.longest)
        flip = rng.random() < self.flip and not names_a_side(example.text)
        image, boxes = resized_view(image, boxes[keep], size, flip=flip)
        labels = positive_map([tokens[i] for i in keep], self.tokenizer.limit)
        return {
            "image": image,
            "text": encoded,
            "truth": GroundTruth(boxes, labels),
            "image_id": example.image_id,
        }

    def _pixels(self, image: str | bytes, name: str) -> Tensor:
        return decode(image, name) if isinstance(image, bytes) else read_image(image, exif=self.exif)


class TestDataset(ImageFiles):
    """Images at the size of testing, or as they are where ``shorter`` is 0.

    Items, by index: a dict of ``image`` uint8 ``[3, h, w]``, ``original`` (height, width of the file) and ``index``;
    or a :class:`~ovdet.data.dataset.Skipped`.
    """

    __test__ = False  # no test, though its name begins like one

    def __init__(self, file_names: Sequence[str], *, root: str, shorter: int, longest: int, exif: bool = False) -> None:
        super().__init__(file_names, root=root, exif=exif)
        self.shorter, self.longest = shorter, longest

    def view(self, image: Tensor) -> dict[str, Any]:
        if not self.shorter:
            return {"image": image}
        size = target_size(image.shape[-2], image.shape[-1], self.shorter, self.longest)
        return {"image": resized_view(image, torch.zeros(0, 4), size, flip=False)[0]}


def pad_images(images: Sequence[Tensor], divisor: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images uint8 ``[3, h_i, w_i]`` as one ``[B, 3, H, W]``, padded right and bottom, and their (height, width)."""
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for row, image, (h, w) in zip(batch, images, sizes, strict=True):
        row[:, :h, :w] = image
    return batch, sizes


class Collate:
    """Samples to batches: ``images``, ``sizes``, ``image_ids``, ``skipped`` (file, reason), lists of everything else.

    ``images`` is None where no sample could be read. ``samples`` counts those that could.

    Args:
        divisor: of the padded sides, see :class:`ovdet.glip.image.ImageEncoder`.
    """

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, samples: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        good = [s for s in samples if not isinstance(s, Skipped)]
        batch: dict[str, Any] = {"images": None, "sizes": [], "samples": len(good)}
        if good:
            batch["images"], batch["sizes"] = pad_images([s["image"] for s in good], self.divisor)
            batch |= {key: [s[key] for s in good] for key in good[0] if key not in ("image", "image_id")}
        batch["image_ids"] = [s["image_id"] for s in good if "image_id" in s]
        batch["skipped"] = [(s.file, s.reason) for s in samples if isinstance(s, Skipped)]
        return batch
