"""What is saved here loads in OpenCLIP 3.3.0 and in timm, with the same numbers; compared with the packages themselves.

OpenCLIP has the import name of this package, so it is installed into a folder of its own (or found there by
OPEN_CLIP_UPSTREAM) and run in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import open_clip
from open_clip.factory import build_model

pytestmark = pytest.mark.slow

VIT = {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
SIGLIP_TEXT = {
    **TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}  # fmt: skip
CONFIGS = {
    "vit": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "layerscale": {"embed_dim": 24, "vision_cfg": {**VIT, "ls_init_value": 0.1}, "text_cfg": TEXT},
    "custom": {"embed_dim": 24, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "clipa": {
        "embed_dim": 24,
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
        "preprocess_cfg": {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5, 0.4, 0.3]},
    },
    "eos": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 7}},
    "siglip": {
        "embed_dim": 96, "init_logit_bias": -10, "custom_text": True, "text_cfg": SIGLIP_TEXT,
        "vision_cfg": {"timm_model_name": "test_vit4", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
        "preprocess_cfg": {"resize_mode": "longest", "fill_color": 9},
    },
    "no projection of texts": {
        "embed_dim": 96, "custom_text": True, "text_cfg": {**SIGLIP_TEXT, "width": 96, "proj_type": "none"},
        "vision_cfg": {"timm_model_name": "test_vit4", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
    },
    "pe": {
        "embed_dim": 24, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "image_size": 384, "timm_pool": "map",
                       "timm_proj": ""},
    },
    "eva": {
        "embed_dim": 24, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 56, "timm_pool": "token",
                       "timm_proj": ""},
    },
    "linear": {
        "embed_dim": 24, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"timm_model_name": "test_vit4", "image_size": 160, "timm_pool": "avg", "timm_proj": "linear"},
    },
}  # fmt: skip

UPSTREAM = """
import json, logging, sys
logging.disable(logging.WARNING)
import numpy as np, torch, open_clip
from PIL import Image
from pathlib import Path
root = Path(sys.argv[1])
assert open_clip.__version__ == "3.3.0", open_clip.__file__
picture = Image.open(root / "picture.png")
ids = torch.from_numpy(np.load(root / "ids.npy"))
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    other = {"force_image_size": 56, "load_weights": False} if folder.name == "eva" else {}  # the trunk's own is 224
    model, train, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}", **other)
    if other:
        open_clip.load_checkpoint(model, str(folder / "open_clip_model.safetensors"))
    model.eval()
    out = {"pixels": prepare(picture)[None]}
    torch.manual_seed(0)
    out["train"] = train(picture)
    with torch.no_grad():
        out["image"], out["text"] = model.encode_image(out["pixels"]), model.encode_text(ids)
        out["logits"] = model.get_logits(out["pixels"], ids)[0]
        found = model.forward_intermediates(out["pixels"], ids, image_indices=1, text_indices=1)
        out["map"], out["tokens"] = found["image_intermediates"][0], found["text_intermediates"][0]
    if folder.name == "vit":
        longer = open_clip.create_model(f"local-dir:{folder}", force_context_length=24)
        out["positions"] = longer.positional_embedding.detach()
    keys = sorted(model.state_dict())
    np.savez(root / f"{folder.name}.npz", keys=np.array(keys), **{k: v.numpy() for k, v in out.items()})
