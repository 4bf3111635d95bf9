"""Texts that stand for a domain's own, made of words and word pairs that several of these have in common."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

from fanbu.data.media import is_media
from fanbu.errors import DataError

LEAST = 3  # texts that hold a word of a synthetic one; and a run of two or three of its words, if any holds it
_LONGER, _ON = 0.6, 0.85  # how often the last two words decide, and the last one; else any word of the label may come
_TRIES = 20  # for each text that is asked for, and for each word
_START, _END = "\x02", "\x03"


class Corpus:
    """A domain's texts as their owner counts them: words, pairs and triples of successive ones, by texts that hold
    them.

    Texts without spaces are taken by characters, if most of the domain's are.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.spaced = 2 * sum(" " in text for text in texts) >= len(texts)
        self.own = {self.words(text) for text in texts}  # white space makes no other text

    def words(self, text: str) -> tuple[str, ...]:
        """Words with the marks of start and end around them."""
        return (_START, *(text.split() if self.spaced else text), _END)

    @cached_property
    def singles(self) -> Counter[tuple[str, ...]]:
        """In how many texts each word occurs."""
        return counted(self.own, 1)

    @cached_property
    def pairs(self) -> Counter[tuple[str, ...]]:
        """In how many texts each pair occurs."""
        return counted(self.own, 2)

    @cached_property
    def triples(self) -> Counter[tuple[str, ...]]:
        """In how many texts each triple occurs."""
        return counted(self.own, 3)

    def joins(self, before: str, one: str, other: str, least: int) -> bool:
        """Whether a word may follow two others (``before`` may be empty): ``least`` texts have the pair so, and the
        three, or none."""
        rare = 0 < self.pairs[one, other] < least or 0 < self.triples[before, one, other] < least
        return not rare

    def hides(self, text: str, least: int = LEAST) -> bool:
        """Whether a text is none of the domain's, each word in it occurs in ``least`` of them, and no two or three
        words in a row occur so in fewer, unless in none. An image or a recording never does: its bytes are no words."""
        words = self.words(text)
        if is_media(text) or words in self.own:
            return False
        common = all(self.singles[(word,)] >= least for word in words[1:-1])
        return common and all(self.joins(*three, least) for three in zip(("", *words), words, words[1:], strict=False))


def counted(texts: Sequence[tuple[str, ...]] | set[tuple[str, ...]], size: int) -> Counter[tuple[str, ...]]:
    """In how many texts each run of ``size`` words occurs."""
    found: Counter[tuple[str, ...]] = Counter()
    for words in texts:
        found.update(set(zip(*(words[i:] for i in range(size)), strict=False)))
    return found


def synthetic(
    texts: Sequence[str], count: int, seed: int, least: int = LEAST, labels: Sequence[int] | None = None
) -> list[str]:
    """``count`` different texts, or as many as there are: walks from word to word along pairs and triples that
    ``least`` different texts share, which now and then go on at another word that so many texts hold.

    With ``labels``, a walk keeps to the words and pairs of one label's texts, each label as often as it occurs. So no
    text crosses as it is, no word that fewer of an owner's rows hold, and no two or three successive words that fewer
    hold, unless none does. That hides what is rare; it is no differential privacy. Raises DataError where the texts
    have too little in common for even one.
    """
    corpus, numbers = Corpus(texts), random.Random(seed)
    own: dict[int, dict[tuple[str, ...], None]] = defaultdict(dict)
    for text, label in sorted(zip(texts, labels or [0] * len(texts), strict=True)):
        own[label][corpus.words(text)] = None
    walks = [_Walk(corpus, list(own[label]), least) for label in sorted(own)]
    frequent = [len(own[label]) for label in sorted(own)]
    made: dict[str, None] = {}
    for _ in range(0 if any(map(is_media, texts)) or not walks else _TRIES * count):
        words = list(numbers.choices(walks, frequent)[0].words(numbers))
        text = (" " if corpus.spaced else "").join(words)
        if len(words) > 1 and corpus.hides(text, least):
            made[text] = None
        if len(made) == count:
            break
    if count and not made:
        raise DataError(
            "nothing-in-common", "no synthetic text can be made of these",
            allowed=f"words that {least} texts share", got=f"{len(corpus.own)} texts",
            remedy="give more texts, or share them, or name public ones",
        )  # fmt: skip
    return list(made)


class _Walk:
    """What follows what in the texts of one label."""

    def __init__(self, corpus: Corpus, texts: Sequence[tuple[str, ...]], least: int) -> None:
        self.corpus, self.least = corpus, least
        self.lengths = sorted(len(words) - 2 for words in texts)
        self.after: dict[tuple[str, ...], tuple[list[str], list[int]]] = defaultdict(lambda: ([], []))
        for known, times in sorted((counted(texts, 2) + counted(texts, 3)).items()):
            if (corpus.pairs if len(known) == 2 else corpus.triples)[known] >= least:
                self.after[known[:-1]][0].append(known[-1])
                self.after[known[:-1]][1].append(times)
        single = [(w, n) for (w,), n in sorted(counted(texts, 1).items()) if corpus.singles[(w,)] >= least]
        self.any = [w for w, _ in single if w not in {_START, _END}]
        self.often = [n for w, n in single if w not in {_START, _END}]

    def words(self, numbers: random.Random) -> Iterator[str]:
        """The words of one text, no longer than some text of the label; what comes to nothing ends early."""
        last, word, seen = "", _START, set[str]()
        most = numbers.choice(self.lengths)
        for place in range(most):
            chance = numbers.random()
            follow = self.after.get((last, word)) if chance < _LONGER else None
            follow = follow or (self.after.get((word,)) if chance < _ON else None)
            after = numbers.choices(*follow)[0] if follow else _END
            if after == _END and follow and 2 * place >= most:
                return
            if after == _END or not self.corpus.joins(last, word, after, self.least):
                after = self._another(last, word, seen, numbers)
            if not after:
                return
            last, word = word, after
            seen.add(word)
            yield word

    def _another(self, last: str, word: str, seen: set[str], numbers: random.Random) -> str:
        """Any word of the label that may follow and was not said yet; none where there is no such."""
        for found in numbers.choices(self.any, self.often, k=_TRIES) if self.any else ():
            if found not in seen and self.corpus.joins(last, word, found, self.least):
                return found
        return ""
