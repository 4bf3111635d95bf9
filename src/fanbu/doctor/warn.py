"""What is not wrong with a domain's rows, and yet may lead to a refusal."""

from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist

from fanbu.data.check import normalised
from fanbu.domain import Domain
from fanbu.init.write import DISCORDANCE


def warnings_of(d: Domain, margin: float, confidence: float) -> list[str]:
    """Warnings of one domain: its own, rows that repeat, labels that cannot be tested, and too wide a margin."""
    found = list(d.warnings)
    texts = [normalised(text) for text in d.train.texts]
    if twice := len(texts) - len(set(texts)):
        found.append(f"{twice} training rows repeat the text of another")
    if d.labels and d.test.labels is not None:
        untested = sorted(set(range(len(d.labels))) - set(d.test.labels))
        if untested:
            shown = ", ".join(d.labels[i] for i in untested[:5])
            found.append(f"{len(untested)} of {len(d.labels)} labels have no test row ({shown})")
        counts = Counter(d.train.labels or ())
        if single := [d.labels[i] for i, count in counts.items() if count == 1]:
            found.append(f"{len(single)} labels have one training row only ({', '.join(sorted(single)[:5])})")
        error = math.sqrt(DISCORDANCE / len(d.test))
        needed = NormalDist().inv_cdf(confidence) * error
        if margin < needed:
            found.append(
                f"{len(d.test)} test rows resolve about {100 * needed:.1f} points, and the margin is "
                f"{100 * margin:.1f}: an unchanged domain would be refused more often than not"
            )
    return found
