"""Phrases of a caption: given by the user, or found as noun phrases.

A noun phrase is an optional determiner, adjectives, and nouns. A tagger says which word is what: NLTK's or spaCy's,
whose data comes from a folder, or a built-in rule of word lists and endings, which is no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovdet.glip.data.transforms import names_a_side
from ovdet.glip.model import Prompt
from ovdet.glip.tokens import Span, Tokenizer, tokens_of_spans
from training.engine.errors import UserError

TAGGERS = ("rule", "nltk", "spacy")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
# Penn treebank tags as letters: determiner, adjective, noun, anything else.
_NOUN_PHRASE = re.compile("D?J*N+")


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption, and every place where it stands."""

    text: str
    spans: tuple[Span, ...]


# -- given phrases ----------------------------------------------------------------------------------------------------


def phrases_of_spans(caption: str, spans: Sequence[Sequence[Span]]) -> list[Phrase]:
    """Phrases given by their characters, each with one or more spans.

    Raises:
        UserError: a span outside of the caption, or an empty one.
    """
    phrases = []
    for group in spans:
        if not group:
            raise UserError(f'a phrase of "{caption[:60]}" has no span: give [begin, end] for each')
        for begin, end in group:
            check_span(caption, begin, end)
        phrases.append(Phrase(" ".join(caption[b:e] for b, e in group), tuple((b, e) for b, e in group)))
    return phrases


def check_span(caption: str, begin: int, end: int) -> None:
    """UserError where characters ``[begin, end)`` are not in a caption, or hold no word."""
    if not 0 <= begin < end <= len(caption):
        raise UserError(
            f"span [{begin}, {end}] is not within the {len(caption)} characters of the caption "
            f'"{caption[:60]}": give 0 <= begin < end <= {len(caption)}'
        )
    if not caption[begin:end].strip():
        raise UserError(f'span [{begin}, {end}] of the caption "{caption[:60]}" is white space: give that of a word')


def phrases_of_texts(caption: str, texts: Sequence[str]) -> list[Phrase]:
    """Phrases given as texts: every whole-word occurrence in the caption, whatever the case.

    Raises:
        UserError: no text, or one that is not in the caption.
    """
    if not texts:
        raise UserError(f'no phrase of "{caption[:60]}" is given: name at least one')
    phrases = []
    for text in dict.fromkeys(" ".join(t.split()) for t in texts):
        # Neighbours must not be letters of the same word; punctuation is taken as it stands.
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        spans = tuple((m.start(), m.end()) for m in re.finditer(pattern, caption, re.IGNORECASE)) if text else ()
        if not spans:
            raise UserError(
                f'phrase "{text}" does not stand in the caption "{caption[:60]}": write it as it does there'
            )
        phrases.append(Phrase(text, spans))
    return phrases


def split_list(text: str, separator: str = ".") -> list[str]:
    """Names of a list such as "sofa . remote . dog", each once.

    Raises:
        UserError: there are none.
    """
    names = list(dict.fromkeys(part for part in (" ".join(p.split()) for p in text.split(separator)) if part))
    if not names:
        raise UserError(f'"{text[:60]}" names nothing: separate names by "{separator}"')
    return names


def caption_prompt(caption: str, phrases: Sequence[Phrase], tokenizer: Tokenizer) -> Prompt:
    """The prompt of a caption: phrase i is label i.

    Raises:
        UserError: no phrases, one without tokens, or a caption of too many tokens.
    """
    if not phrases:
        raise UserError(f'the caption "{caption[:60]}" has no phrases to look for: name them')
    encoded = tokenizer.encode(caption)
    if len(encoded.ids) > tokenizer.limit:
        raise UserError(
            f"the caption has {len(encoded.ids)} tokens, but the text encoder takes {tokenizer.limit}: shorten it, or "
            "give a list of names, which is split by itself"
        )
    tokens = [tokens_of_spans(encoded, phrase.spans) for phrase in phrases]
    for phrase, positions in zip(phrases, tokens, strict=True):
        if not positions:
            raise UserError(f'phrase "{phrase.text}" has no letters that the text encoder knows: name another one')
    return Prompt(encoded, tokens, list(range(len(phrases))), names_a_side(caption))


# -- noun phrases -----------------------------------------------------------------------------------------------------


