"""Detectors as library calls::

    import ovdet

    detector = ovdet.load_detector("epoch_3.pt")
    for found in detector(["street.jpg", "kitchen.jpg"], ["cat", "dog", "red car"]):
        print(found["names"], found["scores"], found["boxes"])
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ovdet import files
from ovdet.data.dataset import TestDataset
from ovdet.data.images import read_image
from ovdet.data.loader import collate_test, test_loader
from ovdet.data.transforms import test_view
from ovdet.precision import choose_precision
from ovdet.testing import detect

# Format of a detector file -> module whose ``open_detector(content, path, device, config, overrides)``.
OPENERS = {"fvit": "ovdet.fvit.assemble", "glip": "ovdet.glip.assemble", "vild": "ovdet.vild.assemble"}

Picture = str | Path | Tensor | np.ndarray | Image.Image


class LoadedDetector:
    """A detector that is ready to detect classes of one's choice.

    Several threads may call it, each with classes of its own: the network has one vocabulary, so batches take turns at
    it, and each is detected with the classes of its own call.

    Args:
        detector: in eval mode on its device; see :func:`ovdet.testing.detect`.
        config: its config; sections ``data``, ``train`` (the precision) and ``test`` are read.
        set_classes: makes the detector detect these names.
        set_attributes: makes it say of each detection which of these attributes it has; None: it cannot.
        base, novel: the classes that it was trained with, and those held out then.

    Attributes:
        base, novel: as above; classes: the names that were chosen last; attributes: those that it tells apart.
    """

    def __init__(
        self,
        detector: nn.Module,
        config: Any,
        set_classes: Callable[[Sequence[str]], None],
        *,
        device: torch.device,
        base: Sequence[str] = (),
        novel: Sequence[str] = (),
        set_attributes: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.detector, self.config, self.device = detector, config, device
        self.base, self.novel, self.classes = tuple(base), tuple(novel), ()
        self.attributes: tuple[str, ...] = ()
        self.precision = choose_precision(config.train, device, training=False)
        self._set_classes, self._set_attributes = set_classes, set_attributes
        self._turn = threading.Lock()  # whoever holds it has the network's vocabulary
        self._held: dict[str, tuple[str, ...]] = {"classes": (), "attributes": ()}  # that vocabulary

    def use_classes(self, names: Sequence[str]) -> None:
        """Detect these classes from now on; their embeddings are computed once and cached.

        Raises:
            ValueError: no name, one twice, or something else than names.
        """
        self._choose(names)

    def _choose(self, names: Sequence[str]) -> tuple[str, ...]:
        """:meth:`use_classes`; gives the names."""
        if isinstance(names, str):
            raise ValueError(f"classes are the text {names!r}: give a list of names, such as {names.split(',')}")
        names = tuple(names)
        strangers = [name for name in names if not isinstance(name, str)]
        if strangers:
            raise ValueError(f"classes hold {strangers[0]!r}, which is no name: give a list of texts")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"classes are {list(names)}: give at least one, and none twice")
        with self._turn:
            self._hold(names, self.attributes)
            self.classes = names
        return names

    def use_attributes(self, attributes: Sequence[str]) -> None:
        """Tell these attributes apart from now on (none: no longer): every class may have each of them.

        ``names`` of detections are then "green apple", and scores the joint ones of class and attribute.

        Raises:
            ValueError: one twice, one text in place of a list, or a detector that cannot.
        """
        if isinstance(attributes, str):
            raise ValueError(f"attributes are the text {attributes!r}: give a list, such as {attributes.split(',')}")
        attributes = tuple(attributes)
        if len(set(attributes)) < len(attributes):
            raise ValueError(f"attributes are {list(attributes)}: give none twice")
        if attributes and self._set_attributes is None:
            raise ValueError("this detector tells no attributes apart: name them in the classes (\"green apple\")")
        with self._turn:
            self._hold(self.classes, attributes)
            self.attributes = attributes

    def __call__(
        self, images: Picture | Iterable[Picture], classes: Sequence[str], *, batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """Detections of images, by falling score.

        Args:
            images: one image or several: paths, Pillow images, uint8 tensors ``[3, H, W]`` or arrays ``[H, W, 3]``.
            classes: names to detect.
            batch_size: images at a time.

        Returns:
            Per image ``boxes`` float32 ``[N, 4]`` (xyxy in pixels of the upright image), ``scores`` ``[N]``,
            ``labels`` ``[N]`` (rows of ``classes``), ``names`` (N of them), ``size`` (height, width) and, from a
            detector with masks, ``masks``: N of COCO's run-length dicts.

        Raises:
            ImageError: an image that cannot be read.
            ValueError: classes, a batch size below 1, or something that is no image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        names = self._choose(classes)
        if isinstance(images, (str, Path, Tensor, np.ndarray, Image.Image)):
            images = [images]
        return list(self._found(self._batches(iter(images), batch_size), names, self.attributes))

    def _batches(self, images: Iterator[Picture], batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of images, read as they are needed: there may be more than fit into memory."""
        data, first = self.config.data, 0
        while pictures := list(itertools.islice(images, batch_size)):
            samples = []
            for index, picture in enumerate(pictures, first):
                pixels = as_pixels(picture, exif=data.exif)
                view, size = test_view(pixels, data.image_size, data.resize)
                samples.append({"image": view, "size": size, "original": tuple(pixels.shape[-2:]), "index": index})
            first += len(pictures)
            yield collate_test(samples)

    def detect_files(
        self,
        paths: Sequence[str],
        *,
        batch_size: int = 1,
        workers: int = 0,
        keep_pixels: bool = False,
        on_skipped: Callable[[list[tuple[str, str]], int], None] | None = None,
        wrap: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> Iterator[dict[str, Any]]:
        """Detections of image files, read by worker processes, of the classes in use when it is called.

        What :meth:`__call__` gives, with ``index`` (of the path) and, where asked for, ``pixels`` (the upright image).

        Args:
            on_skipped: told the unusable (file, reason) pairs of a batch and the number of its usable images.
            wrap: put round the batches, such as a progress bar.
        """
        data = self.config.data
        dataset = TestDataset(
            paths, root="", image_size=data.image_size, resize=data.resize, exif=data.exif, keep_pixels=keep_pixels
        )
        loader = test_loader(
            dataset, batch_size=batch_size, workers=workers, rank=0, world_size=1, pin=self.device.type == "cuda"
        )

        def batches() -> Iterator[dict[str, Any]]:
            for batch in wrap(loader):  # begins with the first result that is asked for
                if on_skipped is not None:
                    on_skipped(batch["skipped"], len(batch["indices"]))
                yield batch

        return self._found(batches(), self.classes, self.attributes)

    def _hold(self, classes: tuple[str, ...], attributes: tuple[str, ...]) -> None:
        """See that the network has this vocabulary. For whoever holds :attr:`_turn`."""
        wanted = {"classes": (classes, self._set_classes), "attributes": (attributes, self._set_attributes)}
        for kind, (names, choose) in wanted.items():
            if names != self._held[kind]:
                choose(names)
                self._held[kind] = names

    def _found(
        self, batches: Iterable[dict[str, Any]], classes: tuple[str, ...], attributes: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        """Detections with a vocabulary of their own, whichever others are asked for between two batches."""
        test = self.config.test
        for batch in batches:  # read outside of the turn
            with self._turn:
                self._hold(classes, attributes)
                results = list(
                    detect(
                        self.detector, [batch], device=self.device, precision=self.precision,
                        mask_threshold=test.mask_threshold, repeat_edges=test.mask_edges == "repeated",
                    )
                )  # fmt: skip
            for found in results:
                found["size"] = found.pop("original")
                names = [classes[label] for label in found["labels"]]
                if "attributes" in found:
                    names = [f"{attributes[a]} {n}" for a, n in zip(found["attributes"], names, strict=True)]
                yield found | {"names": names}


def load_detector(
    file: str | Path,
    *,
    device: str | torch.device | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> LoadedDetector:
    """A detector of a file that ``train.py`` or ``tools/convert_detector.py`` wrote.

    Args:
        device: a GPU where there is one, by default.
        config: a config file in place of the config that the detector was trained with.
        overrides: config values, ``"section.key=value"``: ``"test.score=0.3"``, ``"model.cache_dir=FILE"`` where the
            ViT's weights are elsewhere now.

    Raises:
        UserError: the file, or the ViT's weights that it names, are missing, damaged or of another kind.
        ValueError: overrides that are one text.
    """
    if isinstance(overrides, str):
        raise ValueError(f"overrides are the text {overrides!r}: give a list, such as [{overrides!r}]")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    content = files.load(file, kinds=tuple(OPENERS))
    opener = importlib.import_module(OPENERS[content["format"]])
    return opener.open_detector(content, str(file), place, config, overrides)


def as_pixels(picture: Picture, *, exif: bool = True) -> Tensor:
    """An image as RGB uint8 ``[3, H, W]``; see :meth:`LoadedDetector.__call__`.

    Raises:
        ImageError: a file that cannot be read.
        ValueError: something that is no image.
    """
    if isinstance(picture, (str, Path)):
        return read_image(str(picture), exif=exif)
    if isinstance(picture, Image.Image):
        picture = np.asarray((ImageOps.exif_transpose(picture) if exif else picture).convert("RGB"))
    if not isinstance(picture, (Tensor, np.ndarray)):
        raise ValueError(f"an image is of type {type(picture).__name__}: give a path, a Pillow image or an array")
    own, kind = tuple(picture.shape), str(picture.dtype).removeprefix("torch.")
    channels_at = 0 if isinstance(picture, Tensor) else -1
    if kind != "uint8" or len(own) != 3 or own[channels_at] != 3 or 0 in own:
        raise ValueError(
            f"an image is an array of {kind} and shape {own}: give uint8 RGB, tensors as [3, H, W] and numpy arrays as "
            "[H, W, 3]"
        )
    return picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture)).movedim(-1, 0)
