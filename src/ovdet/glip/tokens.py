"""Texts to token ids that know which characters they stand for: BERT's word pieces, CLIP's byte pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from open_clip.tokenizer import SimpleTokenizer, clean_text
from training.engine.errors import UserError

Span = tuple[int, int]  # characters [begin, end) of a text


class Encoded(NamedTuple):
    """Tokens of a text, start and end tokens included."""

    ids: list[int]
    offsets: list[Span]  # characters of each token; (0, 0) for start and end

    def token_of(self, character: int) -> int | None:
        """The token that a character belongs to; None for white space and beyond the text."""
        for token, (begin, end) in enumerate(self.offsets):
            if begin <= character < end:
                return token
        return None


class Tokenizer(Protocol):
    """What encodes texts."""

    limit: int  # most tokens of a text, start and end included
    padding: int  # id of a padding token
    size: int  # number of ids

    def encode(self, text: str) -> Encoded:
        """All tokens of a text, however many."""
        ...


class WordPieces:
    """BERT's lower-casing tokenizer over a vocabulary of word pieces.

    Args:
        source: ``vocab.txt`` (a token a line), or a folder that holds it.
        limit: most tokens of a text.
        size: tokens that the text encoder knows; None takes the vocabulary as it is.

    Raises:
        UserError: no vocabulary there, one of another size, or the package ``tokenizers`` missing.
    """

    def __init__(self, source: str | Path, limit: int = 256, size: int | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Engine
            from tokenizers import models, normalizers, pre_tokenizers, processors
        except ImportError as error:
            raise UserError(
                'the BERT tokenizer needs the package tokenizers: pip install "transformers>=4.48" brings it'
            ) from error
        file = Path(source) / "vocab.txt" if Path(source).is_dir() else Path(source)
        vocabulary = _read_vocabulary(file)
        if size is not None and len(vocabulary) != size:
            raise UserError(
                f"text.vocabulary {file} has {len(vocabulary)} tokens, but the text encoder knows {size}: give the "
                "vocab.txt that belongs to the weights"
            )
        self.limit, self.size, self.padding = limit, len(vocabulary), vocabulary["[PAD]"]
        self._engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self._engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ends = [("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])]
        self._engine.post_processor = processors.BertProcessing(*ends)

    def encode(self, text: str) -> Encoded:
        """All tokens of a text, between [CLS] and [SEP]."""
        result = self._engine.encode(text)
        return Encoded(list(result.ids), list(result.offsets))


def _read_vocabulary(file: Path) -> dict[str, int]:
    if not file.is_file():
        raise UserError(
            f"text.vocabulary {file} does not exist: give BERT's vocab.txt (bert-base-uncased has 30522 lines) or the "
            "folder that holds it"
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text.vocabulary {file} cannot be read ({error}): fetch it anew") from error
    vocabulary = {token: i for i, token in enumerate(lines)}
    missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if t not in vocabulary]
    if missing or len(vocabulary) != len(lines):
        fault = f"lacks {', '.join(missing)}" if missing else "names a token twice"
        raise UserError(f"text.vocabulary {file} {fault}: it is no vocabulary of BERT; give vocab.txt")
    return vocabulary


class ClipPairs:
    """CLIP's byte-pair tokenizer, with the characters of every token.

    Texts must be clean (:func:`open_clip.tokenizer.clean_text`), or characters would be counted in another text than
    the one given.

    Args:
        limit: most tokens of a text: the context of the text tower.
    """

    def __init__(self, limit: int = 77) -> None:
        self._engine = SimpleTokenizer(context_length=limit)
        self.limit, self.size, self.padding = limit, self._engine.vocab_size, 0

    def encode(self, text: str) -> Encoded:
        """All tokens of a text, between start and end.

        Raises:
            UserError: a text that CLIP's cleaning would change.
        """
        try:
            tokens = self._engine.encode_with_offsets(text)
        except ValueError as error:
            raise UserError(
                f'text "{text[:60]}" has double spaces, line breaks or broken characters: give it as '
                f'"{clean_text(text)[:60]}"'
            ) from error
        ids, offsets = [i for i, _, _ in tokens], [(begin, end) for _, begin, end in tokens]
        ends = self._engine.sot_token_id, self._engine.eot_token_id
        return Encoded([ends[0], *ids, ends[1]], [(0, 0), *offsets, (0, 0)])


def pad(texts: Sequence[Encoded], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Texts as ids int64 ``[B, T]`` and mask bool ``[B, T]``, T the longest of them.

    Padding beyond the longest text has no influence on anything that is read, so it is not computed.

    Raises:
        UserError: a text of more tokens than the limit.
    """
    longest = max(len(t.ids) for t in texts)
    if longest > tokenizer.limit:
        raise UserError(
            f"a text has {longest} tokens, but the text encoder takes {tokenizer.limit}: shorten it, or give a list of "
            "names, which is split by itself"
        )
    ids = torch.full((len(texts), longest), tokenizer.padding, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text.ids)] = torch.tensor(text.ids)
    lengths = torch.tensor([len(t.ids) for t in texts])
    return ids, torch.arange(longest) < lengths[:, None]


# -- which tokens a phrase has ----------------------------------------------------------------------------------------


def tokens_of_spans(encoded: Encoded, spans: Sequence[Span]) -> list[int]:
    """Token positions of a phrase of one or more character spans, in order, each once.

    From the token of a span's first character to that of its last. White space at an end is skipped, up to two
    characters; a span of white space alone has no tokens.
    """
    positions: set[int] = set()
    for begin, end in spans:
        first = _first_token(encoded, (begin, begin + 1, begin + 2))
        last = _first_token(encoded, (end - 1, end - 2, end - 3))
        if first is not None and last is not None:
            positions.update(range(first, last + 1))
    return sorted(positions)


def _first_token(encoded: Encoded, characters: Sequence[int]) -> int | None:
    for character in characters:
        token = encoded.token_of(character) if character >= 0 else None
        if token is not None:
            return token
    return None


def positive_map(phrases: Sequence[Sequence[int]], width: int, normalize: bool = False) -> Tensor:
    """Which tokens belong to which phrase: ``[M, width]``, bool, or float rows that sum to 1.

    Args:
        phrases: token positions of each phrase; those beyond ``width`` are an error of the caller.
        normalize: divide each row by its sum (plus 1e-6, as the reference does).
    """
    result = torch.zeros(len(phrases), width)
    for row, positions in zip(result, phrases, strict=True):
        row[list(positions)] = 1
    return result / (result.sum(-1, keepdim=True) + 1e-6) if normalize else result > 0
