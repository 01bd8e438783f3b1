"""Swin body of GLIP (Liu et al. 2021): timm's blocks, with the padding of the detection code.

Where a side is not a multiple of the window, timm shifts first and pads afterwards; Swin's detection code pads first,
so that the padding takes part in the shift. Released GLIP weights know the second form; with the other one features
differ by 0.2 to 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from training.engine.errors import UserError

TAPS = (1, 2, 3)  # stages read, of strides 8, 16 and 32


class PadFirstBlock(SwinTransformerBlock):
    """timm's block, with its window attention padded before the cyclic shift instead of after it."""

    def _attn(self, x: Tensor) -> Tensor:
        """Shifted-window attention of ``[B, H, W, C]``, of the same shape."""
        _, height, width, channels = x.shape
        (rows, columns), (down, right) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        shifted = down > 0 or right > 0
        if shifted:
            x = torch.roll(x, (-down, -right), dims=(1, 2))
        padded_height, padded_width = x.shape[1:3]
        windows = window_partition(x, self.window_size).flatten(1, 2)  # [B * windows, rows * columns, C]
        windows = self.attn(windows, mask=self.get_attn_mask(x))
        x = window_reverse(windows.unflatten(1, (rows, columns)), self.window_size, padded_height, padded_width)
        if shifted:
            x = torch.roll(x, (down, right), dims=(1, 2))
        return x[:, :height, :width].contiguous()


class Swin(nn.Module):
    """Swin transformer that returns three normalised maps.

    Args:
        width: channels of the patch embedding (96 for T, 192 for L); doubled by each stage.
        depths, heads: blocks, and attention heads, of the four stages.
        window: side of the attention window, in cells.
        drop_path: largest rate of stochastic depth.
        freeze_at: 0 trains everything, 1 freezes the patch embedding, 2 the first stage as well (up to the merging that
            follows it), 3 the second, ...
    """

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        *,
        drop_path: float = 0.2,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.body = timm.create_model(
            "swin_tiny_patch4_window7_224",
            embed_dim=width,
            depths=tuple(depths),
            num_heads=tuple(heads),
            window_size=window,
            drop_path_rate=drop_path,
            features_only=True,
            out_indices=TAPS,
            strict_img_size=False,
            always_partition=True,
        )
        for module in self.body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PadFirstBlock  # adds no state
        self.channels = [width * 2**tap for tap in TAPS]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.freeze_at = freeze_at
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.body["patch_embed"]] if self.freeze_at > 0 else []
        for stage in range(self.freeze_at - 1):
            modules.append(self.body[f"layers_{stage}"])
            if stage + 1 < 4:  # timm keeps the merging with the stage after it
                modules.append(self.body[f"layers_{stage + 1}"].downsample)
        return modules

    def train(self, mode: bool = True) -> Swin:
        """As usual, but frozen stages stay in eval mode (no stochastic depth)."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of each stage in the backward pass."""
        for name, stage in self.body.named_children():
            if name.startswith("layers_"):
                stage.grad_checkpointing = enable

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps ``[B, C_i, H/s, W/s]`` for s = 8, 16, 32 of images ``[B, 3, H, W]``; sides are multiples of 32."""
        maps = self.body(images)  # [B, h, w, C]
        return [norm(x).permute(0, 3, 1, 2).contiguous() for norm, x in zip(self.norms, maps, strict=True)]


def load_swin_weights(swin: Swin, source: str) -> None:
    """ImageNet weights for the body: a file of Swin's authors or of timm, or a name of timm's hub.

    The classifier, its norm and index tables are left out; the three output norms, which classification does not have,
    stay as they are.

    Raises:
        UserError: nothing there, offline, or weights of another size.
    """
    path = Path(source)
    if path.is_file():
        state = _read_weights(path)
    else:
        try:
            state = timm.create_model(source.removeprefix("timm/"), pretrained=True).state_dict()
        except Exception as error:  # timm and the hub raise a dozen kinds
            raise UserError(
                f"image.weights {source} is neither a file nor in the cache, and cannot be fetched "
                f"({type(error).__name__}): give the file of Swin's ImageNet weights (image.weights=FILE)"
            ) from error
    original = any(re.match(r"layers\.0\.downsample\.", name) for name in state)
    renamed = {}
    for name, value in state.items():
        if re.match(r"(head|norm)\.|.*(relative_position_index|attn_mask)$", name):
            continue
        if original:  # Swin's authors keep a merging with the stage before it
            name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        renamed[re.sub(r"^layers\.", "layers_", name)] = value
    own = swin.body.state_dict()
    wrong = own.keys() ^ renamed.keys()
    wrong |= {name for name in own.keys() & renamed.keys() if own[name].shape != renamed[name].shape}
    if wrong:
        raise UserError(
            f"image.weights {source}: {len(wrong)} of {len(own)} parameters are missing, unknown or of another shape "
            f"({sorted(wrong)[0]}): give the Swin that the config's [image] section describes"
        )
    swin.body.load_state_dict(renamed)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"image.weights {path} cannot be read ({reason}): fetch it anew") from error
    return content.get("model", content)
