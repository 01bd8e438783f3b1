"""Parameter names: ours, those of released GLIP files, and those of MMDetection's.

A model's own names are translated one by one, and a file is read through that table: every parameter must be there, in
its shape, and nothing else may be. What a file holds besides parameters (position ids, index tables, anchors, parts
that grounding never uses) is listed in :data:`IGNORED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

LAYOUTS = ("glip", "mmdet", "own")
#: Entries of files that are no parameters of the network, or of parts that grounding does not have.
IGNORED = re.compile(
    r"(^|\.)(position_ids|relative_position_index|cell_anchors\.\d+|attn_mask)$"
    r"|(^|\.)(pooler|resizer|mlm_head|shallow_contrastive_projection_\w+)\."
    r"|^data_preprocessor\."
)


def to_glip(name: str, *, fusion: bool) -> str:
    """Name of a parameter in the released files, without their ``module.``; ``fusion``: of a model that fuses."""
    if name.startswith("image.swin."):
        return "backbone.body." + _swin(name.removeprefix("image.swin."), "layers")
    if name.startswith("image.fpn."):
        rest = re.sub(r"^(inner|layer)\.(\d)", lambda m: f"fpn_{m[1]}{int(m[2]) + 2}", name.removeprefix("image.fpn."))
        return "backbone.fpn." + re.sub(r"^p([67])", r"top_blocks.p\1", rest)
    if name.startswith("text.model."):
        return "language_backbone.body.model." + name.removeprefix("text.model.")
    if name == "prompt":
        return "rpn.tunable_linear.weight"
    return "rpn.head." + _head(name.removeprefix("head."), fusion)


def _swin(name: str, stage: str) -> str:
    """timm's names to Swin's: the merging is counted with the stage before it, output norms by stage."""
    name = re.sub(r"^norms\.(\d)", lambda m: f"norm{int(m[1]) + 1}", name.removeprefix("body."))
    name = re.sub(r"^layers_(\d)\.downsample", lambda m: f"{stage}.{int(m[1]) - 1}.downsample", name)
    return re.sub(r"^layers_(\d)", rf"{stage}.\1", name)


def _head(name: str, fusion: bool) -> str:
    name = name.replace("level_scales.", "scales.") + (".scale" if name.startswith("level_scales.") else "")
    name = re.sub(r"^text_projection\.", "dot_product_projection_text.", name)
    found = re.match(r"blocks\.(\d+)\.(fusion|text_layer|dyconv)\.(.*)", name)
    if not found:
        return name
    part, rest = found[2], found[3]
    place = int(found[1]) * 3 + ("fusion", "text_layer", "dyconv").index(part) if fusion else int(found[1])
    if part == "fusion":
        rest = "b_attn." + re.sub(r"^norm_([vl])", r"layer_norm_\1", rest)
    elif part == "dyconv":
        rest = re.sub(r"^convs\.(\d)\.", r"DyConv.\1.", rest).replace(".norm.", ".bn.")
        rest = re.sub(r"^scale_attention\.", "AttnConv.1.", rest)
    return f"dyhead_tower.{place}.{rest}"


def to_mmdet(name: str, *, fusion: bool) -> str:
    """Name of a parameter in MMDetection's converted files."""
    if name.startswith("image.swin."):
        rest = _swin(name.removeprefix("image.swin."), "stages").replace("patch_embed.proj.", "patch_embed.projection.")
        rest = rest.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        return "backbone." + rest.replace(".attn.", ".attn.w_msa.")
    if name.startswith("image.fpn."):
        rest = name.removeprefix("image.fpn.")
        rest = re.sub(r"^p([67])", lambda m: f"layer.{int(m[1]) - 3}", rest)
        rest = re.sub(r"^(inner|layer)\.(\d)\.", r"\1.\2.conv.", rest)
        return "neck." + rest.replace("inner.", "lateral_convs.").replace("layer.", "fpn_convs.", 1)
    name = to_glip(name, fusion=fusion)
    if name.startswith("language_backbone."):
        return "language_model." + name
    return "bbox_head." + name.removeprefix("rpn.").replace(".DyConv.", ".dyconvs.").replace(".AttnConv.", ".attnconv.")


