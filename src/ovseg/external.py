"""Another model's dense map, whose similarities decide which cells share their values (ProxyCLIP, ECCV 2024)."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from training.engine.errors import UserError


class ExternalModel(nn.Module):
    """The cells of a timm trunk: ``[B, 3, H, W]`` to ``[B, C, H', W']``, on the trunk's own grid.

    Transformers give the output of their last norm without prefix tokens, convolutional trunks their last map.

    Args:
        trunk: a timm model without a head.
        mean, std: pixel normalisation that the trunk wants (RGB, of values in 0..1).
    """

    def __init__(self, trunk: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.trunk = trunk.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def patch_size(self) -> int:
        """Pixels of a cell: both sides of an input must be multiples of it."""
        embed = getattr(self.trunk, "patch_embed", None)
        if embed is not None and hasattr(embed, "patch_size"):
            size = embed.patch_size
            return int(size[0] if isinstance(size, (tuple, list)) else size)
        return int(self.trunk.feature_info[-1]["reduction"])

    @torch.no_grad()
    def forward(self, image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """Features of images that were normalised with another model's mean and deviation.

        Raises:
            ValueError: a side that is no multiple of :attr:`patch_size`.
        """
        height, width = image.shape[-2:]
        patch = self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"input of {height} x {width} pixels: both sides must be multiples of {patch}")
        old_mean, old_std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (mean, std))
        pixels = image * (old_std / self.std) + (old_mean - self.mean) / self.std
        features = self.trunk.forward_features(pixels)
        if features.dim() == 3:
            tokens = features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]
            return tokens.transpose(1, 2).unflatten(2, (height // patch, width // patch))
        channels_last = features.shape[1] != self.trunk.num_features and features.shape[3] == self.trunk.num_features
        return features.permute(0, 3, 1, 2) if channels_last else features


def load_external(spec: str, device: torch.device | str = "cpu") -> ExternalModel:
    """A timm trunk by name, with its published weights or those of a file.

    Args:
        spec: ``NAME`` (weights are downloaded), ``NAME:FILE``, or ``NAME:random``. ProxyCLIP's own choice is
            ``vit_base_patch8_224.dino``.

    Raises:
        UserError: unknown name, or weights that cannot be had or do not fit.
    """
    name, _, weights = spec.partition(":")
    options: dict = {"num_classes": 0, "pretrained": weights != "random"}
    if weights and weights != "random":
        if not Path(weights).is_file():
            raise UserError(f"--external {spec}: {weights} is no file; use NAME, NAME:FILE or NAME:random")
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        try:
            trunk = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # a convolutional trunk takes any size as it is
            trunk = timm.create_model(name, **options)
    except Exception as error:  # timm, the hub and torch raise many kinds for names and files
        raise UserError(f"--external {spec}: {str(error).strip().splitlines()[0][:200]}") from None
    config = trunk.pretrained_cfg
    return ExternalModel(trunk, tuple(config["mean"]), tuple(config["std"])).to(device)
