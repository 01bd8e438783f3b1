"""Preparation of whole images for the global reading, with OpenCLIP's calls; built from torchvision's transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms import functional as F

from .image_tower import OPENAI_MEAN, OPENAI_STD

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = {"bicubic": T.InterpolationMode.BICUBIC, "bilinear": T.InterpolationMode.BILINEAR}


@dataclass
class PreprocessCfg:
    """How a model wants its images.

    Attributes:
        size: native size in pixels, a side or (height, width).
        mode: colour mode of Pillow; only RGB.
        mean, std: pixel normalisation, of values in 0..1.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: ``"shortest"`` (shortest side to the size, centre crop), ``"longest"`` (longest side, centred on
            ``fill_color``) or ``"squash"`` (aspect ratio not kept).
        fill_color: value 0..255 around an image that does not fill the square.
    """

    size: int | tuple[int, int] = 224
    mode: str = "RGB"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        self.mean, self.std = _three("image_mean", self.mean), _three("image_std", self.std)
        if any(v <= 0 for v in self.std):
            raise ValueError(f"image_std is {self.std}: every value must be above 0")
        if self.mode != "RGB":
            raise ValueError(f'image mode is "{self.mode}": the models read RGB')
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f'interpolation is "{self.interpolation}": use {" or ".join(INTERPOLATIONS)}')
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f'resize_mode is "{self.resize_mode}": use {", ".join(RESIZE_MODES)}')

    @staticmethod
    def of(cfg: dict[str, Any] | PreprocessCfg) -> PreprocessCfg:
        """From a dict as it stands in ``preprocess_cfg``. ValueError for unknown keys."""
        if isinstance(cfg, PreprocessCfg):
            return cfg
        known = {f.name for f in dataclasses.fields(PreprocessCfg)}
        if unknown := sorted(set(cfg) - known):
            raise ValueError(
                f"preprocess_cfg has unknown keys {', '.join(unknown)}: known are {', '.join(sorted(known))}"
            )
        return PreprocessCfg(**cfg)


def _three(name: str, values: Sequence[float] | float) -> tuple[float, ...]:
    values = tuple(float(v) for v in values) if isinstance(values, Sequence) else (float(values),) * 3
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} values: give three, for red, green and blue")
    return values


@dataclass
class AugmentationCfg:
    """Random changes of training images.

    Attributes:
        scale: share of the area that a random crop covers.
        ratio: its aspect ratios; 3/4 to 4/3 when None.
        color_jitter: strength of brightness, contrast, saturation (and hue).
        re_prob, re_count: random erasing (``use_timm`` only).
        use_timm: augment by ``timm.data.create_transform``.
        color_jitter_prob: share of images whose colours are changed (without ``use_timm``).
        gray_scale_prob: share of images that become grey (without ``use_timm``).
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] | None = None
    color_jitter: float | tuple[float, ...] | None = None
    re_prob: float | None = None
    re_count: int | None = None
    use_timm: bool = False
    color_jitter_prob: float | None = None
    gray_scale_prob: float | None = None


class ResizeKeepRatio(nn.Module):
    """Resize a PIL image or ``[..., H, W]`` until it just covers (or just fits into) a size.

    Args:
        size: (height, width).
        longest: fit into the size instead of covering it.
    """

    def __init__(
        self, size: tuple[int, int], longest: bool, interpolation: T.InterpolationMode = T.InterpolationMode.BICUBIC
    ) -> None:
        super().__init__()
        self.size, self.longest, self.interpolation = size, longest, interpolation

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = F.get_dimensions(image)
        factors = self.size[0] / height, self.size[1] / width
        factor = min(factors) if self.longest else max(factors)
        size = [max(round(height * factor), 1), max(round(width * factor), 1)]
        return F.resize(image, size, interpolation=self.interpolation, antialias=True)


