"""The only door between an owner and the centre. What a domain does not share is refused before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fanbu.contribution import FEATURES, Contribution, check_contribution, write_contribution
from fanbu.data.synthetic import Corpus
from fanbu.errors import BoundaryError
from fanbu.tensors import layout
from fanbu.types import Share

ADDED = frozenset({"weights", "updates", "statistics"})  # kinds that ``share.together`` is about
MAX_NAME = 128  # longer strings than names are texts


def cross(contribution: Contribution, share: Share, out: Path, own: Sequence[str] = ()) -> Contribution:
    """Checks a contribution against what its domain shares, then writes it to ``out``; ``own`` are the owner's texts.

    Looks at what is in it (texts, labels, kind, privacy cost), not at what its method says of it. Raises
    BoundaryError before anything is written.
    """
    check_contribution(contribution)
    _check(contribution, refusal(contribution, share, own), share)
    return write_contribution(contribution, out)


def keep(contribution: Contribution, share: Share, out: Path, own: Sequence[str] = ()) -> Contribution:
    """As ``cross``, for what will cross in a masked sum alone: it is written at its owner, and stays there."""
    check_contribution(contribution)
    _check(contribution, refusal(contribution, replace(share, together=0), own), share)
    return write_contribution(contribution, out)


def _check(contribution: Contribution, reason: str | None, share: Share) -> None:
    if reason:
        raise BoundaryError(
            "not-shared",
            f"{contribution.domain} does not share this: {reason}",
            allowed=share.as_dict(),
            got=f"{contribution.kind} from {contribution.method}",
            remedy="choose a method that needs less, or widen `share` of this domain with its owner's consent",
        )


def refusal(contribution: Contribution, share: Share, own: Sequence[str] = ()) -> str | None:
    """Why a contribution may not cross; None where it may. Texts that tell nothing of a single one of the owner's are
    synthetic (``data.synthetic.Corpus.hides``): this is looked at here, whoever made them."""
    if contribution.kind not in share.kinds:
        return f"{contribution.kind} stay with their owner"
    if share.together and contribution.kind in ADDED and not _alone(contribution):
        return f"{contribution.kind} cross in a sum of {share.together} owners alone"
    texts = [row["text"] for row in contribution.rows if "text" in row]
    if texts and not (share.texts or (share.synthetic and own)):
        return "texts stay with their owner"
    if texts and not share.texts:
        corpus = Corpus(own)
        if bare := sum(not corpus.hides(text) for text in texts):
            return f"{bare} of {len(texts)} texts are not synthetic, and texts stay with their owner"
    if not share.texts and FEATURES in contribution.tensors:
        return "features stay with their owner where texts do: texts can be guessed from them"
    if not share.texts and (long := _longest(contribution)) > MAX_NAME:
        return f"a string of {long} characters is among its ids or meta, and texts stay with their owner"
    if not share.labels and any("label" in row for row in contribution.rows):
        return "labels stay with their owner"
    if share.private and contribution.kind == "scores":
        return "of a private domain only paired counts cross" if contribution.tensors else None
    needs_noise = contribution.kind == "predictions" or "labels" in contribution.meta
    if share.private and needs_noise and contribution.epsilon is None:
        return f"{contribution.kind} of a private domain need a privacy cost, and {contribution.method} adds no noise"
    return None


def _alone(contribution: Contribution) -> bool:
    """Whether it may cross alone where numbers cross in sums: whole numbers (masked ones, keys, and shares of secrets),
    or label rows, and nothing else."""
    found = [layout(contribution.tensors, name) for name in contribution.tensors]
    labels = contribution.meta.get("labels")
    if contribution.kind == "statistics" and isinstance(labels, list):
        return all(shape[:1] == (len(labels),) for shape, _ in found)
    return not contribution.rows and not any(kind.is_floating_point or kind.is_complex for _, kind in found)


def _longest(contribution: Contribution) -> int:
    """The longest string among ids and meta (where a text could hide)."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield str(key)
                yield from strings(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from strings(inner)

    found = [*strings(contribution.meta), *(str(row.get("id", "")) for row in contribution.rows)]
    return max(map(len, found), default=0)
