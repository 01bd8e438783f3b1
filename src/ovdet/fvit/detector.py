"""The detector: frozen ViT, pyramid, region proposals, box and mask heads, fusion with the VLM's own scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from open_clip import CLIP, ImageTower
from ovdet.fvit.backbone import FrozenViT
from ovdet.fvit.config import FViTConfig
from ovdet.fvit.fusion import vlm_probabilities
from ovdet.parts.box_head import BoxHead
from ovdet.parts.classifier import CosineClassifier
from ovdet.parts.fpn import Neck, level_strides
from ovdet.parts.losses import classification_loss
from ovdet.parts.mask_head import MaskHead
from ovdet.parts.pixels import IMAGENET_MEAN, IMAGENET_STD
from ovdet.parts.rois import sample_rois
from ovdet.parts.rpn import RPN
from ovdet.parts.scores import class_probabilities, fuse, select_detections
from ovdet.two_stage import TwoStageDetector, rpn_settings

FROZEN = "backbone."  # prefix of what is not trained


class Detector(TwoStageDetector):
    """Open-vocabulary detector (F-ViT; CLIPSelf, ICLR 2024, section 4). C classes, and background.

    See :class:`~ovdet.two_stage.TwoStageDetector`. The trainable parts are everything but
    ``backbone``; the ViT is frozen and stays in eval mode whatever :meth:`train` is told. Batch norms are
    ``BatchNorm2d``: convert them with ``timm.layers.convert_sync_batchnorm`` to train on several GPUs.

    Args:
        config: sections ``model`` and ``test`` are read.
        visual: image tower, frozen in place.
    """

    def __init__(self, config: FViTConfig, visual: ImageTower) -> None:
        super().__init__()
        model = config.model
        self.config, self.test_config = model, config.test
        self.strides = level_strides(visual.patch_size)
        pooling = {"sampling": model.roi_sampling, "finest": model.roi_finest or 14 * self.strides[0]}
        if model.drop_padding:
            visual.set_drop_padding(True)
        self.backbone = FrozenViT(visual, model.blocks, model.readout or None)
        self.neck = Neck(self.backbone.width, model.channels)
        self.rpn = RPN(
            model.channels, self.strides, norm=nn.BatchNorm2d if model.rpn_norm else None, **rpn_settings(model),
            empty_counts_one=model.rpn_empty_counts_one, limit_below=model.box_limit_below,
        )  # fmt: skip
        self.classifier = CosineClassifier(model.temperature, model.temperature_kind)
        # The fifth level is for proposals only, as in Mask R-CNN.
        self.box_head = BoxHead(
            model.channels, visual.embed_dim, self.strides[:4], size=model.box_size, convs=model.box_convs,
            fcs=model.box_fcs, width=model.box_width or visual.embed_dim, own_fcs=model.box_own_fcs,
            embedding_relu=model.embedding_relu, limit_below=model.box_limit_below, **pooling,
        )  # fmt: skip
        self.mask_head = None
        if model.masks:
            self.mask_head = MaskHead(
                model.channels, self.strides[:4], size=model.mask_size, convs=model.mask_convs, **pooling
            )
        imagenet, zero = config.data.pixels == "imagenet", config.data.padding == "zero"
        self.pixels = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (visual.image_mean, visual.image_std)
        self.zero_padding = zero
        for part in (self.neck, self.rpn, self.box_head, self.mask_head):
            if part is not None:  # convolutions are faster so, those of many small RoIs above all
                part.to(memory_format=torch.channels_last)
        # Not part of any state: the vocabulary is the user's.
        self.register_buffer("class_embeddings", torch.zeros(1, visual.embed_dim), persistent=False)
        self.register_buffer("base_mask", torch.zeros(0, dtype=torch.bool), persistent=False)

    # -- vocabulary and state ---------------------------------------------------------------------------------------

    def set_vocabulary(self, class_embeddings: Tensor, base_mask: Tensor) -> None:
        """Detect these classes from now on.

        Args:
            class_embeddings: ``[C+1, D]``, last row background; brought to unit length here.
            base_mask: bool ``[C]``, True for classes with training labels.

        Raises:
            ValueError: shapes that do not fit, or rows that are zero or not finite.
        """
        dim = self.class_embeddings.shape[1]
        if class_embeddings.ndim != 2 or class_embeddings.shape[1] != dim:
            raise ValueError(
                f"class embeddings are of shape {tuple(class_embeddings.shape)}, the model needs [classes + 1, {dim}]: "
                "make them with the text tower of the same model"
            )
        if len(class_embeddings) != len(base_mask) + 1:
            raise ValueError(
                f"{len(class_embeddings)} class embeddings for {len(base_mask)} classes: give one per class and a last "
                'one for "background"'
            )
        self.class_embeddings = self._unit_rows(class_embeddings, "class")
        self.base_mask = base_mask.to(self.class_embeddings.device, torch.bool)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """State of the trained parts: no ViT, no class embeddings."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(FROZEN)}

    # -- running ----------------------------------------------------------------------------------------------------

    def _losses(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        classes = len(self.base_mask)
        self.check_targets(targets)
        maps = self.neck(self.backbone(images, image_sizes, dense=False).levels)
        out = self.rpn(maps)
        model, truth = self.config, [target["boxes"] for target in targets]
        rpn_class, rpn_box = self.rpn.losses(out, image_sizes, truth)
        proposals, _ = self.rpn.propose(out, image_sizes)
        samples = sample_rois(
            proposals, image_sizes, truth, [target["labels"] for target in targets], classes,
            number=model.roi_samples, positive_share=model.roi_positive_share, iou=model.roi_iou,
            low_quality=model.roi_low_quality, truth_keeps_label=model.roi_truth_keeps_label,
        )  # fmt: skip
        embeddings, offsets = self.box_head(maps[:4], samples.boxes)
        logits = self.classifier(embeddings, self.class_embeddings)
        losses = {
            "loss_rpn_class": rpn_class,
            "loss_rpn_box": rpn_box,
            "loss_class": classification_loss(logits, samples.labels, self.base_mask, model.background_weight),
            "loss_box": self.box_head.box_loss(offsets, samples, truth),
        }
        return losses | self._mask_loss(maps[:4], samples, targets)

    @torch.no_grad()
    def _detect(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        config = self.test_config
        vit = self.backbone(images, image_sizes, dense=True)  # the only pass: detection features and VLM map together
        maps = self.neck(vit.levels)
        proposals = [p["boxes"] for p in self.rpn.proposals(self.rpn(maps), image_sizes)]
        embeddings, offsets = self.box_head(maps[:4], proposals)
        boxes = self.box_head.refine(offsets, proposals, image_sizes)
        judged = boxes if config.vlm_boxes == "refined" else proposals
        scores = fuse(
            class_probabilities(self.classifier(embeddings, self.class_embeddings, config.temperature)),
            vlm_probabilities(vit.dense, judged, images.shape[-2:], self.class_embeddings, config.vlm_temperature),
            self.base_mask,
            weight_base=config.vlm_weight_base,
            weight_novel=config.vlm_weight_novel,
        )
        results = [
            select_detections(b, s, score=config.score, iou=config.nms, most=config.per_image)
            for b, s in zip(boxes, scores.split([len(b) for b in boxes]), strict=True)
        ]
        self.add_masks(maps[:4], results)
        return results

    @torch.no_grad()
    def proposals(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Class-agnostic proposals, in eval mode: the RPN's boxes, refined once by the box head.

        Returns:
            Per image and by falling score ``boxes`` ``[N, 4]`` and ``scores`` ``[N]`` (objectness), after another NMS
            at ``model.rpn_nms``, as refined boxes move together.
        """
        maps = self.neck(self.backbone(images, image_sizes, dense=False).levels)
        found = self.rpn.proposals(self.rpn(maps), image_sizes)
        first = [p["boxes"] for p in found]
        refined = self.box_head.refine(self.box_head(maps[:4], first)[1], first, image_sizes)
        results = []
        for boxes, p in zip(refined, found, strict=True):
            keep = nms(boxes, p["scores"], self.config.rpn_nms)
            results.append({"boxes": boxes[keep], "scores": p["scores"][keep]})
        return results


def build_detector(config: FViTConfig, clip_model: CLIP, class_embeddings: Tensor, base_mask: Tensor) -> Detector:
    """A detector on the image tower of a CLIP model.

    Args:
        clip_model: its image tower is frozen in place and becomes part of the detector; the text tower does not.
        class_embeddings: float ``[C+1, D]``, all classes evaluated, last row background.
        base_mask: bool ``[C]``, True for classes with training labels.

    Raises:
        ValueError: blocks, sizes or embeddings that do not fit the model.
    """
    patch = clip_model.visual.patch_size
    if config.data.image_size % patch:
        raise ValueError(
            f"data.image_size is {config.data.image_size}: give a multiple of {patch}, the patch size of "
            f"{config.model.name}"
        )
    detector = Detector(config, clip_model.visual)
    detector.set_vocabulary(class_embeddings, base_mask)
    return detector
