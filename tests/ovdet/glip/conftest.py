"""What the tests of GLIP share."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovdet.glip.build import build_glip, make_tokenizer
from ovdet.glip.config import GlipConfig
from ovdet.glip.model import GLIP


@pytest.fixture(scope="session")
def glip_golden(golden: Path) -> Path:
    """Folder of the recorded numbers."""
    folder = golden / "glip"
    if not folder.is_dir():
        pytest.skip("needs the recorded numbers (CLIPSELF_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def arrays(glip_golden: Path) -> Callable[[str], dict[str, Tensor]]:
    """Reads a file of recorded arrays; skips where it is not there."""

    def read(name: str) -> dict[str, Tensor]:
        path = glip_golden / name
        if not path.is_file():
            pytest.skip(f"needs {name} of the recorded numbers (CLIPSELF_GOLDEN)")
        with np.load(path) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}

    return read


WORDS = (
    "a the of on in and with left right man woman person dog cat car bus red blue green big small circle square star "
    "striped dotted remote sofa sky plane hold ball near sea thing hand touch fish jelly ##fish sting ##ray which is "
    "flat round top shelf bob ##ble head ##s two ted ##dy bear hot air balloon - . , ! ? ( ) : ' b c d e f g h i j k "
    "l m n o p q r s t u v w x y z ##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r ##t ##u "
    "##v ##w ##x ##y ##z 0 1 2 3 4 5 6 7 8 9 "
).split()


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of word pieces that any word of small letters can be spelt with."""
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]) + "\n")
    return file


def tiny_config(vocabulary: Path, **head: Any) -> GlipConfig:
    """GLIP of reduced size: all parts, few numbers."""
    config = GlipConfig()
    image, text = config.image, config.text
    image.width, image.depths, image.heads, image.window = 16, [2, 2, 2, 2], [1, 2, 2, 4], 4
    text.width, text.layers, text.heads, text.hidden, text.limit = 24, 2, 2, 48, 64
    text.tokens, text.vocabulary = len(vocabulary.read_text().splitlines()), str(vocabulary)
    image.weights = text.weights = "random"
    sizes = {"channels": 32, "blocks": 2, "fusion_width": 32, "fusion_heads": 4, "text_heads": 4, "text_hidden": 48,
             "groups": 4, "classifier": 0}  # fmt: skip
    for key, value in (sizes | head).items():
        assert hasattr(config.head, key)
        setattr(config.head, key, value)
    return config


@pytest.fixture(scope="session")
def config_of_tiny(small_vocabulary: Path) -> Callable[..., GlipConfig]:
    """Makes the config of :func:`tiny`'s models; keywords go to the head."""
    return functools.partial(tiny_config, small_vocabulary)


@pytest.fixture(scope="session")
def tiny(small_vocabulary: Path) -> Callable[..., GLIP]:
    """Builds a GLIP of reduced size with random weights; keywords go to the head."""
    pytest.importorskip("transformers")

    def make(seed: int = 0, **head: Any) -> GLIP:
        config = tiny_config(small_vocabulary, **head)
        torch.manual_seed(seed)
        return build_glip(config, make_tokenizer(config)).eval()

    return make


@pytest.fixture(scope="session")
def vocabulary(glip_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete vocabulary of BERT."""
    path = glip_golden / "bert_uncased_vocab.txt.gz"
    if not path.is_file():
        pytest.skip("needs the recorded vocabulary")
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_bytes(gzip.decompress(path.read_bytes()))
    return file
