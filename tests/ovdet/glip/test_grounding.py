"""Texts, maps, prompts and phrases, against numbers recorded from the reference and by hand; what is computed once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ovdet.glip import phrases as ph
from ovdet.glip import tokens as tk
from ovdet.glip.decode import Selection
from ovdet.glip.inference import encode_knowledge, encode_prompts, find, find_own
from ovdet.glip.model import GLIP
from ovdet.glip.prompts import (
    ClassPrompt,
    clean_name,
    knowledge_texts,
    make_prompts,
    read_class_prompts,
    read_knowledge,
    write_query,
)  # fmt: skip
from training.engine.errors import UserError


@pytest.fixture(scope="module")
def recorded(glip_golden: Path) -> dict:
    return json.loads((glip_golden / "text.json").read_text())


@pytest.fixture(scope="module")
def bert(vocabulary: Path) -> tk.WordPieces:
    return tk.WordPieces(vocabulary, 256, 30522)


@pytest.fixture
def words(small_vocabulary: Path) -> tk.WordPieces:
    return tk.WordPieces(small_vocabulary, 64)


# -- recorded ---------------------------------------------------------------------------------------------------------


def test_maps_match_the_recorded_ones(recorded: dict):
    """From the recorded offsets alone, without a vocabulary."""
    for caption in recorded["captions"]:
        encoded = tk.Encoded(caption["ids"], [tuple(o) for o in caption["offsets"]])
        found = [tk.tokens_of_spans(encoded, [tuple(s) for s in spans]) for spans in caption["spans"]]
        assert found == caption["tokens_of_span"]
        assert {str(i): t for i, t in enumerate(found, 1)} == caption["label_to_token"]
        rows = tk.positive_map(found, len(encoded.ids), normalize=True)
        assert torch.allclose(rows.amax(1), torch.tensor(caption["value"]), atol=1e-6)
        assert torch.equal(tk.positive_map(found, len(encoded.ids)), rows > 0)


def test_ids_match_the_recorded_ones(recorded: dict, bert: tk.WordPieces):
    for caption in recorded["captions"]:
        encoded = bert.encode(caption["caption"])
        assert encoded.ids == caption["ids"] and [list(o) for o in encoded.offsets] == caption["offsets"]


def test_queries_match_the_recorded_ones(recorded: dict, bert: tk.WordPieces):
    for group in recorded["queries"]["coco"] + recorded["queries"]["lvis"]:
        classes = [ClassPrompt(clean_name(name)) for name in group["names"]]
        assert write_query(classes)[0] == group["query"]
        (prompt,) = make_prompts(group["names"], bert, labels=group["labels"])
        assert prompt.encoded.ids == group["ids"] and prompt.labels == group["labels"]
        assert {str(k): v for k, v in zip(prompt.labels, prompt.tokens, strict=True)} == group["map"]
    # Chunks of a list are the recorded groups.
    groups = recorded["queries"]["lvis"]
    names = [name for group in groups for name in group["names"]]
    chunks = make_prompts(names, bert, chunk=len(groups[0]["names"]))
    assert [p.encoded.ids for p in chunks] == [group["ids"] for group in groups]
    described = recorded["queries"]["caption_prompt"]
    classes = [ClassPrompt(**entry) for entry in described["prompt"]]
    (prompt,) = make_prompts(classes, bert)
    assert write_query(classes)[0] == described["query"]
    assert {str(i): t for i, t in enumerate(prompt.tokens, 1)} == described["map"]
    assert {name: clean_name(name) for name in recorded["clean_name"]} == recorded["clean_name"]


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_clip_tokens_know_their_characters():
    tokenizer = tk.ClipPairs()
    for text in ("a red striped circle. a ping-pong ball", "Straße façade 日本 café", " fish. jellyfish "):
        encoded = tokenizer.encode(text)
        assert encoded.ids == [tokenizer._engine.sot_token_id, *tokenizer._engine.encode(text), max(encoded.ids)]
        for begin, end in encoded.offsets[1:-1]:
            assert text[begin:end].strip() == text[begin:end] != ""
        named = {i for begin, end in encoded.offsets for i in range(begin, end)}
        assert named == {i for i, c in enumerate(text) if not c.isspace()}
    with pytest.raises(UserError, match="double spaces"):
        tokenizer.encode("two  spaces")
    (prompt,) = make_prompts(["red circle", "star"], tokenizer)
    assert prompt.tokens == [[1, 2], [4]]


def test_vocabularies_that_do_not_fit(tmp_path: Path, small_vocabulary: Path):
    with pytest.raises(UserError, match="does not exist"):
        tk.WordPieces(tmp_path)
    with pytest.raises(UserError, match="has [0-9]+ tokens, but the text encoder knows 30522"):
        tk.WordPieces(small_vocabulary, size=30522)
    (tmp_path / "vocab.txt").write_text("hello\nworld\n")
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        tk.WordPieces(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\ndog\n")
    with pytest.raises(UserError, match="names a token twice"):
        tk.WordPieces(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        tk.WordPieces(tmp_path)


def test_texts_are_padded_to_the_longest(words: tk.WordPieces):
    ids, mask = tk.pad([words.encode("a dog"), words.encode("a dog on the sofa")], words)
    assert ids.shape == mask.shape == (2, 7) and mask.sum(1).tolist() == [4, 7]
    assert (ids[0, 4:] == words.padding).all()
    with pytest.raises(UserError, match="has 72 tokens, but the text encoder takes 64"):
        tk.pad([words.encode("dog " * 70)], words)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_long_lists_are_split_without_loss(words: tk.WordPieces):
    names = [f"{a} {b} {c}" for a in ("red", "blue", "green", "big") for b in ("cat", "dog", "bus") for c in "abcdef"]
    prompts = make_prompts(names, words)
    assert [label for p in prompts for label in p.labels] == list(range(len(names)))
    assert all(len(p.encoded.ids) <= words.limit for p in prompts)
    for prompt, following in zip(prompts, prompts[1:], strict=False):
        # One more name would not have fitted.
        more = [names[i] for i in (*prompt.labels, following.labels[0])]
        assert len(words.encode(". ".join(more)).ids) > words.limit
    fixed = make_prompts(names, words, chunk=5)
    assert {len(p.labels) for p in fixed} == {5, len(names) % 5} - {0}
    # A group that needs more tokens than there are is split as well.
    large = make_prompts(names, words, chunk=40)
    assert max(len(p.labels) for p in large) < 40 and sum(len(p.labels) for p in large) == len(names)
    # Each name's tokens are those of its letters.
    for prompt in prompts:
        for label, tokens in zip(prompt.labels, prompt.tokens, strict=True):
            assert [prompt.encoded.ids[t] for t in tokens] == words.encode(names[label]).ids[1:-1]


def test_prompts_that_cannot_be(words: tk.WordPieces):
    with pytest.raises(UserError, match="list of classes is empty"):
        make_prompts([], words)
    with pytest.raises(UserError, match="alone needs 72 tokens, but the text encoder takes 64"):
        make_prompts(["cat", "dog " * 70], words)
    with pytest.raises(UserError, match='class " " has no letters'):
        make_prompts(["cat", "_"], words)


def test_descriptions_from_a_file(tmp_path: Path, words: tk.WordPieces):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"stingray": {"suffix": ", which is flat and round"}}))
    classes = read_class_prompts(path, ["fish", "stingray"])
    (prompt,) = make_prompts(classes, words)
    text, spans = write_query(classes)
    assert text == "fish. stingray, which is flat and round" and [text[b:e] for b, e in spans] == ["fish", "stingray"]
    assert prompt.tokens == [[1], [3, 4]]
    for content, message in (
        ([{"name": "fish"}], "1 entries for 2 classes"),
        ({"cat": {}}, '"cat" is no class'),
        ([{"name": "fish"}, {"word": "x"}], "must hold prefix, name, suffix"),
        ([{"name": "fish"}, {"name": 3}], "something else than text"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_class_prompts(path, ["fish", "stingray"])
    path.write_text("no json")
    with pytest.raises(UserError, match="cannot be read"):
        read_class_prompts(path, ["fish"])


def test_knowledge_of_classes(tmp_path: Path):
    pytest.importorskip("yaml")
    path = tmp_path / "knowledge.yaml"
    path.write_text(
        "fish:\n  clean_name: a fish\n  def_wiki: Lives in water.\n  def_wn: An animal.\n  gpt3: [One., Two., Three.]\n"
        "cat: {gpt3: []}\n"
    )
    entries = read_knowledge(path)
    assert knowledge_texts(entries, ["fish", "cat"], "def_wiki") == ["a fish: Lives in water.", "cat"]
    assert knowledge_texts(entries, ["fish"], "def_wn") == ["a fish: An animal."]
    assert knowledge_texts(entries, ["fish"], "gpt3", 2) == ["a fish: One. Two."]
    assert knowledge_texts(entries, ["fish"], "gpt3_and_wiki", 1) == ["a fish: Lives in water. One."]
    with pytest.raises(UserError, match='no entry for class "dog"'):
        knowledge_texts(entries, ["dog"], "def_wiki")
    with pytest.raises(UserError, match="use one of def_wiki"):
        knowledge_texts(entries, ["fish"], "def")


# -- phrases ----------------------------------------------------------------------------------------------------------


def test_phrases_by_the_built_in_rule():
    found = ph.noun_phrases("bobble heads on top of the shelf")
    assert [p.spans for p in found] == [((0, 12),), ((16, 19),), ((23, 32),)]
    caption = "A Man riding a big brown horse, near two parked cars and a man."
    assert [p.text for p in ph.noun_phrases(caption)] == ["a man", "a big brown horse", "two parked cars"]
    man = ph.noun_phrases(caption)[0]
    assert [caption[b:e] for b, e in man.spans] == ["A Man", "a man"]
    assert ph.noun_phrases("riding along on it") == [] and ph.noun_phrases("") == []


def test_phrases_by_other_taggers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Absent packages and absent data are told apart; a tagger's own tags are what counts."""
    for name in ("nltk", "spacy"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"needs the package {name}"):
            ph.noun_phrases("a dog", name, tmp_path)

    def no_data(words: list[str]) -> list:
        raise LookupError

    fake = SimpleNamespace(data=SimpleNamespace(path=[]), pos_tag=no_data)
    monkeypatch.setitem(sys.modules, "nltk", fake)
    with pytest.raises(UserError, match="hold no averaged_perceptron_tagger_eng"):
        ph.noun_phrases("a dog", "nltk", tmp_path)
    assert fake.data.path == [str(tmp_path)]
    fake.pos_tag = lambda words: [(w, {"the": "DT", "run": "NNS", "lazy": "JJR"}.get(w, "VB")) for w in words]
    assert [p.text for p in ph.noun_phrases("See the lazy run end", "nltk")] == ["the lazy run"]

    def load(name: str):
        if name == str(tmp_path):
            raise OSError
        tags = {"the": "DT", "dog": "NN"}
        return type("Pipeline", (), {"vocab": None, "__call__": lambda self, doc: [
            SimpleNamespace(tag_=tags.get(w, "VB")) for w in doc]})()  # fmt: skip

    tokens = SimpleNamespace(Doc=lambda vocab, words: words)
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load, tokens=tokens))
    assert [p.text for p in ph.noun_phrases("pet the dog", "spacy")] == ["the dog"]
    with pytest.raises(UserError, match="is no pipeline"):
        ph.noun_phrases("a dog", "spacy", tmp_path)
    with pytest.raises(UserError, match="use one of rule, nltk, spacy"):
        ph.noun_phrases("a dog", "other")


