"""What an attacker gains: nothing from a model that saw no row, much from one that knows its rows by heart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import finished_round
from fanbu.catalogue import method
from fanbu.cli import app
from fanbu.domain import Domain, Rows
from fanbu.errors import DataError
from fanbu.judge.audit import _auc, audit
from fanbu.model import Model, open_model
from fanbu.types import Context


def test_ranks_by_hand() -> None:
    members, strangers = np.array([0.1, 0.2, 0.5]), np.array([0.3, 0.5])
    assert _auc(members, strangers) == pytest.approx((2 + 2 + 0.5) / 6)
    assert _auc(strangers, members) == pytest.approx(1 - 4.5 / 6)


def test_who_knows_rows_by_heart_gives_them_away(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    food = domains["food"]
    half = len(food.test) // 2
    labels = np.random.default_rng(0).permutation(len(food.test)) % len(food.labels)  # nothing but heart helps
    lied = replace(food.test, labels=tuple(int(i) for i in labels))
    member, stranger = (
        Rows(lied.ids[part], lied.texts[part], (lied.labels or ())[part]) for part in (slice(half), slice(half, None))
    )
    strange = replace(food, train=member, valid=Rows(labels=()), test=stranger)
    train = {"epochs": 60, "lr": 5e-3, "head_lr": 2e-2, "batch_size": 8, "patience": 0}
    model = method("finetune").shrink(incumbent, strange, tmp_path / "by heart", context, train=train)
    known, fresh = audit(model, strange, context), audit(incumbent, strange, context)
    assert known["low"] > 0.6
    assert known["advantage"] > 0.3
    assert known["low"] <= known["auc"] <= known["high"]
    assert known["auc"] > fresh["auc"]
    assert fresh["low"] < 0.5 < fresh["high"]
    assert known["caught"] >= fresh["caught"]
    with pytest.raises(DataError, match="nothing to audit"):
        audit(incumbent, replace(food, train=Rows(labels=())), context)


def test_causal_models_have_losses_too(llama: Path, texts: dict[str, Domain], context: Context) -> None:
    found = audit(open_model(llama), next(iter(texts.values())), context)
    assert 0 <= found["auc"] <= 1


def test_the_command_prints_every_domain(tmp_path_factory: pytest.TempPathFactory) -> None:
    finished = finished_round(tmp_path_factory)
    model = str(finished.workspace / finished.record["champion"]["path"])
    said = CliRunner().invoke(app, ["audit", model, "--domains", str(finished.recipe)])
    assert said.exit_code == 0, said.output
    assert all(name in said.output for name in finished.record["domains"])
    plain = CliRunner().invoke(app, ["audit", model, "--domains", str(finished.recipe), "--json"])
    found = json.loads(plain.stdout)
    assert set(found) == set(finished.record["domains"])