class CenterCropOrPad(nn.Module):
    """Centre a PIL image or ``[..., H, W]`` on a canvas of a size: cut what is outside, fill what is empty.

    Where a border is odd, the smaller half is on the left and on top.
    """

    def __init__(self, size: tuple[int, int], fill: int = 0) -> None:
        super().__init__()
        self.size, self.fill = size, fill

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        _, height, width = F.get_dimensions(image)
        missing = [max(self.size[1] - width, 0), max(self.size[0] - height, 0)]
        left, top = (m // 2 for m in missing)
        if any(missing):
            image = F.pad(image, [left, top, missing[0] - left, missing[1] - top], fill=self.fill)
        return F.center_crop(image, list(self.size))


class ToRGB(nn.Module):
    """A PIL image of any mode as RGB; tensors pass."""

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        return image.convert("RGB") if isinstance(image, Image.Image) else image


class ToFloat(nn.Module):
    """A PIL image or uint8 ``[3, H, W]`` as float32 ``[3, H, W]`` in 0..1; a float tensor passes."""

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            return F.to_tensor(image)
        return image if image.is_floating_point() else F.convert_image_dtype(image)


def image_transform(
    image_size: int | tuple[int, int],
    is_train: bool,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: dict[str, Any] | AugmentationCfg | None = None,
) -> T.Compose:
    """Preparation of whole images: PIL image or uint8 ``[3, H, W]`` -> normalised float32 ``[3, h, w]``.

    The steps stand in ``.transforms``; the last is a ``Normalize`` with ``mean`` and ``std``. PIL images are resized by
    Pillow, so that the pixels are those that OpenCLIP gives a model.

    Args:
        image_size: side, or (height, width).
        is_train: a random crop, bicubic (and ``aug_cfg``), instead of ``resize_mode`` and ``interpolation``.
        mean, std: pixel normalisation; CLIP's when None.
        resize_mode, interpolation, fill_color: see :class:`PreprocessCfg`.
        aug_cfg: an :class:`AugmentationCfg`, or a dict of its values.

    Raises:
        ValueError: unknown modes or keys, or an augmentation that only ``use_timm`` has.
    """
    cfg = PreprocessCfg(
        mean=OPENAI_MEAN if mean is None else mean,
        std=OPENAI_STD if std is None else std,
        interpolation=interpolation or "bicubic",
        resize_mode=resize_mode or "shortest",
        fill_color=fill_color,
    )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size is {image_size}: give a side, or height and width, in pixels")
    return _training(size, cfg, _augmentation(aug_cfg)) if is_train else _evaluation(size, cfg)


def _augmentation(aug_cfg: dict[str, Any] | AugmentationCfg | None) -> AugmentationCfg:
    if isinstance(aug_cfg, AugmentationCfg):
        return aug_cfg
    known = {f.name for f in dataclasses.fields(AugmentationCfg)}
    if unknown := sorted(set(aug_cfg or {}) - known):
        raise ValueError(f"aug_cfg has unknown keys {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    return AugmentationCfg(**(aug_cfg or {}))


def _evaluation(size: tuple[int, int], cfg: PreprocessCfg) -> T.Compose:
    mode = INTERPOLATIONS[cfg.interpolation]
    if cfg.resize_mode == "squash":
        steps = [T.Resize(size, interpolation=mode)]
    elif cfg.resize_mode == "longest":
        steps = [ResizeKeepRatio(size, longest=True, interpolation=mode), CenterCropOrPad(size, fill=cfg.fill_color)]
    elif size[0] == size[1]:
        steps = [T.Resize(size[0], interpolation=mode), T.CenterCrop(size)]
    else:
        steps = [ResizeKeepRatio(size, longest=False, interpolation=mode), T.CenterCrop(size)]
    return T.Compose([*steps, ToRGB(), ToFloat(), T.Normalize(mean=cfg.mean, std=cfg.std)])


def _training(size: tuple[int, int], cfg: PreprocessCfg, aug: AugmentationCfg) -> T.Compose:
    if aug.use_timm:
        return _timm_training(size, cfg, aug)
    if aug.re_prob or aug.re_count:
        raise ValueError("aug_cfg asks for random erasing (re_prob, re_count): that is timm's, set use_timm=True")
    ratio = {} if aug.ratio is None else {"ratio": tuple(aug.ratio)}
    # Bicubic always, as OpenCLIP crops for training, also for models whose evaluation is bilinear.
    crop = T.RandomResizedCrop(size, scale=tuple(aug.scale), interpolation=INTERPOLATIONS["bicubic"], **ratio)
    steps: list[Callable] = [crop, ToRGB()]
    if aug.color_jitter_prob:
        strength = aug.color_jitter
        if not isinstance(strength, Sequence) or len(strength) not in (3, 4):
            raise ValueError(f"color_jitter is {strength}: give brightness, contrast, saturation and hue")
        steps.append(T.RandomApply([T.ColorJitter(*strength)], p=aug.color_jitter_prob))
    if aug.gray_scale_prob:
        steps.append(T.RandomGrayscale(p=aug.gray_scale_prob))
    return T.Compose([*steps, ToFloat(), T.Normalize(mean=cfg.mean, std=cfg.std)])


def _timm_training(size: tuple[int, int], cfg: PreprocessCfg, aug: AugmentationCfg) -> T.Compose:
    from timm.data import create_transform

    if aug.color_jitter_prob or aug.gray_scale_prob:
        raise ValueError("aug_cfg has color_jitter_prob or gray_scale_prob with use_timm: they go without it")
    return create_transform(
        input_size=(3, *size), is_training=True, hflip=0.0, mean=cfg.mean, std=cfg.std, re_mode="pixel",
        interpolation=cfg.interpolation, scale=tuple(aug.scale), ratio=aug.ratio, color_jitter=aug.color_jitter,
        re_prob=aug.re_prob or 0.0, re_count=aug.re_count or 1,
    )  # fmt: skip
