"""State dicts in and out: every layout in the wild -> this package's layout -> any layout again.

The package's own layout is that of OpenCLIP with a timm trunk: ``visual.trunk.*``, ``text.*``, ``logit_scale``.
The others:

========  ==============================================================================================
``eva``      EVA-CLIP: ``visual.blocks.N.attn.q_proj.weight``, ``visual.blocks.N.mlp.w1.weight``, ``text.*``
``openai``   OpenAI and OpenCLIP ViT: ``visual.transformer.resblocks.N...``; the text tower without prefix
``timm``     OpenCLIP with timm: the package's own
========  ==============================================================================================
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from .image_tower import resize_positions
from .readouts import SPEC_KEY
from .text_tower import QuickGELU
from .weight_files import load_state_dict_file, without_wrappers
from .weight_files import load_torch_file as load_torch_file

log = logging.getLogger(__name__)

LAYOUTS = ("eva", "openai", "timm")
_TEXT_ROOTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
# Values that some files carry beside the weights: sizes, the causal mask, and rotary tables of the native grid.
_NOT_WEIGHTS = re.compile(
    r"^(input_resolution|context_length|vocab_size|(text\.)?attn_mask|text\.position_ids|visual\..*rope\.freqs_(cos|sin))$"
)

# (pattern in the foreign layout, replacement in the package's), applied in order to names after "visual.".
_EVA_IN = [
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]
_EVA_SPLIT_BIAS_IN = [(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias")]
_VIT_IN = [
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
_EVA_OUT = [
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
]
_EVA_SWIGLU_OUT = [(r"\.mlp\.fc2\.", ".mlp.w3.")]
_VIT_OUT = [
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^(fc_)?norm\.", "ln_post."),
    (r"^head\.weight$", "proj"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.ls([12])\.", r".ls_\1."),
    (r"\.attn\.qkv\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def detect_layout(state: dict[str, Tensor]) -> str:
    """``"timm"``, ``"eva"`` or ``"openai"``; ValueError when the names fit none."""
    if any(k.startswith("visual.trunk.") for k in state):
        return "timm"
    if any(k.startswith("visual.transformer.resblocks.") for k in state):
        return "openai"
    if any(k.startswith("visual.blocks.") for k in state):
        return "eva"
    if any(k.startswith("visual.layer1.") for k in state):
        raise ValueError("its image tower is a ResNet, which has no patch tokens to read densely")
    some = ", ".join(sorted(state)[:4])
    raise ValueError(f"no image tower among the {len(state)} tensors ({some}, ...): not a CLIP checkpoint")


# -- in ---------------------------------------------------------------------------------------------------------------


def to_internal(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any layout in the package's own names and shapes. Sizes, masks and rotary tables are dropped."""
    state = without_wrappers(state)
    layout = detect_layout(state)
    # EVA-02 has separate projections with biases of their own, EVA-01 a fused one with q_bias and v_bias beside it.
    rules = {"timm": [], "openai": _VIT_IN, "eva": list(_EVA_IN)}[layout]
    if layout == "eva" and any(".attn.q_proj." in k for k in state):
        rules += _EVA_SPLIT_BIAS_IN
    out = {}
    for name, value in state.items():
        if _NOT_WEIGHTS.match(name):
            continue
        if name.startswith("visual.") and not name.startswith("visual.readout") and layout != "timm":
            name = "visual.trunk." + _rename(name[len("visual.") :], rules)
            if layout == "openai":
                value = _vit_shape_in(name, value)
        elif name.startswith("visual.head.proj."):  # OpenCLIP's linear projection beside a timm trunk
            name = "visual.trunk.head." + name[len("visual.head.proj.") :]
        elif name.startswith(_TEXT_ROOTS):
            name = "text." + name
        out[name] = value
    # Files of text towers that were whole CLIPs once carry the scale of that CLIP too; the model's own counts.
    if (old_scale := out.pop("text.logit_scale", None)) is not None:
        out.setdefault("logit_scale", old_scale)
    return out


def _vit_shape_in(name: str, value: Tensor) -> Tensor:
    if name == "visual.trunk.cls_token":
        return value.reshape(1, 1, -1)
    if name == "visual.trunk.pos_embed":
        return value[None]
    if name == "visual.trunk.head.weight":
        return value.T.contiguous()
    return value


def proves_quick_gelu(state: dict[str, Tensor]) -> bool:
    """Whether tensors are OpenAI's own, which alone state an ``input_resolution`` and need QuickGELU."""
    return "input_resolution" in state


def uses_quick_gelu(model: nn.Module) -> bool:
    """Whether a model was built with QuickGELU (in its text tower, which has the choice in every schema)."""
    return any(isinstance(m, QuickGELU) for m in model.text.modules())


