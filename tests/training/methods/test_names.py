"""Lists of class names, and texts about them."""

from __future__ import annotations

import json

import pytest

from training.methods.names import KNOWN, LIST, read_names, read_texts
from training.params import parse_args


def test_the_list_that_is_here():
    names, things = read_names("coco-stuff-ade20k")
    entries = json.loads(KNOWN["coco-stuff-ade20k"].read_text())
    assert len(names) == len(set(map(str.lower, names))) == len(entries) > 200
    assert sum(e["isthing"] for e in entries) == things > 100
    assert {"person", "swivel chair"} <= set(names[:things]) and {"sky", "brick wall"} <= set(names[things:])
    assert not any("-other" in name or "-stuff" in name for name in names)


def test_rich_texts_begin_with_the_label(tmp_path):
    """As SynCLIP gives them: label, definition, synonyms."""
    texts = {"dog": ["a domestic canine", "hound"], "cat": "Cat, a feline"}
    (tmp_path / "rich.json").write_text(json.dumps(texts))
    found = read_texts(str(tmp_path / "rich.json"), ["dog", "cat", "cow"])
    assert found == ["dog, a domestic canine, hound", "Cat, a feline", "cow"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method", "densevlm"], [LIST]),
        (["--recipe", "synclip-b16"], ["boxes", "class names"]),
        (["--recipe", "synclip-b16-free"], [LIST]),
        (["--recipe", "mixrc-b16"], ["boxes"]),
        (["--recipe", "mixrc-b16", "--semantic-weight", "0.1"], ["boxes", LIST]),
        (["--recipe", "clipself-b16"], []),
    ],
)
def test_results_name_what_people_wrote(flags, expected):
    assert parse_args(["--train-data", "a.json", "--train-image-root", "images", *flags]).learned_from() == expected