def test_given_phrases():
    caption = "The man and the woman (C++)"
    (man, code) = ph.phrases_of_texts(caption, ["man", "C++"])
    assert man.spans == ((4, 7),) and code.spans == ((23, 26),)  # not the end of "woman"; no pattern
    (both,) = ph.phrases_of_texts(caption, ["the"])
    assert both.spans == ((0, 3), (12, 15))
    (joined,) = ph.phrases_of_spans(caption, [[(0, 3), (16, 21)]])
    assert joined.text == "The woman"
    assert ph.split_list("sofa . remote . dog . remote .") == ["sofa", "remote", "dog"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ph.phrases_of_spans("a dog", [[(0, 9)]]), r"span \[0, 9\] is not within the 5 characters"),
        (lambda: ph.phrases_of_spans("a dog", [[(-1, 2)]]), "is not within"),
        (lambda: ph.phrases_of_spans("a dog", [[(3, 3)]]), "is not within"),
        (lambda: ph.phrases_of_spans("a dog", [[(1, 2)]]), "white space"),
        (lambda: ph.phrases_of_spans("a dog", [[]]), "has no span"),
        (lambda: ph.phrases_of_texts("a dog", ["cat"]), '"cat" does not stand in the caption'),
        (lambda: ph.phrases_of_texts("a dog", [""]), "does not stand"),
        (lambda: ph.phrases_of_texts("a dog", []), "no phrase"),
        (lambda: ph.split_list(" . . "), "names nothing"),
    ],
)
def test_phrases_that_cannot_be(call: Callable, message: str):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_captions_that_cannot_be(words: tk.WordPieces):
    with pytest.raises(UserError, match="has no phrases to look for"):
        ph.caption_prompt("riding along", [], words)
    with pytest.raises(UserError, match="has 72 tokens, but the text encoder takes 64"):
        ph.caption_prompt("dog " * 70, [ph.Phrase("dog", ((0, 3),))], words)


