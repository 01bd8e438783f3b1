"""Texts to token ids: CLIP's byte-pair encoding, and tokenizers of the hub for models that have their own."""

from __future__ import annotations

import gzip
import html
import string
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

_VOCAB = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: 2 x 256 bytes, the merges, and two special tokens make 49,408
_START, _END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
_PATTERN = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


def clean_text(text: str) -> str:
    """Mend broken unicode, resolve html entities (twice, as captions often need) and collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


@lru_cache
def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte: itself where it is printable, else one from U+0100 on.

    The order is that of the vocabulary: printable bytes first.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class SimpleTokenizer:
    """CLIP's byte-pair tokenizer: lower-cased text to ids ``[N, L]``.

    A row is the start token, the text's tokens, the end token (the largest id), and zeros; a text that is too long is
    cut and keeps its end token.

    Args:
        context_length: L.
        vocab_path: gzipped list of merges; CLIP's own when None.
    """

    def __init__(self, context_length: int = 77, vocab_path: str | Path | None = None) -> None:
        self.context_length = context_length
        with gzip.open(vocab_path or _VOCAB, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _NUM_MERGES + 1]  # the first line is a header
        merges = [tuple(line.split()) for line in lines]
        symbols = list(_byte_symbols().values())
        tokens = [*symbols, *(s + _WORD_END for s in symbols), *("".join(m) for m in merges), _START, _END]
        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.decoder = dict(enumerate(tokens))
        self._ranks = {merge: i for i, merge in enumerate(merges)}
        self._bytes = {symbol: byte for byte, symbol in _byte_symbols().items()}
        self._cache: dict[str, list[int]] = {token: [self.encoder[token]] for token in (_START, _END)}
        self.sot_token_id, self.eot_token_id = self.encoder[_START], self.encoder[_END]
        self.vocab_size = len(tokens)

    def _word_ids(self, word: str) -> list[int]:
        """Ids of one word: its bytes, joined pair by pair in the order of the merges."""
        if word in self._cache:
            return self._cache[word]
        symbols = _byte_symbols()
        parts = [symbols[b] for b in word.encode("utf-8")]
        parts[-1] += _WORD_END
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:], strict=False), key=lambda p: self._ranks.get(p, len(self._ranks)))
            if pair not in self._ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == pair:
                    joined.append(pair[0] + pair[1])
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            parts = joined
        ids = [self.encoder[p] for p in parts]
        if len(self._cache) < 200_000:  # bounded: captions of the web have no end of rare words
            self._cache[word] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        return [i for word in _PATTERN.findall(clean_text(text).lower()) for i in self._word_ids(word)]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """(id, begin, end) of each token of a clean text: the characters ``text[begin:end]`` that it stands for.

        Tokens that share a character of several bytes all name it. Letters whose lower case is longer than they are
        stay as they are.

        Raises:
            ValueError: :func:`clean_text` would change the text, and characters be counted in another one.
        """
        if clean_text(text) != text.strip():
            raise ValueError(f'text "{text[:60]}" is not clean: give clean_text(text)')
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        tokens = []
        for found in _PATTERN.finditer(lower):
            # The character of each byte of the word.
            owner = [found.start() + i for i, c in enumerate(found.group()) for _ in c.encode("utf-8")]
            for token in self._word_ids(found.group()):
                size = len(self.decoder[token].removesuffix(_WORD_END))
                tokens.append((token, owner[0], owner[size - 1] + 1))
                owner = owner[size:]
        return tokens

    def decode(self, ids: list[int] | Tensor) -> str:
        """Text of ids; a word end becomes a space. Bytes that are no utf-8 become the replacement character."""
        symbols = "".join(self.decoder[int(i)] for i in ids)
        symbols = symbols.replace(_WORD_END, " ")
        return bytes(b for s in symbols for b in ([self._bytes[s]] if s in self._bytes else s.encode())).decode(
            "utf-8", "replace"
        )

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Ids int64 ``[N, L]``. ValueError when L leaves no room for start and end."""
        texts = [texts] if isinstance(texts, str) else texts
        length = self.context_length if context_length is None else context_length
        if length < 2:
            raise ValueError(f"context_length is {length}: start and end tokens alone take 2")
        out = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(out, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > length:
                ids = [*ids[: length - 1], self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return out


class HFTokenizer:
    """Tokenizer of a hub repository (``tokenizer.json``), for models such as SigLIP 2.

    Args:
        name: hub repository, or a local folder with ``tokenizer.json``.
        context_length: L; rows are cut and padded to it.
        clean: ``"canonicalize"`` (lower case, no punctuation), ``"lower"`` or ``"whitespace"``.
        cache_dir: download cache.

    Raises:
        ImportError: the package ``tokenizers`` is not installed.
        FileNotFoundError: the file is neither local nor to be had.
        ValueError: an unknown ``clean``, or a damaged file.
    """

    def __init__(
        self, name: str, context_length: int = 64, clean: str = "whitespace", cache_dir: str | None = None
    ) -> None:
        if clean not in ("canonicalize", "lower", "whitespace"):
            raise ValueError(f'tokenizer cleaning "{clean}" is unknown: use canonicalize, lower or whitespace')
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"the tokenizer {name} needs the package tokenizers: pip install tokenizers") from error
        self.context_length, self.clean = context_length, clean
        file = _tokenizer_file(name, cache_dir)
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(f"{file} is no tokenizer ({error}): fetch tokenizer.json of {name} anew") from error
        pad = self.tokenizer.token_to_id("<pad>") or 0
        self.tokenizer.enable_padding(length=context_length, pad_id=pad, pad_token="<pad>")
        self.tokenizer.enable_truncation(context_length)

    def _clean(self, text: str) -> str:
        if self.clean == "canonicalize":
            text = html.unescape(html.unescape(ftfy.fix_text(text))).replace("_", " ")
            return " ".join(text.translate(str.maketrans("", "", string.punctuation)).lower().split())
        return clean_text(text).lower() if self.clean == "lower" else clean_text(text)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Ids int64 ``[N, L]``."""
        texts = [texts] if isinstance(texts, str) else texts
        if context_length is not None and context_length != self.context_length:
            raise ValueError(f"this tokenizer was made for {self.context_length} tokens, not {context_length}")
        rows = self.tokenizer.encode_batch([self._clean(t) for t in texts])
        return torch.tensor([row.ids for row in rows], dtype=torch.long).reshape(len(texts), self.context_length)


def _tokenizer_file(name: str, cache_dir: str | None) -> Path:
    if Path(name).is_dir():
        file = Path(name) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"folder {name} (hf_tokenizer_name) has no tokenizer.json: put it there")
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json", cache_dir=cache_dir))
    except Exception as error:  # the hub raises connection, authorisation and cache errors of many kinds
        raise FileNotFoundError(
            f"tokenizer.json of {name} is neither in the cache nor to be fetched ({type(error).__name__}): "
            f"download it from the hub and give its folder as hf_tokenizer_name"
        ) from error


@lru_cache
def _default() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """CLIP token ids int64 ``[N, context_length]`` of texts."""
    return _default()(texts, context_length)
