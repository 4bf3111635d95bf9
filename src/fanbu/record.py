"""The record of a round: plain values that the report and other programs read."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import fanbu
from fanbu.model import Model
from fanbu.recipe import Recipe
from fanbu.tensors import write_text

if TYPE_CHECKING:
    from fanbu.contribution import Contribution
    from fanbu.round import Result, Turn

_NAMES = {
    "champion": "champion of this workspace",
    "incumbent": "incumbent (probed base)", "specialists": "specialists, oracle router", "tfidf": "TF-IDF regression",
    "average": "uniform average of weights", "multitask": "joint training on all rows",
}  # fmt: skip


def make_record(turn: Turn, result: Result, key: str) -> dict[str, Any]:
    """Everything that a report shows."""
    recipe = turn.recipe
    score = {d: _told(c) for d, c in result.outcomes["incumbent"].items()}
    return {
        "fanbu": 1, "version": fanbu.__version__, "name": recipe.name, "round": 1, "key": key, "seed": recipe.seed,
        "task": turn.feeding[0].task, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe.model_dump(mode="json"), "base": {**_model(result.base), "source": recipe.model},
        "incumbent": {**_model(result.incumbent), "method": result.incumbent.manifest.get("method")},
        "candidate": {
            **_model(result.candidate), "method": recipe.feedback.method, "arguments": recipe.feedback.arguments,
            "made": dict(result.candidate.manifest.get("parameters", {})),
        },
        "verdict": dict(result.verdict),
        "domains": {d: _domain(turn, result, d, score) for d in turn.domains},
        "table": _table(turn, result), "costs": turn.costs,
        "warnings": _warnings(turn, result),
        "reproduce": [f"fanbu run {shlex.quote('recipe.yaml')}"],
        "versions": {
            "python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "numpy")}
        },
    }  # fmt: skip


def _warnings(turn: Turn, result: Result) -> list[str]:
    """What the owners' data brought up, and which specialists taught nothing."""
    silent = result.candidate.manifest.get("parameters", {}).get("silent") or []
    taught = [
        f"{d}: its specialist does not beat the large model on validation rows, so it taught nothing" for d in silent
    ]
    return [w for d in turn.domains.values() for w in d.warnings] + turn.warnings + taught


def _model(model: Model) -> dict[str, Any]:
    return {"digest": model.digest, "path": str(model.path), "parameters": model.parameters, "bytes": model.bytes}


def _told(outcome: Contribution) -> float:
    metrics = outcome.meta["metrics"]["told"]
    return float(metrics.get("accuracy", metrics.get("loss")))


def _domain(turn: Turn, result: Result, name: str, score: Mapping[str, float]) -> dict[str, Any]:
    d = turn.domains[name]
    rows = {split: len(getattr(d, split)) for split in ("train", "valid", "test", "unlabelled")}
    specialist = next((s for s in result.specialists if s.domain.name == name), None)
    sizes = result.sizes.get(name, {})
    grown = None
    if specialist is not None:
        way = " > ".join(step.method for step in turn.recipe.shrink)
        own = _told(result.outcomes["specialists"][name])
        grown = {**_model(specialist.model), **sizes["specialist"], "method": way, "score": own}
    return {
        "task": d.task, "metric": d.metric, "role": d.role, "rows": rows, "labels": len(d.labels), "digest": d.digest,
        "share": d.share.as_dict(), "warnings": list(d.warnings), "crossed": turn.crossed.get(name, []),
        "specialist": grown, "parent": {**sizes.get("parent", {}), "score": score[name]},
    }  # fmt: skip


def _table(turn: Turn, result: Result) -> list[dict[str, Any]]:
    """Candidate and incumbent first, then the specialists, then the references."""
    seconds = {c["stage"]: c.get("seconds") for c in turn.costs}
    rows = []
    for name, by_domain in result.outcomes.items():
        role = name if name in {"incumbent", "candidate", "specialists"} else "reference"
        title = f"new: {turn.recipe.feedback.method}" if role == "candidate" else _NAMES.get(name, name)
        stage = {"candidate": turn.recipe.feedback.method, "incumbent": "incumbent"}.get(name, f"reference {name}")
        domains = {}
        for d, outcome in by_domain.items():
            metrics = outcome.meta["metrics"]
            untold = metrics.get("untold", {}).get("accuracy")
            domains[d] = {"told": _told(outcome), "untold": untold, "metrics": metrics["told"]}
        rows.append({"name": title, "role": role, "domains": domains, "seconds": seconds.get(stage)})
    return rows


def write_record(record: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """record.json and the resolved recipe. A finished round keeps the costs of the run that did the work."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = recipe.model_dump(mode="json", exclude_none=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    write_text(folder / "record.json", json.dumps(record, indent=1, sort_keys=True, default=str))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of one round; None before it is finished."""
    path = folder / "record.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_records(workspace: Path) -> list[dict[str, Any]]:
    """The records of all finished rounds of a workspace, oldest first."""
    found = [json.loads(p.read_text()) for p in workspace.glob("rounds/*/record.json")]
    return sorted(found, key=lambda r: str(r["created"]))
