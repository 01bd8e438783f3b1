"""Token ids against those of another implementation, and properties that hold for any text."""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, clean_text

START, END = 49406, 49407
TOKENIZER = SimpleTokenizer()
# [text, ids without start and end]: several alphabets, html, emoji, broken unicode, class names and prompts; recorded
# with open_clip_torch 3.3.0.
RECORDED = json.loads((Path(__file__).parent / "tokenizer_ids.json").read_text(encoding="utf-8"))


def test_vocabulary_is_the_published_file():
    content = (Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_recorded_ids():
    assert len(RECORDED) > 300
    wrong = [text for text, ids in RECORDED if TOKENIZER.encode(text) != ids]
    assert not wrong


def test_rows_of_a_batch():
    rows = TOKENIZER([text for text, _ in RECORDED])
    assert rows.shape == (len(RECORDED), 77) and rows.dtype == torch.long
    for row, (_, ids) in zip(rows.tolist(), RECORDED, strict=True):
        expected = [START, *ids[:75], END]
        assert row == expected + [0] * (77 - len(expected))
    assert torch.equal(open_clip.tokenize("a cat", 8)[0], torch.tensor([START, 320, 2368, END, 0, 0, 0, 0]))
    assert TOKENIZER.vocab_size == 49408 and (TOKENIZER.sot_token_id, TOKENIZER.eot_token_id) == (START, END)
    assert TOKENIZER([]).shape == (0, 77)


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(2, 100))
def test_any_text_has_a_start_and_one_end(text, length):
    (row,) = TOKENIZER(text, length).tolist()
    ids = TOKENIZER.encode(text)
    assert len(row) == length and row[0] == START
    end = row.index(END)
    assert end == min(len(ids) + 1, length - 1) and row[1:end] == ids[: length - 2] and not any(row[end + 1 :])


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=126), max_size=100))
def test_decoding_gives_the_text_back(text):
    """Up to white space: words are separated by one space wherever a token ends one."""
    expected = clean_text(text).lower()
    decoded = TOKENIZER.decode(TOKENIZER.encode(text))
    assert decoded.replace(" ", "") == expected.replace(" ", "")


@settings(deadline=None)
@given(st.lists(st.from_regex(r"[a-z]+", fullmatch=True), max_size=10))
def test_decoding_gives_words_back_exactly(words):
    assert TOKENIZER.decode(TOKENIZER.encode("  ".join(words))).split() == words


@pytest.mark.parametrize("length", [0, 1])
def test_a_context_without_room_is_refused(length):
    with pytest.raises(ValueError, match=f"context_length is {length}"):
        TOKENIZER("a", length)


