"""What detectors of two stages have in common: proposals that heads judge, with masks where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovdet.files import check_state
from ovdet.parts.mask_head import MaskHead
from ovdet.parts.pixels import normalize_padded
from ovdet.parts.rois import Samples, check_labels


def rpn_settings(model: Any) -> dict[str, Any]:
    """What a section ``model`` says to :class:`~ovdet.parts.rpn.RPN`, whichever the detector."""
    return {
        "convs": model.rpn_convs, "anchor_scale": model.anchor_scale, "anchor_ratios": model.anchor_ratios,
        "anchor_offset": model.anchor_offset, "samples": model.rpn_samples,
        "positive_share": model.rpn_positive_share, "positive_iou": model.rpn_positive_iou,
        "negative_iou": model.rpn_negative_iou, "pre_nms": model.rpn_pre_nms, "post_nms": model.rpn_post_nms,
        "nms": model.rpn_nms, "padding": model.rpn_padding,
    }  # fmt: skip


class TwoStageDetector(nn.Module):
    """A detector without its own parts: it gives :meth:`_losses` and :meth:`_detect`.

    Boxes are float ``[N, 4]``, xyxy in pixels of the padded input.

    Attributes:
        class_embeddings: of the classes that it detects; base_mask: bool ``[C]``, those with training labels.
        mask_head: None for none.
        pixels: mean and std of the input; zero_padding: see :func:`ovdet.parts.pixels.normalize_padded`.
    """

    class_embeddings: Tensor
    base_mask: Tensor
    mask_head: MaskHead | None
    pixels: tuple[Sequence[float], Sequence[float]]
    zero_padding: bool

    # -- vocabulary and state -----------------------------------------------------------------------------------------

    def _unit_rows(self, embeddings: Tensor, kind: str) -> Tensor:
        """Embeddings of unit length, on the device. ValueError where rows have no direction."""
        bad = (~embeddings.isfinite().all(dim=1) | (embeddings == 0).all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"{kind} embeddings in rows {bad[:5]} are zero or not finite: make the embeddings anew")
        return F.normalize(embeddings.detach().to(self.class_embeddings.device, torch.float32), dim=-1)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """State of the trained parts: no embeddings."""
        return self.state_dict()

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load :meth:`trainable_state_dict`. The mask head is left out when this detector has none.

        Raises:
            ValueError: entries are missing, left over or of another shape.
        """
        if self.mask_head is None:
            state = {name: value for name, value in state.items() if not name.startswith("mask_head.")}
        check_state(self.trainable_state_dict(), state)
        self.load_state_dict(state, strict=False)

    # -- running ------------------------------------------------------------------------------------------------------

    def prepare(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | Tensor) -> Tensor:
        """Input of :meth:`forward` from uint8 images ``[B, 3, S, S]``, padded right and bottom with black."""
        mean, std = self.pixels
        return normalize_padded(images, image_sizes, mean, std, zero=self.zero_padding)

    def check_targets(self, targets: Sequence[dict[str, Tensor]]) -> None:
        """See that targets can be trained on.

        Raises:
            ValueError: labels of novel classes, or no masks where they are needed.
        """
        check_labels(targets, self.base_mask)
        if self.mask_head is not None and any("masks" not in target for target in targets):
            raise ValueError("targets hold no masks: give them, or set model.masks=false")

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in eval mode.

        Args:
            images: ``[B, 3, S, S]``, normalised, padded right and bottom.
            image_sizes: (height, width) of the valid area of each image, in pixels of the padded input.
            targets: per image ``boxes`` ``[N, 4]``, ``labels`` int64 ``[N]`` (0..C-1, base classes only), for a
                detector with masks ``masks`` bool ``[N, S, S]``, and what else the detector learns from. N may be 0.
                Ignored in eval mode.

        Returns:
            In training mode losses by name, such as ``loss_rpn_class``, ``loss_rpn_box``, ``loss_class``, ``loss_box``
            and, with masks, ``loss_mask``; their sum is the objective. What is sampled comes from torch's default
            generator. In eval mode, per image and by falling score, ``boxes``, ``scores`` ``[N]``, ``labels`` ``[N]``
            and, with masks, ``masks``: probabilities ``[N, m, m]`` in the frame of the box, which
            :func:`ovdet.parts.masks.paste_masks` puts into an image of any size.

        Raises:
            ValueError: training without targets, with labels of novel classes, or without the masks that are needed.
        """
        if not self.training:
            return self._detect(images, image_sizes)
        if targets is None:
            raise ValueError("the detector is in training mode and got no targets: call eval() to detect")
        return self._losses(images, image_sizes, targets)

    def _losses(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _detect(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    def _mask_loss(
        self, maps: Sequence[Tensor], samples: Samples, targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """``loss_mask`` of the positives among sampled boxes; nothing without a mask head."""
        if self.mask_head is None:
            return {}
        boxes = [b[: len(which)] for b, which in zip(samples.boxes, samples.positives, strict=True)]
        masks = [target["masks"] for target in targets]
        return {
            "loss_mask": self.mask_head.losses(maps, boxes, samples.positives, masks, fallback=samples.boxes[0][0])
        }

    @torch.no_grad()
    def add_masks(self, maps: Sequence[Tensor], results: Sequence[dict[str, Tensor]]) -> None:
        """Give results ``masks``, where this detector has any."""
        if self.mask_head is None:
            return
        found = [result["boxes"] for result in results]
        masks = self.mask_head(maps, found).float().sigmoid()
        for result, mask in zip(results, masks.split([len(b) for b in found]), strict=True):
            result["masks"] = mask