def load_weights(model: nn.Module, path: str | Path, *, resize: bool = False) -> None:
    """Load a checkpoint file of any layout into a :class:`~open_clip.model.CLIP`, strictly.

    Args:
        resize: resize position embeddings of another grid (for a model built at another native size).

    Raises:
        ValueError: names or shapes differ from the model's; the message lists which, and nothing has been loaded.
    """
    load_state(model, load_state_dict_file(path), source=str(path), resize=resize)


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str = "state dict",
    resize: bool = False,
    image_size: int | Sequence[int] | None = None,
) -> Any:
    """As :func:`load_weights`, from a state dict of any layout; ``source`` names it in messages.

    Args:
        image_size: side, or height and width, that the positions are of, where that is known.

    Returns what ``load_state_dict`` of torch returns.
    """
    if proves_quick_gelu(state) and not uses_quick_gelu(model):
        raise ValueError(
            f"{source} is one of OpenAI's own files (it states input_resolution), trained with QuickGELU, but the "
            "model has GELU: build it with force_quick_gelu=True, or by its name with -quickgelu"
        )
    try:
        state = to_internal(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    readout, drops = model.visual.readout, model.visual.drop_padding
    model.visual.adopt_readout(state, source)
    own = model.state_dict()
    try:
        _reconcile(state, own, model, resize, image_size)
    except ValueError as error:
        _restore_reading(model.visual, readout, drops)
        raise ValueError(f"{source}: {error}") from error
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(state))
        if state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        _restore_reading(model.visual, readout, drops)
        parts = [(missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")]
        text = "; ".join(f"{len(p)} {what}: {_some(p)}" for p, what in parts if p)
        positions = not missing and not unexpected and all("pos" in s.split()[0] for s in shapes)
        remedy = "; force_image_size= and force_context_length= resize positions" if positions else ""
        raise ValueError(f"{source} does not fit the model (another architecture?): {text}{remedy}")
    return model.load_state_dict(state)


def load_tower(model: nn.Module, tower: str, path: str | Path) -> None:
    """Load one tower (``"visual"`` or ``"text"``) from a file: a whole CLIP's, or the tower's alone.

    A file of an image trunk alone has timm's names and may lack the projection, which then keeps its start values.

    Raises:
        ValueError: names or shapes differ from the tower's; nothing has been loaded.
    """
    state = without_wrappers(load_state_dict_file(path))
    if any(k.startswith("visual.") for k in state):
        state = to_internal(state)
        state = {k[len(tower) + 1 :]: v for k, v in state.items() if k.startswith(f"{tower}.")}
    elif tower == "visual" and not any(k.startswith("trunk.") for k in state):
        state = {f"trunk.{k}": v for k, v in state.items()}
    module = getattr(model, tower)
    before = (module.readout, module.drop_padding) if tower == "visual" else None
    if before:
        whole = {f"visual.{k}": v for k, v in state.items()}
        module.adopt_readout(whole, str(path))
        state = {k[len("visual.") :]: v for k, v in whole.items()}
    own = module.state_dict()
    optional = {k for k in own if k.startswith("trunk.head.")}
    wrong = sorted((set(own) - set(state) - optional) | (set(state) - set(own)))
    wrong += sorted(k for k in set(own) & set(state) if own[k].shape != state[k].shape)
    if wrong:
        if before:
            _restore_reading(module, *before)
        raise ValueError(f"{path} does not fit the {tower} tower: {len(wrong)} names or shapes differ: {_some(wrong)}")
    module.load_state_dict(state, strict=False)


def _restore_reading(tower: nn.Module, readout: nn.Module, drops: bool) -> None:
    tower.set_readout(readout)
    tower.set_drop_padding(drops)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _reconcile(
    state: dict[str, Tensor], own: dict[str, Tensor], model: nn.Module, resize: bool,
    image_size: int | Sequence[int] | None,
) -> None:  # fmt: skip
    """Mend differences of form: scalar shapes, an all-zero bias, the place of a norm, positions to be resized."""
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
    bias = "visual.trunk.head.bias"
    if bias in state and bias not in own and not state[bias].any():
        del state[bias]
    # The openai layout calls the final norm the same, whether it comes before pooling (norm) or after (fc_norm).
    for part in ("weight", "bias"):
        norm, after = f"visual.trunk.norm.{part}", f"visual.trunk.fc_norm.{part}"
        if norm in state and norm not in own and after in own:
            state[after] = state.pop(norm)
    name = "text.positional_embedding"
    if resize and name in state and state[name].shape[0] != model.text.context_length:
        log.info("resizing text positions from %d to %d tokens", len(state[name]), model.text.context_length)
        rows = F.interpolate(state[name].float().T[None], size=model.text.context_length, mode="linear")
        state[name] = rows[0].T.to(state[name].dtype).contiguous()
    name = "visual.trunk.pos_embed"
    if resize and name in own and state.get(name, own[name]).ndim == 3:
        prefix = 0 if model.visual.trunk.no_embed_class else model.visual.trunk.num_prefix_tokens
        cells, new = state[name].shape[1] - prefix, model.visual.native_grid
        old = _grid_of(cells, new, image_size, model.visual.patch_size)
        if old != new:
            log.info("resizing position embeddings from %dx%d to %dx%d cells", *old, *new)
            patches = resize_positions(state[name][:, prefix:], old, new)
            state[name] = torch.cat([state[name][:, :prefix], patches], dim=1)


def _grid_of(cells: int, own: tuple[int, int], image_size: int | Sequence[int] | None, patch: int) -> tuple[int, int]:
    """The grid that a file's positions are of: that of its image size, the model's, or a square."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or (0, 0))
    stated, side = (sides[0] // patch, sides[1] // patch), round(cells**0.5)
    for grid in (stated, own, (side, side)):
        if grid[0] * grid[1] == cells:
            return grid
    raise ValueError(
        f"its {cells} positions are no square, and of which height and width is not known: make the model at their "
        "size (force_image_size=(height, width)), load the file, save it, and load that at another size"
    )


# -- out --------------------------------------------------------------------------------------------------------------


def reference_layout(model: nn.Module) -> str:
    """Layout in which the published code (and its detector) keeps this model: ``eva``, ``openai``, or else ``timm``."""
    trunk = model.visual.trunk
    if trunk.cls_token is None or trunk.reg_token is not None or model.visual.pools_by_attention:
        return "timm"
    if isinstance(trunk, Eva):
        return "eva"
    # The projection of the openai layout is a matrix, and its patch embedding has no bias.
    bare = isinstance(trunk.head, nn.Linear) and trunk.head.bias is None and trunk.patch_embed.proj.bias is None
    return "openai" if bare else "timm"


def export_state_dict(
    model: nn.Module, layout: str | None = None, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's weights by the names and shapes of another layout.

    Args:
        model: gives the architecture (and the weights when ``state`` is None).
        layout: one of :data:`LAYOUTS`; None for :func:`reference_layout`.
        state: tensors by the package's names to export instead (an ensemble, gradients); may be a part of the model's.

    Raises:
        ValueError: unknown layout, or one that cannot hold this model.
    """
    layout = layout or reference_layout(model)
    if layout not in LAYOUTS:
        raise ValueError(f'layout is "{layout}": use one of {", ".join(LAYOUTS)}')
    state = model.state_dict() if state is None else state
    complete = set(model.state_dict()) <= set(state)
    if layout == "timm":
        return dict(state)
    if layout != reference_layout(model):
        raise ValueError(f'this model has no "{layout}" layout: use "{reference_layout(model)}" or "timm"')
    eva_rules = _EVA_OUT + (_EVA_SWIGLU_OUT if any(".mlp.fc1_g." in k for k in model.state_dict()) else [])
    out = {}
    for name, value in state.items():
        if name.startswith("visual.trunk."):
            short = name[len("visual.trunk.") :]
            if layout == "openai":
                value = _vit_shape_out(short, value)
            name = "visual." + _rename(short, _VIT_OUT if layout == "openai" else eva_rules)
        elif name.startswith("text.") and layout == "openai":
            name = name[len("text.") :]
        out[name] = value
    if layout == "eva" and complete:
        out |= _rotary_tables(model)
    return out


def without_reading(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(a state dict of any layout without the dense reading's entry and its weights, their names).

    For programs that know no dense readings and load strictly.
    """
    lost = [name for name in state if name == SPEC_KEY or name.startswith("visual.readout.")]
    return {name: value for name, value in state.items() if name not in lost}, lost


def _vit_shape_out(name: str, value: Tensor) -> Tensor:
    if name == "cls_token":
        return value.reshape(-1)
    if name == "pos_embed":
        return value[0]
    return value.T.contiguous() if name == "head.weight" else value


def _rotary_tables(model: nn.Module) -> dict[str, Tensor]:
    """EVA-CLIP files repeat the rotary tables of the native grid ``[cells, head_dim]``, once and in every block."""
    trunk = model.visual.trunk
    if getattr(trunk, "rope", None) is None:
        return {}
    sin, cos = trunk.rope.get_embed(shape=list(model.visual.native_grid)).detach().chunk(2, dim=-1)
    places = ["visual.rope"] + [f"visual.blocks.{i}.attn.rope" for i in range(len(trunk.blocks))]
    return {f"{p}.{n}": t.clone() for p in places for n, t in (("freqs_cos", cos), ("freqs_sin", sin))}