# -- tokenizers of the hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path):
    """A folder with the tokenizer of a repository: words, an end token behind them, ids 0 as padding."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", "a", "cat", "dog", "photo", "of", "cats", "Cat"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_hub_tokenizer(hub_folder):
    tokenizer = HFTokenizer(str(hub_folder), context_length=6, clean="canonicalize")
    ids = tokenizer(["A_photo,  of a CAT!", "", "a a a a a a a a cat"])
    assert ids.tolist() == [[3, 6, 7, 3, 4, 1], [1, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 1]]
    assert ids.dtype == torch.long and tokenizer([]).shape == (0, 6)
    assert HFTokenizer(str(hub_folder), 3, clean="lower")("A  Cat").tolist() == [[3, 4, 1]]
    assert HFTokenizer(str(hub_folder), 3)("a Cat").tolist() == [[3, 9, 1]]
    assert tokenizer("a cat", 4).tolist() == [[3, 4, 1, 0]] and tokenizer("a cat").shape == (1, 6)
    (hub_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        HFTokenizer(str(hub_folder))


def test_hub_tokenizer_from_the_cache_and_missing(hub_folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.mktemp("cache")
    snapshot = cache / "models--org--siglip" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (hub_folder / "tokenizer.json").rename(snapshot / "tokenizer.json")
    (cache / "models--org--siglip" / "refs").mkdir()
    (cache / "models--org--siglip" / "refs" / "main").write_text("1")
    with pytest.raises(FileNotFoundError, match="tokenizer_config.json of org/siglip"):  # it may name another padding
        HFTokenizer("org/siglip", 4, cache_dir=str(cache))
    (snapshot / "tokenizer_config.json").write_text('{"pad_token": {"content": "<eos>"}}')
    tokenizer = HFTokenizer("org/siglip", 4, cache_dir=str(cache))
    assert tokenizer("cat").tolist() == [[4, 1, 1, 1]]
    with pytest.raises(FileNotFoundError, match="tokenizer.json of org/other"):
        HFTokenizer("org/other", cache_dir=str(cache))
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        HFTokenizer(str(hub_folder))


def test_padding_is_the_one_that_the_repository_states(hub_folder, tmp_path_factory):
    """SigLIP's towers, which see all tokens and are read at the last, were trained with the end token as padding."""
    config, saved = hub_folder / "tokenizer_config.json", tmp_path_factory.mktemp("saved")
    config.write_text('{"pad_token": "<eos>", "eos_token": "<eos>"}')
    tokenizer = HFTokenizer(str(hub_folder), 6)
    assert tokenizer(["a cat", "a a a a a a a"]).tolist() == [[3, 4, 1, 1, 1, 1], [3, 3, 3, 3, 3, 1]]
    tokenizer.save_pretrained(saved)
    assert HFTokenizer(str(saved), 4)("cat").tolist() == [[4, 1, 1, 1]]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs(["a cat"], padding="max_length", max_length=6, truncation=True)["input_ids"] == [[3, 4, 1, 1, 1, 1]]
    config.write_text('{"pad_token": "<none>"}')
    with pytest.raises(ValueError, match='"<none>" is not in the vocabulary: write pad_token'):
        HFTokenizer(str(hub_folder))


def test_threads_ask_one_hub_tokenizer_for_different_lengths(hub_folder):
    tokenizer = HFTokenizer(str(hub_folder), 6)

    def ask(length: int) -> bool:
        return all(tokenizer(["a cat", "dog"] * 8, length).shape == (16, length) for _ in range(150))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ask, (5, 8, 16)))


def test_the_package_of_hub_tokenizers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        open_clip.get_tokenizer("ViT-B-16-SigLIP2-256")
    with pytest.raises(ValueError, match='cleaning "upper"'):
        HFTokenizer("org/x", clean="upper")


def test_a_tokenizer_with_separators_is_stripped_and_saved(tmp_path):
    """BERT's, as CLIPA reads it: zeros where the separator stands; and written for a saved model."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a", "cat"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    plain, stripped = HFTokenizer(str(tmp_path), 6), HFTokenizer(str(tmp_path), 6, strip_sep_token=True)
    assert plain("a cat").tolist() == [[1, 4, 5, 2, 3, 3]] and stripped("a cat").tolist() == [[1, 4, 5, 0, 3, 3]]
    (tmp_path / "saved").mkdir()
    stripped.save_pretrained(tmp_path / "saved")
    assert HFTokenizer(str(tmp_path / "saved"), 4)("a cat").tolist() == [[1, 4, 5, 2]]
    for option in ({"language": "de"}, {"tokenizer_mode": "clips"}):
        with pytest.raises(ValueError, match="not part of this package"):
            HFTokenizer(str(tmp_path), **option)


def test_options_of_clips_tokenizer():
    more = SimpleTokenizer(additional_special_tokens=["<region>"], context_length=6)
    assert more("a <region> cat").tolist() == [[START, 320, 49408, 2368, END, 0]] and more.vocab_size == 49409
    assert SimpleTokenizer(clean="canonicalize").encode("A cat, here!") == TOKENIZER.encode("a cat here")
    assert SimpleTokenizer(clean="whitespace").encode("CAT") != TOKENIZER.encode("CAT") == [2368]
    assert open_clip.decode(open_clip.tokenize("a cat")[0, 1:3]) == "a cat "
    with pytest.raises(ValueError, match="captions are not shortened"):
        SimpleTokenizer(reduction_mask="simple")
    with pytest.raises(ValueError, match='cleaning "upper" is unknown'):
        SimpleTokenizer(clean="upper")
