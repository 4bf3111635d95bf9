"""Texts that stand for a domain's own, made of word pairs that several of these have in common."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

from fanbu.data.media import is_media
from fanbu.errors import DataError

LEAST = 3  # texts in which a pair of words must occur, to occur in a synthetic one
_LONGER = 0.9  # how often the last two words decide, where they have been followed often enough
_TRIES = 20  # for each text that is asked for
_START, _END = "\x02", "\x03"


class Corpus:
    """A domain's texts as their owner counts them: pairs and triples of successive words, by texts that hold them.

    Texts without spaces are taken by characters, if most of the domain's are.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.spaced = 2 * sum(" " in text for text in texts) >= len(texts)
        self.own = {self.words(text) for text in texts}  # white space makes no other text

    def words(self, text: str) -> tuple[str, ...]:
        """Words with the marks of start and end around them."""
        return (_START, *(text.split() if self.spaced else text), _END)

    @cached_property
    def pairs(self) -> Counter[tuple[str, ...]]:
        """In how many texts each pair occurs."""
        return self._counted(2)

    @cached_property
    def triples(self) -> Counter[tuple[str, ...]]:
        """In how many texts each triple occurs."""
        return self._counted(3)

    def _counted(self, size: int) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for words in self.own:
            found.update(set(zip(*(words[i:] for i in range(size)), strict=False)))
        return found

    def hides(self, text: str, least: int = LEAST) -> bool:
        """Whether a text is none of the domain's, and each pair of words in it occurs in ``least`` of them. An image or
        a recording never is: its bytes are no words."""
        words = self.words(text)
        if is_media(text):
            return False
        return words not in self.own and all(self.pairs[pair] >= least for pair in pairwise(words))


def synthetic(texts: Sequence[str], count: int, seed: int, least: int = LEAST) -> list[str]:
    """``count`` different texts, or as many as there are: walks from word to word, along pairs (nine times in ten:
    triples) that ``least`` different texts share, drawn by how many do.

    So no text crosses as it is, and no two successive words that fewer owners' rows hold. That hides what is rare; it
    is no differential privacy. Raises DataError where the texts have too little in common for even one.
    """
    corpus, numbers = Corpus(texts), random.Random(seed)
    after: dict[tuple[str, ...], tuple[list[str], list[int]]] = defaultdict(lambda: ([], []))
    for counted in (corpus.pairs, corpus.triples):
        for known, times in sorted(counted.items()):
            if times >= least:
                after[known[:-1]][0].append(known[-1])
                after[known[:-1]][1].append(times)
    lengths = sorted(len(words) - 2 for words in corpus.own)
    longest = lengths[int(0.98 * (len(lengths) - 1))] if lengths else 0
    made: dict[str, None] = {}
    for _ in range(0 if any(map(is_media, texts)) else _TRIES * count):
        words = list(_walk(after, longest, numbers))
        text = (" " if corpus.spaced else "").join(words)
        if len(words) > 1 and corpus.hides(text, least):
            made[text] = None
        if len(made) == count:
            break
    if count and not made:
        raise DataError(
            "nothing-in-common", "no synthetic text can be made of these",
            allowed=f"pairs of words that {least} texts share", got=f"{len(corpus.own)} texts",
            remedy="give more texts, or share them, or name public ones",
        )  # fmt: skip
    return list(made)


def _walk(
    after: dict[tuple[str, ...], tuple[list[str], list[int]]], longest: int, numbers: random.Random
) -> Iterable[str]:
    """The words of one text; where no word has followed often enough, it ends, and is not used."""
    last, word = "", _START
    for _ in range(longest + 1):
        follow = after.get((last, word)) if numbers.random() < _LONGER else None
        follow = follow or after.get((word,))
        if follow is None:
            return
        last, word = word, numbers.choices(*follow)[0]
        if word == _END:
            return
        yield word
