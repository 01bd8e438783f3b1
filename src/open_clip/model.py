"""CLIP with dense and region embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_boxes, check_images, check_masks
from .image_tower import ImageTower
from .padding import Sizes
from .readouts import Readout
from .regions import box_masks, mask_features, roi_features
from .text_tower import TextTower
from .upstream_api import CLIPAPI


class CLIP(CLIPAPI, nn.Module):
    """Image tower, text tower and temperature, with the calls of OpenCLIP plus dense and region embeddings.

    Images are float ``[B, 3, H, W]``, normalised with :attr:`visual` ``.image_mean`` / ``.image_std``; both sides any
    multiple of ``visual.patch_size``. D is the joint dimension. ``normalize=True`` returns vectors of unit length.

    Args:
        visual: image tower.
        text: text tower.
        init_logit_scale: initial log temperature (``log(1 / 0.07)`` in CLIP).
        init_logit_bias: initial bias of a sigmoid-loss model (SigLIP); None for a softmax one.
        output_dict: whether :meth:`forward` returns a dict instead of a tuple.
    """

    def __init__(
        self,
        visual: ImageTower,
        text: TextTower,
        *,
        init_logit_scale: float = 2.6592600369327779,  # log(1 / 0.07)
        init_logit_bias: float | None = None,
        output_dict: bool = False,
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        # float(): configs write -10 as well as -10.0, and a tensor of an integer takes no gradient.
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        self.output_dict = output_dict

    @property
    def context_length(self) -> int:
        """Tokens that the text tower takes at most."""
        return self.text.context_length

    @property
    def embed_dim(self) -> int:
        """Joint dimension D."""
        return self.visual.embed_dim

    # -- whole images and texts -----------------------------------------------------------------------------------

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Global image embedding ``[B, D]``."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text embedding ``[B, D]`` of token ids ``[B, L]``."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple | dict:
        """Normalised image and text embeddings and the temperature, as OpenCLIP returns them.

        Returns:
            ``(image_features, text_features, exp(logit_scale)[, logit_bias])``, or a dict with these names when
            ``output_dict`` is set. Features of an argument that is None are None.
        """
        out = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out if self.output_dict else tuple(out.values())

    # -- dense and region embeddings ------------------------------------------------------------------------------

    # The ``readout`` of these calls is a dense reading (:mod:`open_clip.readouts`): a name, or one built for the image
    # tower; None for the model's own, ``visual.readout``, which is the value path unless its weights name another.

    def encode_dense(
        self,
        image: Tensor,
        normalize: bool = False,
        keep_shape: bool = False,
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Dense embedding: ``[B, h*w, D]``, or as a map ``[B, D, h, w]`` when the shape is kept.

        Args:
            normalize: unit length per cell. On the value path, and on most others, cells have it in any case.
            keep_shape: the published default is False.
            readout: dense reading.
            sizes: per image the pixels (height, width) that it takes of the input, top left, where the rest is padding;
                see :meth:`open_clip.ImageTower.encode_dense`. ``dense_transform`` tells them.
        """
        features = self.visual.encode_dense(image, keep_shape=keep_shape, readout=readout, sizes=sizes)
        return F.normalize(features, dim=1 if keep_shape else -1) if normalize else features

    def encode_pseudo_boxes(
        self,
        image: Tensor,
        normed_boxes: Sequence[Tensor],
        normalize: bool = False,
        extract_type: str = "v2",
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Embedding of each box.

        Args:
            image: ``[B, 3, H, W]``.
            normed_boxes: one ``[K_i, 4]`` per image, xyxy in 0..1 of the (padded) input image; ``K_i`` may be 0.
            extract_type: ``"v2"`` (RoIAlign of the dense map) or ``"v1"`` (one masked token per box; CLIP ViT only).
                The published default is "v1", but all published training and evaluation asks for "v2".
            readout: dense reading that "v2" pools.
            sizes: of the pictures within the padded input, see :meth:`encode_dense`; boxes lie on them.

        Returns:
            ``[sum K_i, D]``, images one after the other.

        Raises:
            ValueError: another extract type, "v1" with a trunk that is not a CLIP ViT, or with a dense reading.
        """
        check_images(image)
        check_boxes(normed_boxes, len(image))
        if extract_type == "v2":
            features = roi_features(self.visual.encode_dense(image, readout=readout, sizes=sizes), normed_boxes)
        elif extract_type == "v1":
            self._refuse_readout(readout, 'extract type "v1"')
            features = self.visual.encode_region_tokens(image, box_masks(normed_boxes, self.visual.grid(image)))
        else:
            raise ValueError(f'extract_type is "{extract_type}": use "v2" or "v1"')
        return F.normalize(features, dim=-1) if normalize else features

    def encode_masks(
        self,
        image: Tensor,
        masks: Sequence[Tensor],
        normalize: bool = True,
        mask_attn: bool = False,
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Embedding ``[sum K_i, D]`` of each mask.

        Args:
            masks: one bool ``[K_i, h, w]`` per image on the grid of cells.
            normalize: the published default is True.
            mask_attn: one token per mask that attends inside it (CLIP ViT only) instead of the mean of the dense map.
            readout: dense reading whose map is averaged.
            sizes: of the pictures within the padded input, see :meth:`encode_dense`; masks lie on them.

        Raises:
            ValueError: ``mask_attn`` with a trunk that is not a CLIP ViT, or with a dense reading.
        """
        if mask_attn:
            self._refuse_readout(readout, "mask attention")
            check_masks(masks, len(image), self.visual.grid(image), pooled=False)
            features = self.visual.encode_region_tokens(image, masks)
        else:
            features = mask_features(self.visual.encode_dense(image, readout=readout, sizes=sizes), masks)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_regions(
        self,
        image: Tensor,
        normed_boxes: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        normalize: bool = False,
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Boxes and masks from one dense pass: (``[sum K_i, D]`` or None, ``[sum M_i, D]`` or None)."""
        check_images(image)
        if normed_boxes is not None:
            check_boxes(normed_boxes, len(image))
        dense = self.visual.encode_dense(image, readout=readout, sizes=sizes)
        boxes = None if normed_boxes is None else roi_features(dense, normed_boxes)
        pooled = None if masks is None else mask_features(dense, masks)
        if normalize:
            boxes, pooled = (None if f is None else F.normalize(f, dim=-1) for f in (boxes, pooled))
        return boxes, pooled

    def encode_rois_and_image(
        self,
        image: Tensor,
        normed_boxes: Sequence[Tensor],
        readout: str | Readout | None = None,
        sizes: Sizes | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Box embeddings ``[sum K_i, D]`` and global embeddings ``[B, D]``, both of unit length."""
        boxes = self.encode_pseudo_boxes(image, normed_boxes, normalize=True, readout=readout, sizes=sizes)
        return boxes, self.encode_image(image, normalize=True)

    @staticmethod
    def _refuse_readout(readout: str | Readout | None, who: str) -> None:
        if readout is not None:
            name = readout.name if isinstance(readout, Readout) else readout
            raise ValueError(f'{who} reads no dense map, so it has no use for the reading "{name}": leave it out')

    # -- training -------------------------------------------------------------------------------------------------

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except its last ``unlocked_groups`` groups; 0 freezes all of it.

        EVA: a group is a block. CLIP ViT: {patch embedding, class token, pre-norm}, {positions}, then each block. The
        final norm and projection stay frozen. ``freeze_bn_stats`` has nothing to act on (these trunks have no batch
        norm) and is accepted for OpenCLIP's callers.
        """
        self.visual.lock(unlocked_groups)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass, on the global, dense and text paths."""
        self.visual.grad_checkpointing = enable
        self.text.set_grad_checkpointing(enable)
