"""Grounding head: fusion and dynamic blocks, then token logits, boxes and centerness for every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovdet.glip.dyconv import DyConv
from ovdet.glip.fusion import LIMIT, FusionBlock, TextLayer

START_LOGIT = math.log(0.01 / 0.99)  # the head starts with scores of 0.01


class Text(NamedTuple):
    """Encoded texts of a batch."""

    hidden: Tensor  # [B, T, L], last layer of the text encoder
    mask: Tensor  # bool [B, T], False for padding

    @property
    def embedded(self) -> Tensor:
        """Hidden states with zeros in place of padding ``[B, T, L]``."""
        return self.hidden * self.mask[..., None]


class HeadOutput(NamedTuple):
    """What the head says of N cells (all levels one after the other, row by row)."""

    tokens: Tensor  # logits [B, N, T] of every cell against every token
    boxes: Tensor  # offsets [B, N, 4] from the anchors
    centerness: Tensor  # logits [B, N]
    grids: list[tuple[int, int]]  # (height, width) of each level


@dataclass(frozen=True)
class HeadOptions:
    """Sizes and forms of the head."""

    channels: int = 256  # of the pyramid
    text_width: int = 768
    blocks: int = 6
    fusion: bool = True  # False: text and image meet in the dot product alone (GLIP-T (A))
    fusion_width: int = 2048
    fusion_heads: int = 8
    fusion_dropout: float = 0.1
    text_heads: int = 12  # of the BERT layer after each fusion
    text_hidden: int = 3072
    text_dropout: float = 0.1
    groups: int = 16  # of the group norms
    offsets: str = "released"  # or "aligned", see ovdet.glip.dyconv
    deform: bool = True
    levels: int = 5
    classifier: int = 0  # classes of the reference's unused classifier, carried along for conversion; 0: none
    checkpoint: bool = True  # recompute fusion in the backward pass


class Block(nn.Module):
    """Fusion and a text layer where there is fusion, and a dynamic block."""

    def __init__(self, options: HeadOptions) -> None:
        super().__init__()
        self.recompute = options.checkpoint
        self.fusion = self.text_layer = None
        if options.fusion:
            self.fusion = FusionBlock(
                options.channels, options.text_width, options.fusion_width, heads=options.fusion_heads,
                scale=1 / options.blocks, dropout=options.fusion_dropout,
            )  # fmt: skip
            self.text_layer = TextLayer(
                options.text_width, options.text_heads, options.text_hidden, options.text_dropout
            )
        self.dyconv = DyConv(options.channels, groups=options.groups, offsets=options.offsets, deform=options.deform)

    def forward(self, levels: Sequence[Tensor], text: Text) -> tuple[list[Tensor], Text]:
        """Levels ``[B, C, h_i, w_i]`` and text, both of the same shapes afterwards."""
        if self.fusion is None or self.text_layer is None:
            return self.dyconv(levels), text
        visual = flatten_levels(levels)
        if self.recompute and self.training and torch.is_grad_enabled():
            visual, hidden = checkpoint(self.fusion, visual, text.hidden, text.mask, use_reentrant=False)
        else:
            visual, hidden = self.fusion(visual, text.hidden, text.mask)
        parts = visual.transpose(1, 2).split([x.shape[2] * x.shape[3] for x in levels], dim=2)
        levels = [part.unflatten(2, x.shape[2:]).contiguous() for part, x in zip(parts, levels, strict=True)]
        return self.dyconv(levels), Text(self.text_layer(hidden, text.mask), text.mask)


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """Levels ``[B, C, h_i, w_i]`` as one sequence ``[B, N, C]``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


class GroundingHead(nn.Module):
    """From pyramid and text to token logits, box offsets and centerness (GLIP, sections 3.1 and 3.2).

    A logit is the product of a cell's features with a projected token, over a learned temperature, plus a bias that is
    linear in the token: ``x . W(e/2) / exp(log_scale) + e . bias_lang + bias0`` for tokens ``e`` of unit length.
    """

    def __init__(self, options: HeadOptions) -> None:
        super().__init__()
        channels, width = options.channels, options.text_width
        self.options = options
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.blocks))
        self.bbox_pred, self.centerness = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 1, 1)
        self.text_projection = nn.Linear(width, channels)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_lang = nn.Parameter(torch.zeros(width))
        self.bias0 = nn.Parameter(torch.full((1,), START_LOGIT))
        self.level_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(options.levels))
        for conv in (self.bbox_pred, self.centerness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        # In the reference's files, frozen and without effect; kept so that files go back as they came.
        self.cls_logits = None
        if options.classifier:
            self.cls_logits = nn.Conv2d(channels, options.classifier, 1).requires_grad_(False)
            nn.init.normal_(self.cls_logits.weight, std=0.01)
            nn.init.constant_(self.cls_logits.bias, START_LOGIT)

    @property
    def reads_text(self) -> bool:
        """Whether the image features depend on the text (deep fusion)."""
        return self.options.fusion

    def tower(self, levels: Sequence[Tensor], text: Text) -> tuple[list[Tensor], Text]:
        """Levels and text after all blocks. Without fusion the levels depend on the image alone."""
        levels = list(levels)
        for block in self.blocks:
            levels, text = block(levels, text)
        return levels, text

    def predict(self, levels: Sequence[Tensor], text: Text) -> HeadOutput:
        """Logits and boxes from what :meth:`tower` returns."""
        visual = flatten_levels(levels)
        # Offsets and centerness of all levels are a matrix product each; the scale is one of the level.
        scales = torch.cat([s.expand(x.shape[2] * x.shape[3]) for s, x in zip(self.level_scales, levels, strict=True)])
        boxes = F.linear(visual, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias) * scales[:, None]
        centerness = F.linear(visual, self.centerness.weight.flatten(1), self.centerness.bias)[..., 0]
        return HeadOutput(self.token_logits(visual, text), boxes, centerness, [tuple(x.shape[-2:]) for x in levels])

    def token_logits(self, visual: Tensor, text: Text) -> Tensor:
        """Logits ``[B, N, T]`` of cells ``[B, N, C]`` against all tokens, padding included."""
        states = text.hidden if self.options.fusion else text.embedded
        unit = F.normalize(states, dim=-1)
        tokens = self.text_projection(unit / 2)
        bias = unit @ self.bias_lang + self.bias0  # [B, T]
        logits = visual @ tokens.transpose(1, 2) / self.log_scale.exp() + bias[:, None]
        return logits.clamp(-LIMIT, LIMIT)

    def forward(self, levels: Sequence[Tensor], text: Text) -> HeadOutput:
        """All levels ``[B, C, h_i, w_i]`` and the text of each image to :class:`HeadOutput`."""
        return self.predict(*self.tower(levels, text))
