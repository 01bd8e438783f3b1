"""The text tower against recorded numbers and against PyTorch's own transformer encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from open_clip.text_tower import QuickGELU, TextTower, text_tower_from_config

SMALL = {"width": 32, "heads": 4, "layers": 3, "vocab_size": 200, "context_length": 16}
SIGLIP = {
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"}, "hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"},
}  # fmt: skip


def randomise(tower: TextTower) -> TextTower:
    """Weights that are nowhere zero or one, so that every one of them matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return tower


def texts(count: int = 5, length: int = 16) -> torch.Tensor:
    """Token ids with the end token (199) at different places, and padding behind it."""
    ids = torch.randint(1, 198, (count, length), generator=torch.Generator().manual_seed(1))
    for row in range(count):
        ids[row, 6 + row], ids[row, 7 + row :] = 199, 0
    return ids


@pytest.mark.parametrize("kind", ["eva", "vit_gelu", "vit_quickgelu"])
def test_golden(golden, kind):
    folder = golden / kind
    if not (folder / "weights.safetensors").is_file():
        pytest.skip(f"{kind} is not among the golden files kept in the repository")
    config = json.loads((folder / "config.json").read_text())
    tower = text_tower_from_config(config["text_cfg"], config["embed_dim"], config["quick_gelu"])
    state, prefix = load_file(folder / "weights.safetensors"), "text." if kind == "eva" else ""
    tower.load_state_dict({name: state[prefix + name] for name in tower.state_dict()})
    tokens = torch.from_numpy(np.load(folder / "inputs.npz")["tokens"])
    expected = torch.from_numpy(np.load(folder / "outputs.npz")["encode_text"])
    with torch.no_grad():
        torch.testing.assert_close(tower(tokens), expected, rtol=0, atol=1e-5)
        length = int(tokens.argmax(1).max()) + 1
        torch.testing.assert_close(tower(tokens[:, :length]), expected, rtol=0, atol=1e-5)


def encoder_embedding(
    tower: TextTower, tokens: torch.Tensor, activation: nn.Module, *, eps: float, causal: bool
) -> torch.Tensor:
    """All token states ``[B, L, W]`` after the final norm, by nn.TransformerEncoderLayer."""
    x = tower.token_embedding(tokens) + tower.positional_embedding[: tokens.shape[1]]
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1) if causal else None
    for block in tower.transformer.resblocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, 0.0, activation, layer_norm_eps=eps, batch_first=True, norm_first=True, dtype=x.dtype
        )
        names = {
            "self_attn": block.attn, "linear1": block.mlp.c_fc, "linear2": block.mlp.c_proj, "norm1": block.ln_1,
            "norm2": block.ln_2,
        }  # fmt: skip
        for name, module in names.items():
            getattr(layer, name).load_state_dict(module.state_dict())
        x = layer(x, src_mask=mask)
    return nn.functional.layer_norm(x, (32,), tower.ln_final.weight, tower.ln_final.bias, eps)


@pytest.mark.parametrize("kind", ["clip", "quick_gelu", "siglip", "first"])
@torch.no_grad()
def test_equals_the_transformer_encoder(kind):
    extra = {"siglip": SIGLIP, "first": {"pool_type": "first", "xattn": True, "fusedLN": True}}.get(kind, {})
    causal = kind != "siglip"
    tower = randomise(text_tower_from_config({**SMALL, **extra}, 24, kind == "quick_gelu").double())
    activation = {"siglip": nn.GELU("tanh"), "quick_gelu": QuickGELU()}.get(kind, nn.GELU())
    tokens = texts()
    states = encoder_embedding(tower, tokens, activation, eps=1e-6 if kind == "siglip" else 1e-5, causal=causal)
    if kind == "siglip":
        expected = states[:, -1] @ tower.text_projection.weight.T + tower.text_projection.bias
    else:
        place = torch.zeros(5, dtype=torch.long) if kind == "first" else torch.arange(6, 11)
        expected = states[torch.arange(5), place] @ tower.text_projection
    torch.testing.assert_close(tower(tokens), expected, rtol=1e-10, atol=1e-10)


def test_checkpointing_changes_no_gradient():
    tower = randomise(TextTower(output_dim=24, **SMALL).double())
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        tower(texts()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_initial_deviations():
    torch.manual_seed(0)
    tower = TextTower(width=256, heads=4, layers=8, output_dim=128, vocab_size=1000)
    state = tower.state_dict()
    block = "transformer.resblocks.7."
    expected = {
        "token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": 1 / 16,
        block + "attn.in_proj_weight": 1 / 16, block + "attn.out_proj.weight": 1 / 64,
        block + "mlp.c_fc.weight": 512**-0.5, block + "mlp.c_proj.weight": 1 / 64,
    }  # fmt: skip
    for name, deviation in expected.items():
        assert state[name].std().item() == pytest.approx(deviation, rel=0.05), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ls_init_value": 0.1}, "sets ls_init_value to 0.1: no published ViT needs it"),
        ({"layer": 12}, "unknown key layer: did you mean layers"),
        ({"proj_type": "none"}, "width is 32, embed_dim 24: without a projection they must be the same"),
        ({"proj_type": "mlp"}, 'proj_type "mlp"'),
        ({"hf_model_name": "xlm-roberta-base"}, "xlm-roberta-base"),
        ({"heads": 5}, "width is 32: it must be a multiple of the 5 heads"),
        ({"pool_type": "mean"}, 'pooling is "mean"'),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        text_tower_from_config({**SMALL, **change}, 24)


def test_missing_sizes_and_long_texts_are_refused():
    with pytest.raises(ValueError, match="lacks heads, layers"):
        text_tower_from_config({"width": 32}, 24)
    with pytest.raises(ValueError, match="17 tokens a text, but the model takes 16"):
        TextTower(output_dim=24, **SMALL)(torch.ones(1, 17, dtype=torch.long))
