"""Training images of MaskCLIP+: scaled, cropped, mirrored and recoloured at random, with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as TF

from open_clip.image_tower import OPENAI_MEAN
from open_clip.transform import resize
from ovseg.classes import IGNORE
from ovseg.data.sets import SegmentationSet, Unusable
from ovseg.windows import fit_within
from training.engine.data.images import ImageError, read_image
from training.engine.data.sampler import EpochBatchSampler
from training.engine.data.workers import Loader
from training.engine.distributed import Dist
from training.engine.errors import UserError
from training.engine.schedule import process_seed

PADDING = tuple(round(255 * v) for v in OPENAI_MEAN)  # grey that is 0 once normalised


@dataclass(frozen=True)
class Augmentation:
    """How a training sample is drawn.

    Attributes:
        crop: side of the square that is cut out; smaller images are padded.
        long_side, short_side: the image is made as large as these allow, times a factor in ``scales``.
        scales: range of that factor.
        flip: probability of a mirrored sample.
        recolour: vary brightness, contrast, saturation and hue.
    """

    crop: int = 512
    long_side: int = 2048
    short_side: int = 512
    scales: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    recolour: bool = True

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Draw a sample of an image uint8 ``[3, H, W]`` and its labels uint8 ``[H, W]``, with torch's generator.

        Returns:
            uint8 ``[3, crop, crop]`` and ``[crop, crop]``; padded pixels have the label 255. And the pixels (height,
            width) that the image takes of them, top left.
        """
        factor = self.scales[0] + float(torch.rand(())) * (self.scales[1] - self.scales[0])
        limits = max(int(self.long_side * factor), 1), max(int(self.short_side * factor), 1)
        height, width = fit_within(*labels.shape, *limits)
        image = resize(image, height, width, "bilinear")
        labels = TF.resize(labels[None], [height, width], interpolation=InterpolationMode.NEAREST)[0]
        top, left = (int(torch.randint(max(side - self.crop, 0) + 1, ())) for side in (height, width))
        part = (slice(top, top + self.crop), slice(left, left + self.crop))
        image, labels = image[:, part[0], part[1]], labels[part]
        if float(torch.rand(())) < self.flip:
            image, labels = image.flip(2), labels.flip(1)
        if self.recolour:
            image = ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)(image)
        square = torch.tensor(PADDING, dtype=torch.uint8).view(3, 1, 1).repeat(1, self.crop, self.crop)
        truth = torch.full((self.crop, self.crop), IGNORE, dtype=torch.uint8)
        square[:, : image.shape[1], : image.shape[2]] = image
        truth[: labels.shape[0], : labels.shape[1]] = labels
        return square, truth, tuple(labels.shape)


class Photographs(Dataset):
    """Photographs without annotations: labels of 0 everywhere, all of which are to be filled in.

    Args:
        files: paths.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.images = list(files)

    def __len__(self) -> int:
        return len(self.images)

    def files(self, index: int) -> tuple[str, str]:
        """Path of the photograph, and no label file."""
        return self.images[index], ""

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        try:
            image = read_image(self.images[index])
        except ImageError as error:
            return Unusable(error.file, error.reason)
        return {"image": image, "labels": torch.zeros(image.shape[1:], dtype=torch.uint8), "index": index}


class TrainingSamples(Dataset):
    """Samples by key (epoch, index), the same whenever they are drawn.

    Args:
        data: images with labels.
        augmentation: applied to each.
        seed: of the random choices.
    """

    def __init__(self, data: SegmentationSet | Photographs, augmentation: Augmentation, seed: int) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Unusable:
        epoch, index = key
        item = self.data[index]
        if isinstance(item, Unusable):
            return item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(process_seed(self.seed, epoch, index))
            image, labels, size = self.augmentation(item["image"], item["labels"])
        return {"image": image, "labels": labels, "size": size, "index": index}


def collate(samples: Sequence[dict[str, Any] | Unusable], crop: int) -> dict[str, Any]:
    """A batch: ``images`` uint8 ``[B, 3, c, c]``, ``labels`` uint8 ``[B, c, c]``, ``sizes`` (height, width) without the
    padding, and what the engine's loop reads.

    An unusable sample is replaced by a usable one of the batch whose labels are all 255, so that the statistics of
    normalisation layers have B images; without any, by plain grey.
    """
    good = [s for s in samples if not isinstance(s, Unusable)]
    bad = [s for s in samples if isinstance(s, Unusable)]
    fatal = [s for s in bad if s.fatal]
    images, labels, sizes = ([s[key] for s in good] for key in ("image", "labels", "size"))
    grey = torch.tensor(PADDING, dtype=torch.uint8).view(3, 1, 1).expand(3, crop, crop)
    for _ in bad:
        images.append(images[0] if good else grey)
        sizes.append(sizes[0] if good else (crop, crop))
        labels.append(torch.full((crop, crop), IGNORE, dtype=torch.uint8))
    return {
        "images": torch.stack(images),
        "labels": torch.stack(labels),
        "sizes": sizes,
        "samples": len(good),
        "skipped": [(s.file, s.reason) for s in bad],
        "image_ids": [s["index"] for s in good],
        "fatal": f"{fatal[0].file} {fatal[0].reason}" if fatal else "",
    }


class TrainingData:
    """Batches of one process, epoch by epoch.

    Args:
        samples: what they are made of.
        batch_size: of this process.
        workers: processes that read and draw.
        dist: this process.
    """

    def __init__(self, samples: TrainingSamples, *, batch_size: int, workers: int, dist: Dist) -> None:
        self.sampler = EpochBatchSampler(
            size=len(samples), batch_size=batch_size, rank=dist.rank, world_size=dist.world_size, seed=samples.seed
        )
        self.device = dist.device
        self.loader = Loader(
            samples,
            workers=workers,
            seed=samples.seed + dist.rank,
            batch_sampler=self.sampler,
            collate_fn=partial(collate, crop=samples.augmentation.crop),
            pin_memory=dist.device.type == "cuda",
        )

    @property
    def batches_per_epoch(self) -> int:
        """Of each process."""
        return self.sampler.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[dict[str, Any]]:
        """Batches of an epoch on the device, from one on.

        Raises:
            UserError: a label file of another data set.
        """
        self.sampler.set_epoch(epoch, start)
        for batch in self.loader:
            if batch["fatal"]:
                raise UserError(batch["fatal"])
            moved = {k: batch[k].to(self.device, non_blocking=True) for k in ("images", "labels")}
            yield {**batch, **moved}
