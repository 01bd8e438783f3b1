"""Keys of caches and runs change with what a model computes, though its weights are the same."""

from __future__ import annotations

import pytest
import torch

import open_clip
from open_clip.build import build_model
from open_clip.identity import architecture_hash, identity
from ovdet import files
from training.class_embeddings import cache_key
from training.engine.errors import UserError

NAMES = ["cat", "dog"]


def model(**changes) -> open_clip.CLIP:
    """A tiny CLIP with the weights of seed 0; ``changes`` are of what has no weights in its config."""
    config = open_clip.get_model_config("ViT-Ti-8-64")
    for place, value in changes.items():
        *rooms, key = place.split("__")
        room = config
        for part in rooms:
            room = room[part]
        room[key] = value
    torch.manual_seed(0)
    return build_model(config).eval()


CHANGES = {"activation": {"quick_gelu": True}, "heads": {"vision_cfg__head_width": 16, "text_cfg__heads": 8}}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_every_key_changes_with_the_architecture(what, tmp_path):
    before, after = model(), model(**CHANGES[what])
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    tokenizer = open_clip.get_tokenizer("ViT-Ti-8-64")
    assert cache_key(before, tokenizer, NAMES) != cache_key(after, tokenizer, NAMES)  # class embeddings, all programs
    assert identity(before.visual) != identity(after.visual)  # teachers' answers, segmentation counts, label maps
    assert architecture_hash(before) != architecture_hash(after)  # resumed runs
    vits = [
        {"name": "x", "weights": "w", "hash": files.vit_hash(m), "architecture": architecture_hash(m.visual)}
        for m in (before, after)
    ]
    assert vits[0]["hash"] == vits[1]["hash"]
    content = {"format": files.FORMAT, "version": 2, "vit": vits[0]}
    files.check_vit(content, vits[0], before, tmp_path / "d.pt")
    with pytest.raises(UserError, match="of another architecture"):
        files.check_vit(content, vits[1], after, tmp_path / "d.pt")


def test_prompts_and_names_are_part_of_the_key():
    clip, tokenizer = model(), open_clip.get_tokenizer("ViT-Ti-8-64")
    key = cache_key(clip, tokenizer, NAMES)
    assert key == cache_key(clip, tokenizer, NAMES)
    assert key != cache_key(clip, tokenizer, NAMES[::-1])
    assert key != cache_key(clip, tokenizer, NAMES, lambda name: [f"a {name}"])


def test_a_resume_with_another_activation_is_refused(program, capsys):
    assert program(name="run", epochs=1, model="ViT-Ti-8-64") == 0
    assert program("--force-quick-gelu", name="run", epochs=2, model="ViT-Ti-8-64", resume="latest") == 2
    assert "the model's architecture was" in capsys.readouterr().err
