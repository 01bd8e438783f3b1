"""The detector: Mask R-CNN with class-agnostic boxes and masks, whose class scores are cosines with text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ovdet.parts.box_head import BoxHead
from ovdet.parts.fpn import FeaturePyramid
from ovdet.parts.losses import classification_loss
from ovdet.parts.mask_head import MaskHead
from ovdet.parts.pixels import IMAGENET_MEAN, IMAGENET_STD
from ovdet.parts.rois import sample_rois
from ovdet.parts.rpn import RPN
from ovdet.parts.scores import class_probabilities, fuse, select_detections
from ovdet.two_stage import TwoStageDetector, rpn_settings
from ovdet.vild.backbone import STRIDES, Trunk, batch_norm
from ovdet.vild.config import VildConfig
from ovdet.vild.scores import cosine_logits, image_loss, plain_probabilities, with_background


class Regions(NamedTuple):
    """Proposals of one image, judged."""

    boxes: Tensor  # [K, 4], refined
    objectness: Tensor  # [K], in 0..1
    scores: Tensor  # [K, C], class probabilities
    embeddings: Tensor  # [K, D], of the head that follows the teacher where there is one


class Detector(TwoStageDetector):
    """Open-vocabulary detector (ViLD; Gu et al. 2022). C classes, and background.

    See :class:`~ovdet.two_stage.TwoStageDetector`. To distil, targets also have ``distil_boxes`` ``[M, 4]`` with
    ``distil_targets`` ``[M, D]`` of unit length, M may be 0, and there is ``loss_image`` (times w); ``loss_class`` is
    there where labels are learned from. Where attributes are set, detections have ``attributes``, the likeliest of each
    ``[N]``, and joint scores. What the variants train and how they score:

    ========== ======= ==================================== ===========================================================
    variant    heads   losses on embeddings                  score
    ========== ======= ==================================== ===========================================================
    text       one     text                                  softmax over classes and background
    image      one     image                                 softmax over classes
    vild       one     text + w * image, same embedding      as text
    ensemble   two     text on one, w * image on the other   p_text^(1-w_c) p_image^w_c, w_c by group of classes
    supervised one     cross-entropy of a linear classifier  softmax over its classes and background
    ========== ======= ==================================== ===========================================================

    Args:
        config: sections ``model``, ``data`` (pixels) and ``test`` are read.
        trunk: the backbone.
        width: D of the teacher's joint space; for "supervised" C, the number of classes.
    """

    attribute_embeddings: Tensor

    def __init__(self, config: VildConfig, trunk: Trunk, width: int) -> None:
        super().__init__()
        model = config.model
        self.config, self.test_config, self.width = model, config.test, width
        norm = batch_norm(model.norm_eps, model.norm_momentum) if model.norm else None
        pooling = {"sampling": model.roi_sampling, "finest": model.roi_finest, "norm": norm}
        self.backbone = trunk
        self.fpn = FeaturePyramid(trunk.widths, model.channels, norm)
        self.rpn = RPN(model.channels, (*STRIDES, 2 * STRIDES[-1]), norm=norm, **rpn_settings(model),
                       pre_nms_test=model.rpn_pre_nms_test)  # fmt: skip
        head = {"size": model.box_size, "convs": model.box_convs, "fcs": model.box_fcs, "width": model.box_width}
        supervised = model.variant == "supervised"
        # The fifth level is for proposals only, as in Mask R-CNN.
        self.box_head = BoxHead(model.channels, width + supervised, STRIDES, **head, **pooling)
        self.image_head = None
        if model.variant == "ensemble":
            self.image_head = BoxHead(model.channels, width, STRIDES, refines=False, **head, **pooling)
        self.background = None
        if model.learns_text and not supervised:
            self.background = nn.Parameter(model.background_std * torch.randn(width))
        self.mask_head = None
        if model.masks:
            self.mask_head = MaskHead(
                model.channels, STRIDES, size=model.mask_size, convs=model.mask_convs, **pooling
            )
        own = config.data.pixels == "model"
        self.pixels = (trunk.mean, trunk.std) if own else (IMAGENET_MEAN, IMAGENET_STD)
        self.zero_padding = config.data.padding == "zero"
        self.image_share = 1.0  # of the distillation loss's weight, while it warms up
        # Not part of any state: the vocabulary is the user's.
        self.register_buffer("class_embeddings", torch.zeros(0, width), persistent=False)
        self.register_buffer("base_mask", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.register_buffer("attribute_embeddings", torch.zeros(0, width), persistent=False)

    # -- vocabulary and state -----------------------------------------------------------------------------------------

    def set_vocabulary(self, class_embeddings: Tensor | None, base_mask: Tensor) -> None:
        """Detect these classes from now on.

        Args:
            class_embeddings: ``[C, D]``; brought to unit length here. None for "supervised", whose classes are fixed.
            base_mask: bool ``[C]``, True for classes with training labels. Only those are detected by "supervised".

        Raises:
            ValueError: shapes that do not fit, or rows that are zero or not finite.
        """
        if self.config.variant == "supervised":
            if len(base_mask) != self.width:
                raise ValueError(
                    f"{len(base_mask)} classes for a classifier of {self.width}: a supervised detector has the classes "
                    "that it was trained with"
                )
        else:
            self.class_embeddings = self._usable(class_embeddings, "class")
            if len(self.class_embeddings) != len(base_mask):
                raise ValueError(f"{len(self.class_embeddings)} class embeddings for {len(base_mask)} classes")
        self.base_mask = base_mask.to(self.class_embeddings.device, torch.bool)

    def set_attributes(self, embeddings: Tensor | None) -> None:
        """Say of each detection, from now on, which of these attributes it has; None: no longer.

        Args:
            embeddings: ``[q, D]``, brought to unit length here.

        Raises:
            ValueError: a shape that does not fit, or a variant without text embeddings.
        """
        if self.config.variant == "supervised" and embeddings is not None:
            raise ValueError("a supervised detector has no text embeddings, and so no attributes")
        nothing = self.attribute_embeddings.new_zeros(0, self.width)
        self.attribute_embeddings = nothing if embeddings is None else self._usable(embeddings, "attribute")

    def _usable(self, embeddings: Tensor | None, kind: str) -> Tensor:
        if embeddings is None or embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            shape = None if embeddings is None else tuple(embeddings.shape)
            raise ValueError(
                f"{kind} embeddings are of shape {shape}, the detector needs [number, {self.width}]: make them with "
                "the text tower of its teacher"
            )
        return self._unit_rows(embeddings, kind)

    # -- training -----------------------------------------------------------------------------------------------------

    def _losses(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        model, truth = self.config, [target["boxes"] for target in targets]
        maps = self.fpn(self.backbone(images))
        out = self.rpn(maps)
        rpn_class, rpn_box = self.rpn.losses(out, image_sizes, truth)
        proposals, _ = self.rpn.propose(out, image_sizes)
        samples = sample_rois(
            proposals, image_sizes, truth, [target["labels"] for target in targets], len(self.base_mask),
            number=model.roi_samples, positive_share=model.roi_positive_share, iou=model.roi_iou,
        )  # fmt: skip
        distil = [target.get("distil_boxes", target["boxes"][:0]) for target in targets]
        shared = model.distils and self.image_head is None
        # One pass of the head for both kinds of boxes: its norms see them together.
        pooled = [torch.cat(pair) for pair in zip(samples.boxes, distil, strict=True)] if shared else samples.boxes
        embeddings, offsets = self.box_head(maps[:4], pooled)
        followers = embeddings
        if shared:
            parts = [n for pair in zip(samples.boxes, distil, strict=True) for n in map(len, pair)]
            pieces = embeddings.split(parts)
            offsets = torch.cat(offsets.split(parts)[::2])
            embeddings, followers = torch.cat(pieces[::2]), torch.cat(pieces[1::2])
        losses = {"loss_rpn_class": rpn_class, "loss_rpn_box": rpn_box}
        if model.learns_text:
            losses["loss_class"] = classification_loss(
                self.logits(embeddings), samples.labels, self.base_mask, model.background_weight
            )
        losses["loss_box"] = self.box_head.box_loss(offsets, samples, truth)
        if model.distils:
            if self.image_head is not None:
                followers = self._followers(maps[:4], distil, samples.boxes[0][:1])
            wanted = torch.cat([t["distil_targets"] for t in targets if "distil_targets" in t] or [followers[:0]])
            weight = model.image_weight * self.image_share
            losses["loss_image"] = weight * image_loss(followers, wanted)
        return losses | self._mask_loss(maps[:4], samples, targets)

    def _followers(self, maps: Sequence[Tensor], distil: Sequence[Tensor], fallback: Tensor) -> Tensor:
        """Embeddings of the second head, for all distilled boxes of the batch.

        Where there is none, the head is run on a box all the same: its parameters get their (zero) gradients, and its
        norms a batch, in every step and process.
        """
        if any(len(boxes) for boxes in distil):
            return self.image_head(maps, distil)[0]
        return self.image_head(maps, [fallback, *distil[1:]])[0][:0]

    # -- detecting ----------------------------------------------------------------------------------------------------

    def logits(self, embeddings: Tensor, temperature: float = 0.0) -> Tensor:
        """Class logits ``[K, C+1]`` of the head that learns from labels, background last.

        Args:
            temperature: in place of the config's; 0 = the config's.
        """
        if self.background is None:
            return embeddings
        table = with_background(self.class_embeddings, self.background)
        return cosine_logits(embeddings, table, temperature or self.config.temperature)

    def _class_scores(self, embeddings: Tensor, followers: Tensor) -> Tensor:
        """Class probabilities ``[K, C]`` of regions, as the variant scores them."""
        test, variant = self.test_config, self.config.variant
        temperature = test.temperature or self.config.temperature
        if variant == "supervised":
            logits = embeddings.float().masked_fill(F.pad(~self.base_mask, (0, 1)), -torch.inf)
            return class_probabilities(logits)
        if variant == "image":
            return plain_probabilities(cosine_logits(followers, self.class_embeddings, temperature))
        scores = class_probabilities(self.logits(embeddings, temperature))
        if variant != "ensemble":
            return scores
        followed = plain_probabilities(cosine_logits(followers, self.class_embeddings, temperature))
        return fuse(
            scores, followed, self.base_mask, weight_base=test.image_weight_base, weight_novel=test.image_weight_novel
        )

    @torch.no_grad()
    def judge(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Regions]]:
        """The pyramid's four finest maps, and all proposals of each image with their scores; in eval mode."""
        maps = self.fpn(self.backbone(images))
        found = self.rpn.proposals(self.rpn(maps), image_sizes)
        maps, proposals = maps[:4], [p["boxes"] for p in found]
        embeddings, offsets = self.box_head(maps, proposals)
        boxes = self.box_head.refine(offsets, proposals, image_sizes)
        followers = embeddings if self.image_head is None else self.image_head(maps, proposals)[0]
        counts = [len(b) for b in boxes]
        scores = self._class_scores(embeddings, followers)
        parts = zip(boxes, found, scores.split(counts), followers.split(counts), strict=True)
        return maps, [Regions(b, p["scores"], s, e) for b, p, s, e in parts]

    @torch.no_grad()
    def _detect(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        test = self.test_config
        maps, regions = self.judge(images, image_sizes)
        results = []
        for one in regions:
            result = select_detections(one.boxes, one.scores, score=test.score, iou=test.nms, most=test.per_image)
            if len(self.attribute_embeddings):
                result = self._name_attributes(result, one.embeddings[result["rows"]])
            results.append(result)
        self.add_masks(maps, results)
        return results

    def _name_attributes(self, result: dict[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
        """Detections with the likeliest attribute of each and the joint score (section 4.4), those above the limit."""
        test = self.test_config
        temperature = test.attribute_temperature or test.temperature or self.config.temperature
        shares = plain_probabilities(cosine_logits(embeddings, self.attribute_embeddings, temperature))
        best, which = shares.max(dim=1) if len(shares) else (shares.new_zeros(0), result["labels"][:0])
        result = {**result, "scores": result["scores"] * best, "attributes": which}
        order = result["scores"].argsort(descending=True, stable=True)
        order = order[result["scores"][order] > test.score]
        return {key: value[order] for key, value in result.items()}

    @torch.no_grad()
    def proposals(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Class-agnostic proposals, in eval mode: the RPN's boxes, refined once by the box head.

        Returns:
            Per image and by falling score ``boxes`` ``[N, 4]`` and ``scores`` ``[N]`` in 0..1 (what ``test.rank``
            says), after another NMS at ``model.rpn_nms``, as refined boxes move together.
        """
        results = []
        for one in self.judge(images, image_sizes)[1]:
            of_head = one.scores.sum(1)  # of any class: all but the background's probability
            rank = {"rpn": one.objectness, "box": of_head, "both": (one.objectness * of_head).sqrt()}
            scores = rank[self.test_config.rank]
            keep = nms(one.boxes, scores, self.config.rpn_nms)
            results.append({"boxes": one.boxes[keep], "scores": scores[keep]})
        return results
