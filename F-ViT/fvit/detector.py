"""The detector: frozen ViT, pyramid, region proposals, box and mask heads, fusion with the VLM's own scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from open_clip import CLIP

from .config import Config


class Detector(nn.Module):
    """Open-vocabulary detector (F-ViT). C classes; a last row of the class embeddings stands for background.

    Boxes are float ``[N, 4]``, xyxy in pixels of the padded input. The trainable parts are everything but
    ``backbone.vit``; the ViT is frozen and stays in eval mode whatever :meth:`train` is told.
    """

    def set_vocabulary(self, class_embeddings: Tensor, base_mask: Tensor) -> None:
        """Detect other classes from now on: ``[C+1, D]`` (background last) and bool ``[C]`` (True = base)."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses when training, detections in eval mode.

        Args:
            images: ``[B, 3, S, S]``, normalised, padded right and bottom.
            image_sizes: (height, width) of the valid area of each image, in pixels of the padded input.
            targets: per image ``boxes`` ``[N, 4]``, ``labels`` int64 ``[N]`` (0..C-1, base classes only) and, for a
                detector with masks, ``masks`` bool ``[N, S, S]``. N may be 0. Ignored in eval mode.

        Returns:
            In training mode ``loss_rpn_class``, ``loss_rpn_box``, ``loss_class``, ``loss_box`` and ``loss_mask``;
            their sum is the objective. In eval mode, per image and by falling score, ``boxes``, ``scores`` ``[N]``,
            ``labels`` ``[N]`` and, with masks, ``masks``: probabilities ``[N, 28, 28]`` in the frame of the box, which
            :func:`fvit.mask_head.paste_masks` puts into an image of any size.
        """
        raise NotImplementedError

    def proposals(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Class-agnostic proposals per image: ``boxes`` (refined once), ``scores`` (objectness), by falling score."""
        raise NotImplementedError

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """State of the trained parts: no ViT, no class embeddings."""
        raise NotImplementedError

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load :meth:`trainable_state_dict`; ValueError when entries are missing, left over or of another shape."""
        raise NotImplementedError


def build_detector(config: Config, clip_model: CLIP, class_embeddings: Tensor, base_mask: Tensor) -> Detector:
    """A detector on the image tower of a CLIP model.

    Args:
        clip_model: its image tower is frozen in place and becomes part of the detector; the text tower does not.
        class_embeddings: float ``[C+1, D]``, all classes evaluated, last row background.
        base_mask: bool ``[C]``, True for classes with training labels.

    Raises:
        ValueError: shapes that do not fit each other or the model.
    """
    raise NotImplementedError
