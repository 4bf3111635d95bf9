"""More texts out of a domain's own: words are dropped or exchanged, halves of two texts are joined."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fanbu.data.media import is_media
from fanbu.errors import UsageError

_SHARE = 0.15  # of the words that are dropped, or exchanged


def augmented(texts: Sequence[str], times: int, seed: int) -> list[str]:
    """``times`` variants of each text, for a teacher to label: they need not mean what the text meant.

    By turns: each word is dropped with probability 0.15; each is exchanged for a word of the domain, drawn by
    frequency, with probability 0.15; the first half is joined to the second half of another text. A text without
    spaces is cut into characters instead. (Word exchange for distillation: Jiao et al. 2020, TinyBERT, who draw from a
    masked language model.)
    """
    if times and any(map(is_media, texts)):
        raise UsageError(
            "bad-parameter", "variants are made of texts", allowed="augment: 0 for images and recordings", got=times,
            remedy="leave it out",
        )  # fmt: skip
    numbers = random.Random(seed)
    split = [(text.split(), " ") if " " in text else (list(text), "") for text in texts]
    pool = [word for words, _ in split for word in words]
    made = []
    for turn in range(times):
        for words, space in split:
            if turn % 3 == 0:
                kept = [w for w in words if numbers.random() >= _SHARE]
            elif turn % 3 == 1:
                kept = [numbers.choice(pool) if numbers.random() < _SHARE else w for w in words]
            else:
                other, _ = split[numbers.randrange(len(split))]
                kept = [*words[: (len(words) + 1) // 2], *other[len(other) // 2 :]]
            made.append(space.join(kept or words))
    return made
