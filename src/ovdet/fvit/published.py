"""Names of the published detectors' state dicts (MMDetection 2) and of this detector's, both ways.

A published state holds more than what is trained: the ViT (``backbone.visual.``), the class embeddings of training
(``all_embeddings``, ``[D, C + 1]``) and a layer that takes no part in anything (``fc_cls``).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

VIT = "backbone.visual."  # prefix of the frozen ViT, under EVA-CLIP's names
EMBEDDINGS = "roi_head.bbox_head.all_embeddings"
UNUSED = "roi_head.bbox_head.fc_cls."

_NORMED = {"0": "conv", "1": "bn"}  # children of conv_norm
_LAYERS = {  # ours, with {} for what varies: theirs
    "neck.levels.up4.{}": "backbone.interpolate1.{}",
    "neck.levels.up2": "backbone.interpolate2.0",
    "neck.fpn.lateral.{}.{}": "neck.lateral_convs.{}.{}",
    "neck.fpn.output.{}.{}": "neck.fpn_convs.{}.{}",
    "rpn.convs.{}.{}": "rpn_head.rpn_conv.{}.{}",
    "rpn.objectness": "rpn_head.rpn_cls",
    "rpn.offsets": "rpn_head.rpn_reg",
    "box_head.convs.{}.{}": "roi_head.bbox_head.shared_convs.{}.{}",
    "box_head.fcs.{}": "roi_head.bbox_head.shared_fcs.{}",
    "box_head.embedding": "roi_head.bbox_head.cls_fcs.0",
    "box_head.own_fcs.{}": "roi_head.bbox_head.reg_fcs.{}",
    "box_head.offsets": "roi_head.bbox_head.fc_reg",
    "mask_head.layers.{}.{}": "roi_head.mask_head.convs.{}.{}",
}
_TEMPERATURE = ("classifier.temperature", "roi_head.bbox_head.detect_temperature")
# In these every second module is a ReLU, which published names do not count.
_WITH_RELU = ("rpn.convs.", "box_head.convs.", "box_head.fcs.", "box_head.own_fcs.", "mask_head.layers.")


def published_name(name: str, *, mask_convs: int = 4) -> str:
    """Published name of an entry of a detector's state.

    Args:
        mask_convs: convolutions of the mask head, after which its last two layers come.

    Raises:
        KeyError: an entry that published detectors do not have, such as a temperature kept as its logarithm.
    """
    if name == _TEMPERATURE[0]:
        return _TEMPERATURE[1]
    layer, leaf = name.rsplit(".", 1)
    last = {f"mask_head.layers.{2 * mask_convs}": "upsample", f"mask_head.layers.{2 * mask_convs + 2}": "conv_logits"}
    if layer in last:
        return f"roi_head.mask_head.{last[layer]}.{leaf}"
    for ours, theirs in _LAYERS.items():
        match = re.fullmatch(re.escape(ours).replace(r"\{\}", r"(\d+)"), layer)
        plain = re.fullmatch(re.escape(ours.removesuffix(".{}")).replace(r"\{\}", r"(\d+)"), layer)
        if match is None and plain is not None and ours == "rpn.convs.{}.{}":  # convolutions without norm
            return f"{theirs.format(int(plain.group(1)) // 2, 'conv')}.{leaf}"
        if match is None:
            continue
        numbers = list(match.groups())
        if ours.startswith(_WITH_RELU):
            numbers[0] = str(int(numbers[0]) // 2)
        if len(numbers) == 2:
            numbers[1] = _NORMED[numbers[1]]
        return f"{theirs.format(*numbers)}.{leaf}"
    raise KeyError(name)


def from_published(state: dict[str, Tensor], own: dict[str, Tensor], *, mask_convs: int = 4) -> dict[str, Tensor]:
    """A detector's state from a published one: every entry is accounted for.

    Args:
        state: published; entries of the ViT, the class embeddings and the unused layer are left out.
        own: state of the detector's trained parts, for names and shapes.

    Raises:
        ValueError: entries that are missing, left over or of another shape.
    """
    theirs = {published_name(name, mask_convs=mask_convs): name for name in own}
    rest = {k: v for k, v in state.items() if not k.startswith((VIT, UNUSED)) and k != EMBEDDINGS}
    problems = {
        "lacks": sorted(theirs.keys() - rest.keys()),
        "has unknown": sorted(rest.keys() - theirs.keys()),
        "has other shapes of": sorted(k for k in theirs.keys() & rest.keys() if own[theirs[k]].shape != rest[k].shape),
    }
    for what, names in problems.items():
        if names:
            raise ValueError(
                f"the published state {what} {', '.join(names[:3])} ({len(names)} in all): give the config that "
                "belongs to the file"
            )
    return {theirs[name]: value.to(own[theirs[name]].dtype) for name, value in rest.items()}


def to_published(
    state: dict[str, Tensor],
    vit: dict[str, Tensor],
    embeddings: Tensor,
    *,
    mask_convs: int = 4,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """A published state from a detector's.

    Args:
        state: of the trained parts.
        vit: of the ViT under EVA-CLIP's names, rotary tables included, without a prefix.
        embeddings: class embeddings ``[C + 1, D]``, background last.
        wanted: which entries to give, by published name.

    Returns:
        Every entry of a published state. ``fc_cls``, which is not kept anywhere and takes no part in anything, is
        zero.

    Raises:
        ValueError: the detector is not the published network.
    """
    try:
        result = {published_name(name, mask_convs=mask_convs): value for name, value in state.items()}
    except KeyError as error:
        raise ValueError(
            f"the detector's {error.args[0]} has no place in a published file: its network is another one "
            "(model.temperature_kind must be linear)"
        ) from None
    classes, width = embeddings.shape
    result |= {f"{VIT}{name}": value for name, value in vit.items()}
    result[EMBEDDINGS] = embeddings.T.contiguous()
    result[f"{UNUSED}weight"] = torch.zeros(classes, width)
    result[f"{UNUSED}bias"] = torch.zeros(classes)
    return {name: value for name, value in result.items() if wanted(name)}