# -- computed once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [True, False])
def test_the_image_side_is_computed_once(tiny: Callable[..., GLIP], fusion: bool):
    """1203 names are many prompts: the texts are encoded once, and each image once, in batches of any size."""
    model = tiny(fusion=fusion)
    names = [f"{a} {b} {i}" for i in range(21) for a in ("red", "big", "small") for b in ("cat", "dog", "bus", "ball")]
    names = (names * 5)[:1203]
    query = encode_prompts(model, make_prompts(names, model.tokenizer, chunk=40))
    # Groups of 40 of these names need more than the 64 tokens of the small model.
    assert len(query.prompts) > 1203 / 40 and model.encoded_texts == len(query.prompts)
    few = encode_prompts(model, make_prompts(names[:150], model.tokenizer))
    model.encoded_texts = model.encoded_images = 0
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=generator)
    sizes, originals = [(64, 96), (60, 90), (64, 64)], [(128, 192), (60, 90), (32, 32)]
    passes = {"swin": 0, "tower": 0}
    model.image.swin.register_forward_hook(lambda *_: passes.update(swin=passes["swin"] + 1))
    model.head.blocks[0].dyconv.register_forward_hook(lambda *_: passes.update(tower=passes["tower"] + 1))
    options = Selection(score=0.0, per_image=20)
    found = find(model, images, sizes, originals, few, options)
    assert model.encoded_images == 3 and model.encoded_texts == 0 and passes["swin"] == 1
    assert passes["tower"] == (len(few.prompts) if fusion else 1)
    for i, result in enumerate(found):  # one by one gives the same
        (alone,) = find(model, images[i : i + 1], sizes[i : i + 1], originals[i : i + 1], few, options)
        assert torch.allclose(alone["scores"], result["scores"], atol=1e-5)
        assert len(result["scores"]) == 20 * len(few.prompts) and result["labels"].max() > 100
        height, width = originals[i]
        assert result["boxes"].min() >= 0 and (result["boxes"] < torch.tensor([width, height] * 2) + 1).all()


def test_prompts_of_their_own_and_knowledge(tiny: Callable[..., GLIP]):
    model = tiny()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    sizes = [(64, 64)] * 2
    options = Selection(score=0.0, per_image=10)
    prompts = [
        ph.caption_prompt(c, ph.noun_phrases(c), model.tokenizer)
        for c in ("a dog on the sofa", "a red ball near a cat")
    ]
    found = find_own(model, images, sizes, sizes, prompts, options)
    for i, prompt in enumerate(prompts):
        (alone,) = find_own(model, images[i : i + 1], sizes[:1], sizes[:1], [prompt], options)
        assert torch.allclose(alone["scores"], found[i]["scores"], atol=1e-5)
    query = encode_knowledge(model, ["a dog: an animal", "cat " * 100])
    assert query.texts[0].hidden.shape[:2] == (1, 2)
    (first, _) = find(model, images, sizes, sizes, query, options)
    assert set(first["labels"].tolist()) <= {0, 1}
    with pytest.raises(UserError, match="use first or mean"):
        encode_knowledge(model, ["a"], "last")