def noun_phrases(caption: str, tagger: str = "rule", folder: str | Path | None = None) -> list[Phrase]:
    """Noun phrases of a caption, in order; one that is repeated is one phrase with all its places.

    Args:
        tagger: ``"rule"`` (built in), ``"nltk"`` or ``"spacy"``.
        folder: data of the tagger: an ``nltk_data`` folder, or a spaCy pipeline.

    Raises:
        UserError: an unknown tagger, or one that is not installed or lacks its data.
    """
    if tagger not in TAGGERS:
        raise UserError(f'tagger "{tagger}" is unknown: use one of {", ".join(TAGGERS)}')
    tag: Callable[[list[str]], list[str]] = {
        "rule": tag_by_rule,
        "nltk": lambda words: _tag_with_nltk(words, folder),
        "spacy": lambda words: _tag_with_spacy(words, folder),
    }[tagger]
    words = [(m.group(), m.start(), m.end()) for m in _WORD.finditer(caption)]
    letters = "".join(_letter(t) for t in tag([w.lower() for w, _, _ in words]))
    found: dict[str, list[Span]] = {}
    for match in _NOUN_PHRASE.finditer(letters):
        begin, end = words[match.start()][1], words[match.end() - 1][2]
        found.setdefault(" ".join(caption[begin:end].lower().split()), []).append((begin, end))
    return [Phrase(text, tuple(spans)) for text, spans in found.items()]


def _letter(tag: str) -> str:
    return "D" if tag == "DT" else "J" if tag.startswith("JJ") else "N" if tag.startswith("NN") else "x"


def _tag_with_nltk(words: list[str], folder: str | Path | None) -> list[str]:
    try:
        import nltk
    except ImportError as error:
        raise UserError("tagger nltk needs the package nltk: pip install nltk, or use --tagger rule") from error
    if folder is not None:
        nltk.data.path.insert(0, str(folder))
    try:
        return [tag for _, tag in nltk.pos_tag(words)]
    except LookupError as error:
        raise UserError(
            f"tagger nltk: {folder or 'the standard folders'} hold no averaged_perceptron_tagger_eng: download it with "
            "nltk.download on a machine with network, and give its nltk_data folder"
        ) from error


def _tag_with_spacy(words: list[str], folder: str | Path | None) -> list[str]:
    try:
        import spacy
    except ImportError as error:
        raise UserError("tagger spacy needs the package spacy: pip install spacy, or use --tagger rule") from error
    name = str(folder or "en_core_web_sm")
    try:
        pipeline = spacy.load(name)
    except OSError as error:
        raise UserError(
            f"tagger spacy: {name} is no pipeline: download en_core_web_sm on a machine with network, give its folder"
        ) from error
    return [token.tag_ for token in pipeline(spacy.tokens.Doc(pipeline.vocab, words=words))]


_DETERMINERS = set(
    """
    a an the this that these those some any each every all both no another its his her their my our
    """.split()
)
_OTHERS = set(
    """
    of on in at by with from to into onto over under above below behind beside near next between among through across
    along around against for as like than off up down out about after before during inside outside toward towards
    without within and or but nor so yet if while because that which who whose whom where when there here not very too
    also just only quite rather i you he she it we they him them me us is are was were be been being am has have had
    do does did can could will would shall should may might must sit sits sitting stand stands standing lie lies lying
    hold holds holding wear wears wearing look looks looking play plays playing ride rides riding walk walks walking
    run runs eat eats eating drink drinks drinking carry carries carrying touch touches touching show shows see sees
    get gets make makes take takes go goes come comes jump jumps fly flies hang hangs hanging stare stares talk talks
    sleep sleeps sleeping swim swims together away back one's
    """.split()
)
_ADJECTIVES = set(
    """
    red orange yellow green blue purple pink brown black white grey gray cyan dark light bright pale big small large
    little tiny huge tall short long thin thick wide narrow round square flat old new young wooden metal metallic
    plastic dirty clean wet dry empty full open closed several many few two three four five six seven eight nine ten
    first second other different same colorful colourful beautiful happy sad hot cold warm cool high low deep front
    striped dotted checked solid fluffy furry shiny smooth rough soft hard heavy
    """.split()
)


def tag_by_rule(words: list[str]) -> list[str]:
    """Tags of lower-case words by lists and endings: DT, JJ, NN, or X for everything else.

    What is in no list is a noun, but for adverbs (-ly) and participles: before a noun these are adjectives ("the parked
    car"), elsewhere verbs ("a man feeding a horse").
    """
    tags = [_tag_of_word(word) for word in words]
    for i in range(len(words) - 1, -1, -1):
        if tags[i] != "V":
            continue
        following = tags[i + 1] if i + 1 < len(tags) else "X"
        before = tags[i - 1] if i else "X"
        tags[i] = "JJ" if following in ("NN", "JJ") and before in ("DT", "JJ", "X") else "X"
    return tags


def _tag_of_word(word: str) -> str:
    if word in _DETERMINERS:
        return "DT"
    if word in _OTHERS or not word[0].isalnum():
        return "X"
    if word in _ADJECTIVES or word[0].isdigit():
        return "JJ"
    if word.endswith("ly") and len(word) > 4:
        return "X"
    if len(word) > 4 and word.endswith(("ing", "ed")):
        return "V"
    return "NN"