facts = {
    "templates": [t("X") for t in open_clip.OPENAI_IMAGENET_TEMPLATES],
    "simple": [t("X") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES],
    "tokens": open_clip.SimpleTokenizer()(["a cat", "Ein Käfer?", "x" * 200]).tolist(),
}
a, b = (torch.from_numpy(np.load(root / f"{n}.npy")) for n in "ab")
scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
from open_clip.loss import SigLipLoss
facts["losses"] = [
    open_clip.ClipLoss()(a, b, scale).item(), SigLipLoss()(a, b, scale, bias).item(),
    open_clip.DistillClipLoss()(a, b, scale, b, a, scale)[1].item(),
]
(root / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """Folder with OpenCLIP 3.3.0 alone; the packages that it needs are this project's own."""
    if folder := os.environ.get("OPEN_CLIP_UPSTREAM"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("upstream")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(folder),
        "open_clip_torch==3.3.0",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"open_clip_torch 3.3.0 cannot be installed here: {run.stderr.strip().splitlines()[-1][:150]}")
    return folder


@pytest.fixture(scope="module")
def saved(upstream, tmp_path_factory) -> Path:
    """Models saved here, and what OpenCLIP makes of them."""
    root = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    waves = np.stack([np.sin(np.mgrid[:70, :110][i % 2] / (3 + i)) for i in range(3)], -1)
    Image.fromarray((128 + 100 * waves).astype(np.uint8)).save(root / "picture.png")
    ids = rng.integers(8, 400, (3, 16))
    ids[0, 9], ids[1, 4], ids[2, 15] = 7, 7, 7
    np.save(root / "ids.npy", ids)
    for name in "ab":
        rows = rng.normal(size=(5, 8)).astype(np.float32)
        np.save(root / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = build_model(config)
        with torch.no_grad():
            for parameter in model.parameters():  # nowhere zero or one, so that nothing hides
                parameter.add_(0.1 * torch.randn_like(parameter))
        open_clip.save_pretrained(model, root / name)
    environment = {**os.environ, "PYTHONPATH": str(upstream), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", UPSTREAM, str(root)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert run.returncode == 0, run.stderr
    return root


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_saved_model_is_the_same_in_openclip(saved, name):
    theirs = {k: torch.from_numpy(v) for k, v in np.load(saved / f"{name}.npz").items() if k != "keys"}
    model, train, prepare = open_clip.create_model_and_transforms(f"local-dir:{saved / name}")
    model.eval()
    picture, ids = Image.open(saved / "picture.png"), torch.from_numpy(np.load(saved / "ids.npy"))
    pixels = prepare(picture)[None]
    assert torch.equal(pixels, theirs["pixels"])  # the same pixels, bit by bit
    torch.manual_seed(0)
    assert torch.equal(train(picture), theirs["train"])
    close = lambda a, key: torch.testing.assert_close(a, theirs[key], rtol=1e-4, atol=2e-5)  # noqa: E731
    close(model.encode_image(pixels), "image")
    close(model.encode_text(ids), "text")
    close(model.get_logits(pixels, ids)[0], "logits")
    found = model.forward_intermediates(pixels, ids, image_indices=1, text_indices=1)
    close(found["image_intermediates"][0], "map")
    close(found["text_intermediates"][0], "tokens")
    if name == "vit":
        longer = open_clip.create_model(f"local-dir:{saved / name}", force_context_length=24)
        close(longer.text.positional_embedding, "positions")


def test_prompts_tokens_and_losses(saved):
    facts = json.loads((saved / "facts.json").read_text())
    assert {t("X") for t in open_clip.OPENAI_IMAGENET_TEMPLATES} == set(facts["templates"])
    assert {t("X") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES} == set(facts["simple"])
    assert open_clip.SimpleTokenizer()(["a cat", "Ein Käfer?", "x" * 200]).tolist() == facts["tokens"]
    a, b = (torch.from_numpy(np.load(saved / f"{n}.npy")) for n in "ab")
    scale, bias = torch.tensor(9.0), torch.tensor(-3.0)
    own = [
        open_clip.ClipLoss()(a, b, scale), open_clip.SigLipLoss()(a, b, scale, bias),
        open_clip.DistillClipLoss()(a, b, scale, b, a, scale)[1],
    ]  # fmt: skip
    assert [v.item() for v in own] == pytest.approx(facts["losses"], rel=1e-5)


@torch.no_grad()
def test_a_saved_model_is_an_image_encoder_of_timm(saved):
    """timm reads the file by its own name of the architecture, here with the small sizes."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 24}
    overlay = {"file": str(saved / "vit" / "open_clip_model.safetensors"), "num_classes": 24, "input_size": (3, 32, 32)}
    encoder = timm.create_model("vit_base_patch16_clip_224", pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    model, image = open_clip.create_model(f"local-dir:{saved / 'vit'}").eval(), torch.randn(2, 3, 32, 32)
    # timm keeps the projection of these files as a head without bias.
    torch.testing.assert_close(encoder.eval()(image), model.encode_image(image), rtol=1e-4, atol=1e-5)
    overlay = {
        **overlay,
        "file": str(saved / "siglip" / "open_clip_model.safetensors"),
        "num_classes": 0,
        "input_size": (3, 160, 160),
    }
    siglip = timm.create_model(
        "test_vit4", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, global_pool="map"
    )
    model, image = open_clip.create_model(f"local-dir:{saved / 'siglip'}").eval(), torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(siglip.eval()(image), model.encode_image(image), rtol=1e-4, atol=1e-5)
