"""A convolutional trunk of timm as a detection backbone that trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from ovdet.parts.fpn import Norm
from training.engine.errors import UserError

STRIDES = (4, 8, 16, 32)  # of the maps; the pyramid adds 64


def batch_norm(eps: float, momentum: float) -> Norm:
    """Channels to a batch norm; ``momentum`` is the share of a new batch in the running statistics."""
    return partial(nn.BatchNorm2d, eps=eps, momentum=momentum)


class Trunk(nn.Module):
    """Maps of strides 4, 8, 16 and 32.

    Args:
        body: a feature extractor of timm (``features_only=True``).
        norm: ``"batch"``: norms train, with the statistics of each batch; ``"fixed"``: scale and shift train, with the
            stored statistics; ``"frozen"``: they are constants.
        frozen: stages that do not train, 0 to 4, from the stem on; their norms keep their statistics.
        eps, momentum: of batch norms.

    Attributes:
        widths: channels of the four maps; mean, std: of pixels in 0..1 that the trunk was trained with.

    Raises:
        ValueError: a trunk without maps of these strides.
    """

    def __init__(
        self, body: nn.Module, *, norm: str = "batch", frozen: int = 0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        levels = {level["reduction"]: i for i, level in enumerate(body.feature_info.get_dicts())}
        lacking = [stride for stride in STRIDES if stride not in levels]
        if lacking:
            raise ValueError(f"it gives maps of strides {sorted(levels)}, and none of {lacking[0]}")
        self.chosen = [levels[stride] for stride in STRIDES]
        self.widths = [body.feature_info.channels()[i] for i in self.chosen]
        data = resolve_model_data_config(body)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = eps, momentum
        self.body = freeze_batch_norm_2d(body) if norm == "frozen" else body
        self.fixed = norm == "fixed"
        # Names, as a module may be replaced: a batch norm by a synchronised one.
        self.frozen = self._first_stages(frozen)
        for name in self.frozen:
            self.body.get_submodule(name).requires_grad_(False)
        self.train()

    def _first_stages(self, number: int) -> list[str]:
        """Names of the body's parts up to the end of stage ``number``; none for 0."""
        if not number:
            return []
        last = self.body.feature_info.get_dicts()[self.chosen[number - 1]]["module"].replace(".", "_")
        names = [name for name, _ in self.body.named_children()]
        if last not in names:
            raise ValueError(f"model.trunk_frozen is {number}, but the trunk's parts are not in a row: use 0")
        return names[: names.index(last) + 1]

    def train(self, mode: bool = True) -> Trunk:
        """Frozen stages stay in eval mode, and norms whose statistics are fixed."""
        super().train(mode)
        for module in self.body.modules() if self.fixed else ():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.eval()
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps ``[B, W_l, H / stride, W / stride]`` of normalised images ``[B, 3, H, W]``."""
        maps = self.body(images)
        return [maps[i] for i in self.chosen]


def load_trunk(name: str, weights: str, *, norm: str, frozen: int, eps: float, momentum: float, seed: int) -> Trunk:
    """A trunk with its weights.

    Args:
        name: of a timm model, with its tag ("resnet50.tv_in1k").
        weights: a file; "": those of the tag, from the hub or its cache; "random": none, drawn from ``seed``.
        norm, frozen, eps, momentum: see :class:`Trunk`.

    Raises:
        UserError: an unknown model, weights that cannot be had, or a trunk that does not fit.
    """
    source = {"pretrained": weights != "random"}
    if weights not in ("", "random"):
        if not Path(weights).is_file():
            raise UserError(f"model.trunk_weights {weights}: no such file; give a file, \"\" or random")
        source["pretrained_cfg_overlay"] = {"file": weights}
    torch.manual_seed(seed)
    try:
        body = timm.create_model(name, features_only=True, **source)
        return Trunk(body, norm=norm, frozen=frozen, eps=eps, momentum=momentum)
    except Exception as error:  # timm, its hub and torch raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(
            f"model.trunk {name} (weights: {weights or 'of its tag'}) cannot be made: {reason}; give a convolutional "
            "model of timm, and a file of its weights as model.trunk_weights where there is no network"
        ) from error
