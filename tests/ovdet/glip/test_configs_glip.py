"""The configs that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovdet.config import load_config
from ovdet.glip.assemble import read_config
from ovdet.glip.build import make_tokenizer, on_meta
from ovdet.glip.data.sets import SetConfig, training_sets
from ovdet.glip.testing import selection
from training.engine.errors import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "GLIP" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configs_can_be_read(path: Path):
    config = read_config(path)
    assert config.image.kind in ("swin", "clip") and selection(config).nms == 0.6
    if config.data.train_sets:
        assert all(Path(s.path).parent == CONFIGS / "data" for s in training_sets(config))


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.toml")), ids=lambda path: path.stem)
def test_data_set_files_can_be_read(path: Path):
    assert load_config(SetConfig, path).set.annotations


def test_variants_differ_as_published():
    late, fused, large = (read_config(CONFIGS / f"glip_{name}.toml") for name in ("t_a", "t", "l"))
    assert (late.head.fusion, fused.head.fusion) == (False, True) and (fused.head.blocks, large.head.blocks) == (6, 8)
    assert (large.image.width, large.image.window, large.image.freeze_at) == (192, 12, 2)
    assert (large.train.weight_decay, large.train.weight_decay_at) == (0.01, [0.667])
    lvis = read_config(CONFIGS / "lvis.toml")
    assert lvis.test.chunk == 40 and selection(lvis).per_image == 300


def test_impossible_values_are_named(tmp_path: Path):
    for override, message in (
        ("image.heads=[5,5,5,5]", "numbers that divide"),
        ("head.offsets=other", "released"),
        ("train.decay_at=[0]", "positive shares"),
        ("data.protocol=voc", "must be"),
        ("test.aggregation=median", "must be"),
        ("train.lrr=1", "did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(CONFIGS / "glip_t.toml", [override])


def test_bert_without_its_package_or_files(monkeypatch: pytest.MonkeyPatch, small_vocabulary: Path):
    config = read_config(CONFIGS / "glip_t.toml", [f"text.vocabulary={small_vocabulary}", "text.tokens=200"])
    with pytest.raises(UserError, match="but the text encoder knows 200"):
        make_tokenizer(config)
    config.text.tokens = len(small_vocabulary.read_text().splitlines())
    tokenizer = make_tokenizer(config)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers"):
        on_meta(config, tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="needs the package tokenizers"):
        make_tokenizer(config)
    config.text.vocabulary = "bert-base-uncased"

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match="neither a file nor in the cache"):
        make_tokenizer(config)
