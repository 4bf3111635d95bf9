"""What leaves its owner, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fanbu.boundary import cross, refusal
from fanbu.contribution import Contribution
from fanbu.errors import BoundaryError
from fanbu.types import KINDS, PRESETS, Share


def offer(kind: str = "predictions", **values: object) -> Contribution:
    return Contribution(kind, "d", "test", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_open_shares_everything_and_each_kind_can_be_kept(kind: str, tmp_path: Path) -> None:
    sent = offer(kind, tensors={"x": torch.ones(2)}, rows=[{"text": "a", "label": "b"}])
    assert cross(sent, PRESETS["open"], tmp_path / "sent").bytes > 0
    others = Share(kinds=frozenset(KINDS) - {kind})
    with pytest.raises(BoundaryError, match="stay with their owner"):
        cross(sent, others, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "sent",
    [
        offer("samples", rows=[{"text": "a"}]),
        offer("samples", rows=[{"id": "1", "label": "b"}]),
        offer("samples", rows=[{"id": "a text that hides in an id " * 10}]),
        offer("statistics", meta={"note": "a text that hides in meta " * 10}),
        offer("statistics", meta={"deep": [{"a text that hides in a key " * 10: 1}]}),
    ],
)
def test_internal_lets_no_text_and_no_label_out(sent: Contribution, tmp_path: Path) -> None:
    assert refusal(sent, PRESETS["open"]) is None
    with pytest.raises(BoundaryError):
        cross(sent, PRESETS["internal"], tmp_path / "sent")
    assert not (tmp_path / "sent").exists()


def test_private_lets_only_noised_predictions_and_counts_out() -> None:
    private = PRESETS["private"]
    assert refusal(offer("weights"), private)
    assert refusal(offer("predictions"), private)
    assert refusal(offer("predictions", epsilon=1.0), private) is None
    assert refusal(offer("statistics", meta={"labels": ["d/a"]}), private)
    assert refusal(offer("scores", tensors={"told": torch.ones(3)}), private)
    assert refusal(offer("scores", meta={"wins": 3, "losses": 1}), private) is None
