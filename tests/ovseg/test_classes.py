"""Class lists, what a user types, words and their prompts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ovseg.classes import ClassList, class_list, embed_words, parse_classes, prompts_of, read_classes
from ovseg.protocols import PROTOCOLS, Protocol, preset
from training.engine.errors import UserError


def test_words_of_releases():
    classes = class_list("voc21", "sclip")
    assert len(classes) == 21 and classes.background == 0
    assert len(classes.all_words) == len(classes.word_classes) == 56
    assert classes.words[4] == ("ship",) and len(classes.words[0]) == 26
    assert class_list("voc21", "naclip") == classes
    assert class_list("ade150").all_words[:2] == ["wall", "building"]
    with pytest.raises(UserError, match="no words for voc21"):
        class_list("voc21", "maskclip")
    with pytest.raises(UserError, match='no class list is called "voc"'):
        class_list("voc")


def test_what_a_user_types():
    classes = parse_classes(["person|man|woman, car", "sky", ""])
    assert classes.names == ("person", "car", "sky") and classes.words[0] == ("person", "man", "woman")
    with_background = classes.with_background(("wall", "floor"))
    assert with_background.names[0] == "background" and with_background.word_classes.tolist() == [0, 0, 1, 1, 1, 2, 3]
    with pytest.raises(UserError, match="no class names"):
        parse_classes([" , "])
    with pytest.raises(UserError, match='"dog" is given 2 times'):
        parse_classes(["dog", "cat,dog"])
    with pytest.raises(UserError, match="256 classes are more than 255"):
        parse_classes([f"c{i}" for i in range(256)])


def test_files_of_names(tmp_path):
    text = tmp_path / "names.txt"
    text.write_bytes("dog|puppy\n\ncat\n".encode("utf-8-sig"))
    assert read_classes(text).words == (("dog", "puppy"), ("cat",))
    coco = tmp_path / "coco.json"
    coco.write_text('{"categories": [{"id": 9, "name": "b"}, {"id": 2, "name": "a"}]}')
    assert read_classes(coco).names == ("a", "b")
    for content in ("{}", "[1, 2]", "nothing", "[]"):
        coco.write_text(content)
        with pytest.raises(UserError, match="coco.json"):
            read_classes(coco)
    text.write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match="no class names could be read"):
        read_classes(text)


class Letters(nn.Module):
    """A text tower of one number per character."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Embedding(128, 4)
        nn.init.normal_(self.text.weight, generator=torch.Generator().manual_seed(0))

    def encode_text(self, tokens):
        return self.text(tokens).sum(1)


def tokenize(texts):
    return torch.tensor([[ord(c) % 128 for c in f"{t:<60}"] for t in texts])


def test_embeddings_are_means_over_unchanged_words(tmp_path, monkeypatch):
    monkeypatch.setattr("training.class_embeddings.CACHE_FOLDER", tmp_path)
    model = Letters()
    model.visual = nn.Module()
    model.visual.embed_dim = 4
    classes = ClassList(("Dog_x", "cat"), (("Dog_x",), ("cat", "kitten")))
    found = embed_words(model, tokenize, classes, templates="imagenet")
    templates = prompts_of("imagenet")("{}")
    assert len(templates) == 80 and len(prompts_of("maskclip")("a")) == 85 and len(prompts_of("project")("a")) == 63
    for word, row in zip(classes.all_words, found, strict=True):
        prompts = [t.replace("{}", word) for t in templates]
        with torch.no_grad():
            expected = F.normalize(F.normalize(model.encode_text(tokenize(prompts)), dim=-1).mean(0), dim=-1)
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)
    other = embed_words(model, tokenize, classes, templates="plain")
    assert (found - other).abs().max() > 1e-3  # not taken from the cache of other prompts
    with pytest.raises(UserError, match="did you mean imagenet"):
        prompts_of("imagnet")


def test_presets():
    assert len(PROTOCOLS) == 6
    sclip = preset("sclip", "voc21")
    assert (sclip.scale, sclip.threshold, sclip.area, sclip.window, sclip.stride) == (65, 0.1, 0.1, 224, 112)
    assert preset("sclip", "coco_stuff171").short_side == 448 and preset("naclip", "voc20").window == 0
    assert preset("proxyclip", "ade150").short_side == 448 and preset("clearclip", "coco_object").threshold == 0.4
    assert preset("maskclip", "context59").long_side == 520 and preset("sclip", "panoptic").words == "names"
    for name in PROTOCOLS:
        for dataset in ("voc20", "voc21", "context59", "context60", "coco_object", "coco_stuff171", "ade150"):
            class_list(dataset, preset(name, dataset).words)
    with pytest.raises(UserError, match='no protocol is called "x"'):
        preset("x", "voc20")
    with pytest.raises(UserError, match="threshold is 2"):
        Protocol(threshold=2)
    with pytest.raises(UserError, match="remainder"):
        Protocol(remainder="round")
