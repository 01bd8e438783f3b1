"""Texts to token ids: CLIP's byte-pair encoding, and tokenizers of the hub for models that have their own."""

from __future__ import annotations

import gzip
import html
import json
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_VOCAB = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: 2 x 256 bytes, the merges, and two special tokens make 49,408
_START, _END = "<start_of_text>", "<end_of_text>"
_WORD_END = "</w>"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _mended(text: str) -> str:
    """Broken unicode mended and html entities resolved (twice, as captions often need)."""
    try:
        import ftfy  # when a text comes, so that the image tower can be used without it
    except ImportError as error:
        raise ImportError(
            "texts are cleaned with the package ftfy, which is not installed: pip install ftfy"
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clean_text(text: str) -> str:
    """Mend broken unicode, resolve html entities (twice, as captions often need) and collapse white space."""
    return " ".join(_mended(text).split())


def canonicalize_text(text: str) -> str:
    """As :func:`clean_text`, without punctuation (``_`` as a space) and in lower case: SigLIP's cleaning."""
    return " ".join(_mended(text).replace("_", " ").translate(_PUNCTUATION).lower().split())


def _lowered(text: str) -> str:
    return clean_text(text).lower()


_CLEANINGS: dict[str, Callable[[str], str]] = {
    "whitespace": clean_text, "lower": _lowered, "canonicalize": canonicalize_text,
}  # fmt: skip


def _cleaning(name: str) -> Callable[[str], str]:
    if name not in _CLEANINGS:
        raise ValueError(f'tokenizer cleaning "{name}" is unknown: use {", ".join(sorted(_CLEANINGS))}')
    return _CLEANINGS[name]


def _as_list(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is a {type(text).__name__}: give texts")
    return texts


@lru_cache
def _pattern(special: tuple[str, ...]):
    """Words as CLIP splits them: special tokens, English endings, letters, single digits, anything else."""
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            "CLIP's tokenizer needs the package regex, which is not installed: pip install regex"
        ) from error
    first = "|".join(regex.escape(token) for token in special)
    return regex.compile(rf"{first}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)


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
        bpe_path: gzipped list of merges; CLIP's own when None.
        additional_special_tokens: more tokens that stand for themselves, behind the others.
        context_length: L.
        clean: ``"lower"``, ``"whitespace"`` or ``"canonicalize"`` (no punctuation).
        reduction_mask: only ``""``: shortening captions at random belongs to pre-training.

    Raises:
        ValueError: an unknown ``clean``, or a ``reduction_mask``.
    """

    def __init__(
        self,
        bpe_path: str | Path | None = None,
        additional_special_tokens: Sequence[str] | None = None,
        context_length: int = 77,
        clean: str = "lower",
        reduction_mask: str = "",
    ) -> None:
        if reduction_mask:
            raise ValueError(f'reduction_mask is "{reduction_mask}": captions are not shortened here, give ""')
        self.context_length, self.clean_fn = context_length, _cleaning(clean)
        with gzip.open(bpe_path or _VOCAB, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _NUM_MERGES + 1]  # the first line is a header
        merges = [tuple(line.split()) for line in lines]
        symbols = list(_byte_symbols().values())
        special = [_START, _END, *(additional_special_tokens or ())]
        tokens = [*symbols, *(s + _WORD_END for s in symbols), *("".join(m) for m in merges), *special]
        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.decoder = dict(enumerate(tokens))
        self._ranks = {merge: i for i, merge in enumerate(merges)}
        self._bytes = {symbol: byte for byte, symbol in _byte_symbols().items()}
        self._cache: dict[str, list[int]] = {token: [self.encoder[token]] for token in special}
        self._special = tuple(special)
        self.sot_token_id, self.eot_token_id = self.encoder[_START], self.encoder[_END]
        self.all_special_ids = [self.encoder[token] for token in special]
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
        return [i for word in _pattern(self._special).findall(self.clean_fn(text)) for i in self._word_ids(word)]

    def encode_with_offsets(self, text: str) -> list[tuple[int, int, int]]:
        """(id, begin, end) of each token of a clean text: the characters ``text[begin:end]`` that it stands for.

        Tokens that share a character of several bytes all name it. Letters whose lower case is longer than they are
        stay as they are.

        Raises:
            ValueError: cleaning would change more of the text than its case, and characters be counted in another one.
        """
        if clean_text(text) != text.strip() or self.clean_fn not in (_lowered, clean_text):
            raise ValueError(f'text "{text[:60]}" is not clean: give clean_text(text), to a tokenizer that keeps it so')
        if self.clean_fn is _lowered:
            text = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        tokens = []
        for found in _pattern(self._special).finditer(text):
            # The character of each byte of the word.
            owner = [found.start() + i for i, c in enumerate(found.group()) for _ in c.encode("utf-8")]
            for token in self._word_ids(found.group()):
                size = len(self.decoder[token].removesuffix(_WORD_END))
                tokens.append((token, owner[0], owner[size - 1] + 1))
                owner = owner[size:]
        return tokens

    def decode(self, tokens: list[int] | Tensor) -> str:
        """Text of ids; a word end becomes a space. Bytes that are no utf-8 become the replacement character."""
        symbols = "".join(self.decoder[int(i)] for i in tokens)
        symbols = symbols.replace(_WORD_END, " ")
        return bytes(b for s in symbols for b in ([self._bytes[s]] if s in self._bytes else s.encode())).decode(
            "utf-8", "replace"
        )

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Ids int64 ``[N, L]``. ValueError when L leaves no room for start and end, TypeError for other than texts."""
        texts = _as_list(texts)
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
    """Tokenizer of a hub repository (``tokenizer.json``), for models such as SigLIP and CLIPA.

    Args:
        tokenizer_name: hub repository, or a local folder with ``tokenizer.json``.
        context_length: L; rows are cut and padded to it.
        clean: ``"canonicalize"`` (lower case, no punctuation), ``"lower"`` or ``"whitespace"``.
        strip_sep_token: put zeros where the separator of BERT stands (CLIPA).
        language: only None.
        cache_dir: download cache.
        tokenizer_mode: only None.

    Raises:
        ImportError: the package ``tokenizers`` is not installed.
        FileNotFoundError: the file is neither local nor to be had.
        ValueError: an unknown ``clean``, an option that is not there, or a damaged file.
    """

    def __init__(
        self,
        tokenizer_name: str,
        context_length: int = 77,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        language: str | None = None,
        cache_dir: str | Path | None = None,
        tokenizer_mode: str | None = None,
    ) -> None:
        self.context_length, self.clean_fn = context_length, _cleaning(clean)
        for name, value in (("language", language), ("tokenizer_mode", tokenizer_mode)):
            if value is not None:
                raise ValueError(f'{name} is "{value}": the models that need it are not part of this package')
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                f"the tokenizer {tokenizer_name} needs the package tokenizers: pip install tokenizers"
            ) from error
        file = _tokenizer_file(tokenizer_name, cache_dir)
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(
                f"{file} is no tokenizer ({error}): fetch tokenizer.json of {tokenizer_name} anew"
            ) from error
        # Rows are cut and padded here: the tokenizer's own settings are shared by threads that ask for other lengths.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._pad = self._padding_token(tokenizer_name, file, cache_dir)
        self._pad_id = self.tokenizer.token_to_id(self._pad)
        self._sep_id = self.tokenizer.token_to_id("[SEP]") if strip_sep_token else None

    def _padding_token(self, name: str, file: Path, cache_dir: str | Path | None) -> str:
        """The token that rows are filled up with: SigLIP's towers, which see it, were trained with ``</s>``.

        ``tokenizer_config.json`` says it; where that does not, the vocabulary.
        """
        config = _tokenizer_file(name, cache_dir, _CONFIG)
        stated = json.loads(config.read_text(encoding="utf-8")).get("pad_token") if config else None
        stated = stated.get("content") if isinstance(stated, dict) else stated
        for token in [stated] if stated else ("<pad>", "[PAD]"):
            if self.tokenizer.token_to_id(token) is not None:
                return token
        wrong = f'its pad_token "{stated}" is not in the vocabulary' if stated else "no token to pad with is known"
        raise ValueError(f"{config or file}: {wrong}: write pad_token into {_CONFIG} beside {file.name}")

    def save_pretrained(self, dest: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder, for a model that is saved there."""
        self.tokenizer.save(str(Path(dest) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": self._pad}
        (Path(dest) / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Ids int64 ``[N, L]``."""
        texts = _as_list(texts)
        length = self.context_length if context_length is None else context_length
        if length < 1:
            raise ValueError(f"context_length is {length}: give 1 or more")
        own = self.tokenizer.num_special_tokens_to_add(False)
        ids = torch.full((len(texts), length), self._pad_id, dtype=torch.long)
        rows = self.tokenizer.encode_batch([self.clean_fn(t) for t in texts], add_special_tokens=False)
        for out, row in zip(ids, rows, strict=True):
            row.truncate(max(length - own, 0))  # ahead of start and end, which stay
            whole = self.tokenizer.post_process(row).ids[:length]
            out[: len(whole)] = torch.tensor(whole, dtype=torch.long)
        return ids if self._sep_id is None else ids.masked_fill(ids == self._sep_id, 0)


_CONFIG = "tokenizer_config.json"  # some repositories have none


def _tokenizer_file(name: str, cache_dir: str | Path | None, wanted: str = "tokenizer.json") -> Path | None:
    """A file of a folder or of the hub; None for a config that is not there."""
    if Path(name).is_dir():
        file = Path(name) / wanted
        if file.is_file():
            return file
        if wanted == _CONFIG:
            return None
        raise FileNotFoundError(f"folder {name} (hf_tokenizer_name) has no {wanted}: put it there")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, wanted, cache_dir=cache_dir))
    except Exception as error:  # the hub raises connection, authorisation and cache errors of many kinds
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if wanted == _CONFIG and absent:
            return None
        raise FileNotFoundError(
            f"{wanted} of {name} is neither in the cache nor to be fetched ({type(error).__name__}): download it "
            "from the hub, or write it with transformers' AutoTokenizer and save_pretrained where the repository has "
            "only sentencepiece, and give its folder as hf_tokenizer_name"
        ) from error


@lru_cache
def _default() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """CLIP token ids int64 ``[N, context_length]`` of texts."""
    return _default()(texts, context_length)


def decode(output_ids: list[int] | Tensor) -> str:
    """Text of a row of CLIP token ids; see :meth:`SimpleTokenizer.decode`."""
    return _default().decode(output_ids)
