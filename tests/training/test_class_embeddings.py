"""Class embeddings from files of every kind, and from the text tower through the cache."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from open_clip.prompts import class_prompts
from training.class_embeddings import cache_key, load_class_embeddings, load_or_compute
from training.engine.errors import UserError

NAMES = ["cat", "traffic_light", "wall/other"]
ARRAY = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def test_files_of_every_kind(tmp_path):
    """Half precision, a scaled array and a dict with more classes all give the same unit vectors."""
    np.save(tmp_path / "single.npy", ARRAY.numpy())
    np.save(tmp_path / "half.npy", ARRAY.half().numpy())
    np.save(tmp_path / "double.npy", 5 * ARRAY.double().numpy())
    torch.save(
        {"background": torch.zeros(8), **dict(zip(reversed(NAMES), ARRAY.flip(0), strict=True))}, tmp_path / "d.pt"
    )
    torch.save(ARRAY, tmp_path / "tensor.pt")
    for name in ("single.npy", "half.npy", "double.npy", "d.pt", "tensor.pt"):
        loaded = load_class_embeddings(tmp_path / name, NAMES, 8)
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(loaded, ARRAY, atol=1e-3 if name == "half.npy" else 1e-7, rtol=0)
        torch.testing.assert_close(loaded.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


def test_wrong_files_get_one_line(tmp_path):
    def message(content, names=NAMES, width=8, file="x.npy") -> str:
        if isinstance(content, bytes):
            (tmp_path / file).write_bytes(content)
        elif isinstance(content, np.ndarray):
            np.save(tmp_path / file, content, allow_pickle=True)
        else:
            torch.save(content, tmp_path / file)
        with pytest.raises(UserError) as error:
            load_class_embeddings(tmp_path / file, names, width, flag="--train-embed-path", names_file="instances.json")
        text = str(error.value)
        assert "\n" not in text and f"--train-embed-path {tmp_path / file}" in text
        return text

    array = ARRAY.numpy()
    text = message(array, names=NAMES[:2])
    assert "(3, 8)" in text and "instances.json has 2 classes" in text and "8 wide" in text
    assert "16 wide" in message(array, width=16)
    assert "(3,)" in message(array[:, 0])
    assert "not finite" in message(np.where(array > 1, 0, np.inf).astype(np.float32))
    assert "no array of floats" in message(np.zeros((3, 8), dtype=np.int64))
    assert "not readable" in message(b"\x93NUMPY")
    assert "not readable" in message(np.array([{}], dtype=object))  # pickled: refused, not run
    assert "'traffic_light', 'wall/other' of the 3 classes of instances.json" in message({"cat": ARRAY[0]}, file="x.pt")
    assert "different shapes" in message(dict(zip(NAMES, [ARRAY[0], ARRAY[0], ARRAY[0, :4]], strict=True)), file="x.pt")
    assert "not readable" in message({"cat": Namespace(x=1)}, file="x.pt")
    with pytest.raises(UserError, match="--embed-path .*none.npy: no such file"):
        load_or_compute(Namespace(embed_path=str(tmp_path / "none.npy")), None, None, NAMES, embed_dim=8)


class Letters(nn.Module):
    """A model whose text embedding is the sum of its tokens' rows; counts the texts it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.EmbeddingBag(256, 8, mode="sum")
        self.visual = Namespace(embed_dim=8)
        self.texts = 0

    def encode_text(self, tokens, normalize=False):
        self.texts += len(tokens)
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features


def tokenize(texts):
    codes = [[ord(c) for c in text] for text in ([texts] if isinstance(texts, str) else texts)]
    return torch.tensor([row + [0] * (120 - len(row)) for row in codes])


def test_computed_once_and_cached(tmp_path, caplog):
    model, args = Letters(), Namespace(embed_path="")
    computed = load_or_compute(args, model, tokenize, NAMES, cache_folder=tmp_path)
    assert model.texts == 3 * 63
    with torch.no_grad():
        per_prompt = [model.text(tokenize(class_prompts(name))).double() for name in NAMES]
    expected = torch.stack([F.normalize(F.normalize(p, dim=1).mean(0), dim=0) for p in per_prompt])
    torch.testing.assert_close(computed.double(), expected, atol=1e-6, rtol=0)

    texts = model.texts
    again = load_or_compute(args, model, tokenize, NAMES, cache_folder=tmp_path)
    assert torch.equal(again, computed) and model.texts == texts and not computed.requires_grad
    [file] = tmp_path.iterdir()  # one file, no temporary left
    assert file.name == f"{cache_key(model, tokenize, NAMES)}.npy"

    file.write_bytes(file.read_bytes()[:60])
    assert torch.equal(load_or_compute(args, model, tokenize, NAMES, cache_folder=tmp_path), computed)
    assert "damaged" in caplog.text and np.load(file).shape == (3, 8)

    with torch.no_grad():
        model.text.weight[5] += 1e-3  # other weights, other names: other entries
    keys = {cache_key(model, tokenize, NAMES), cache_key(model, tokenize, NAMES[::-1]), file.stem}
    assert len(keys) == 3
    not_a_folder = tmp_path / "file"
    not_a_folder.touch()
    load_or_compute(args, model, tokenize, NAMES, cache_folder=not_a_folder)
    assert "not cached" in caplog.text
    texts = model.texts
    for _ in range(2):  # a text tower that trains
        load_or_compute(args, model, tokenize, NAMES, cache_folder=None)
    assert model.texts == texts + 2 * 3 * 63 and len(list(tmp_path.iterdir())) == 2


def test_a_text_tower_that_was_moved_still_trains(tmp_path, monkeypatch):
    """A move between devices makes new parameters; those made in inference mode would get no gradient any more."""
    model, moves = Letters(), []

    def to(device):
        moves.append(device)
        return model.text.double() if len(moves) == 1 else model.text.float()

    monkeypatch.setattr(model.text, "to", to)
    computed = load_or_compute(Namespace(embed_path=""), model, tokenize, NAMES, device="cpu", cache_folder=tmp_path)
    weight = model.text.weight
    assert len(moves) == 2 and weight.dtype == torch.float32
    assert not weight.is_inference() and not computed.is_inference() and not computed.requires_grad
    model.encode_text(tokenize(["cat"])).sum().backward()
    assert weight.grad.count_nonzero() > 0