def _merge_order(value: Tensor, back: bool) -> Tensor:
    """Weights over the four cells of a merging: Swin's order (cell by cell, columns first) to that of ``unfold``.

    ``unfold`` runs over channels first, and over the cells row by row.
    """
    if back:
        value = value.unflatten(-1, (-1, 4)).transpose(-1, -2)
        return value[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
    value = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return value.transpose(-1, -2).flatten(-2).contiguous()


def _mmdet_value(name: str, value: Tensor, back: bool) -> Tensor:
    if ".downsample." in name:
        return _merge_order(value, back)
    if ".level_scales." in name:
        return value.reshape([1] if back else [])
    return value


def strip_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the ``module.`` of data parallelism."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def guess_layout(names: Iterable[str]) -> str:
    """``"glip"``, ``"mmdet"`` or ``"own"`` of the names of a file, without ``module.``.

    Raises:
        ValueError: none of them.
    """
    names = set(names)
    for layout, prefix in (("own", "head.blocks."), ("glip", "rpn.head."), ("mmdet", "bbox_head.head.")):
        if any(name.startswith(prefix) for name in names):
            return layout
    raise ValueError(
        f"holds no GLIP ({', '.join(sorted(names)[:3])}, ...): give a file of GLIP, of MMDetection's GLIP, or of this "
        "program"
    )


def _translator(layout: str, fusion: bool) -> Callable[[str], str]:
    if layout == "own":
        return lambda name: name
    translate = to_glip if layout == "glip" else to_mmdet
    return lambda name: translate(name, fusion=fusion)


def read_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, fusion: bool, optional: Iterable[str] = ()
) -> tuple[dict[str, Tensor], str]:
    """A file's state under our names.

    Args:
        state: content of a file, in any layout, with or without ``module.``.
        shapes: our names and the shapes wanted.
        fusion: whether the model fuses.
        optional: our names that may be absent (the classifier, which MMDetection's files drop).

    Returns:
        The state, and the layout that was found.

    Raises:
        ValueError: names that are missing or left over, or other shapes; all are counted, the first are named.
    """
    state = strip_prefix(state)
    layout = guess_layout(state)
    translate = _translator(layout, fusion)
    if layout == "mmdet":  # both places occur
        state = {re.sub(r"^bbox_head\.scales\.", "bbox_head.head.scales.", name): v for name, v in state.items()}
    result, missing, other = {}, [], []
    for name, shape in shapes.items():
        value = state.pop(translate(name), None)
        if value is None:
            if name not in set(optional):
                missing.append(translate(name))
            continue
        if layout == "mmdet":
            value = _mmdet_value(name, value, back=True)
        if value.shape != shape:
            other.append(f"{translate(name)} {tuple(value.shape)} instead of {tuple(shape)}")
        result[name] = value
    unexpected = sorted(name for name in state if not IGNORED.search(name))
    problems = {"lacks": missing, "has unknown": unexpected, "has other shapes:": other}
    found = [f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"{'; it '.join(found)}: use the config of the variant that the file holds")
    return result, layout


def write_state(state: Mapping[str, Tensor], layout: str, *, fusion: bool) -> dict[str, Tensor]:
    """Our state under the names, and in the form, of a layout.

    Raises:
        ValueError: a layout that does not exist.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout is "{layout}": use one of {", ".join(LAYOUTS)}')
    translate = _translator(layout, fusion)
    result = {}
    for name, value in state.items():
        if layout == "mmdet":
            if name.startswith("head.cls_logits."):
                continue
            value = _mmdet_value(name, value, back=False)
        result[translate(name)] = value
    return result
