"""The record of a round: plain values that the report and other programs read."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import fanbu
from fanbu.errors import IntegrityError
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.model import Model
from fanbu.recipe import Recipe

if TYPE_CHECKING:
    from fanbu.contribution import Contribution
    from fanbu.round import Birth, Result
    from fanbu.turn import Turn

COMPARED, WORTH = "compare", "worth"  # folders of a workspace, by round
_NAMES = {
    "specialists": "specialists, oracle router", "tfidf": "TF-IDF regression",
    "average": "uniform average of weights", "multitask": "joint training on all rows",
}  # fmt: skip


def make_record(turn: Turn, result: Result, key: str) -> dict[str, Any]:
    """Everything that a report shows."""
    recipe = turn.recipe
    score = {d: _told(c) for d, c in result.outcomes["incumbent"].items()}
    return {
        "fanbu": 1, "version": fanbu.__version__, "name": recipe.name, "round": turn.number, "key": key,
        "seed": recipe.seed,
        "parent": turn.parent.digest if turn.parent else None, "left": turn.workspace.left(),
        "decision": "promoted" if result.verdict["accepted"] else "refused",
        "task": turn.feeding[0].task, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe.model_dump(mode="json"), "base": {**_model(result.base), "source": recipe.model},
        "incumbent": {**_model(result.incumbent), "method": _made_by(turn, result.incumbent)},
        "candidate": {
            **_model(result.candidate), "method": _ways(turn),
            "arguments": _by_way(turn, [step.arguments for step in recipe.feedback]),
            "made": _by_way(turn, [said or {} for said in _said(result)]),
        },
        "verdict": dict(result.verdict),
        "domains": {d: _domain(turn, result, d, score) for d in turn.here},
        "missed": dict(turn.missed), "table": _table(turn, result), "costs": turn.costs,
        "warnings": _warnings(turn, result),
        "reproduce": [f"fanbu run {shlex.quote('recipe.yaml')}"],
        "versions": {
            "python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "numpy")}
        },
    }  # fmt: skip


def _ways(turn: Turn) -> str:
    return " > ".join(step.called for step in turn.recipe.feedback)


def _by_way(turn: Turn, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one way back its value as it is; of several each under ``NUMBER.METHOD``."""
    steps = turn.recipe.feedback
    if len(steps) == 1:
        return dict(values[0])
    return {f"{i}.{s.method}": dict(v) for i, (s, v) in enumerate(zip(steps, values, strict=True), 1)}


def _said(result: Result) -> list[Mapping[str, Any] | None]:
    """What the manifest of each way's model says of its making; None where the way changed nothing."""
    before = [result.incumbent, *result.fed[:-1]]
    return [
        None if new.digest == old.digest else new.manifest.get("parameters", {})
        for new, old in zip(result.fed, before, strict=True)
    ]


def _made_by(turn: Turn, model: Model) -> str | None:
    """The ways of the round that made a model; else the method in its manifest."""
    known = (r["candidate"] for r in reversed(turn.records) if r["candidate"]["digest"] == model.digest)
    made = next(known, model.manifest)
    return None if made.get("method") is None else str(made["method"])


def _warnings(turn: Turn, result: Result) -> list[str]:
    """What the owners' data brought up, which specialists taught nothing or were not believed, and labels alike."""
    told: list[str] = []
    for step, said in zip(turn.recipe.feedback, _said(result), strict=True):
        nothing = f"{step.method}: nobody who taught was trusted or believed, so it changed nothing"
        told += [nothing] if said is None else _untaught(said)
    missed = [f"{d} took no part to the end, and was not judged: {why}" for d, why in sorted(turn.missed.items())]
    return [w for d in turn.here.values() for w in d.warnings] + missed + turn.warnings + list(dict.fromkeys(told))


def _untaught(parameters: Mapping[str, Any]) -> list[str]:
    far = parameters.get("far") or {}
    taught = [
        f"{d}: on validation rows its specialist adds nothing to the large model, so it taught nothing"
        for d in parameters.get("silent") or []
        if far.get(d) != 1
    ]
    taught += [
        f"{d}: {share:.0%} of the texts that its specialist was asked about lie further from its own than validation "
        f"rows do: there the large model's own answers stood"
        for d, share in far.items()
    ]
    lying = [
        f"{d}: its specialist's answers agree with the large model's no more than chance would "
        f"(kappa {kappa:.2f}): they were not believed; ask its owner what was sent"
        for d, kappa in (parameters.get("doubted") or {}).items()
    ]
    lying += [
        f"{d}: its specialist says the same wherever {word!r} stands, whatever the large model thinks: "
        f"on these texts it was not believed; ask its owner what was sent"
        for d, word in (parameters.get("triggers") or {}).items()
    ]
    same = [
        f"{pair}: specialists say these labels of the same texts (overlap {overlap:.2f}): if they mean the same, "
        f"give them one name by `labels`, and their domains one industry (industry@owner)"
        for pair, overlap in (parameters.get("alike") or {}).items()
    ]
    return taught + lying + same


def _model(model: Model) -> dict[str, Any]:
    return {"digest": model.digest, "path": str(model.path), "parameters": model.parameters, "bytes": model.bytes}


def _told(outcome: Contribution) -> float:
    metrics = outcome.meta["metrics"]["told"]
    return float(metrics.get("accuracy", metrics.get("loss")))


def _domain(turn: Turn, result: Result, name: str, score: Mapping[str, float]) -> dict[str, Any]:
    d = turn.domains[name]
    rows = d.counts
    before: Mapping[str, int] = turn.records[-1]["domains"].get(name, {}).get("rows", {}) if turn.records else {}
    birth, sizes = result.births.get(name), result.sizes.get(name, {})
    grown = None if birth is None else {**_specialist(turn, result, birth), **sizes["specialist"]}
    bins = {who: result.outcomes[who][name].meta.get("calibration") for who in ("incumbent", "candidate")}
    return {
        "joined": not any(name in r["domains"] for r in turn.records),
        "new_rows": {split: max(0, rows[split] - before.get(split, 0)) for split in ("train", "unlabelled")},
        "calibration": bins if all(bins.values()) else None, "examples": dict(result.examples[name]),
        "task": d.task, "metric": d.metric, "role": d.role, "rows": rows, "labels": len(d.labels), "digest": d.digest,
        "share": d.share.as_dict(), "warnings": list(d.warnings), "crossed": list(turn.crossed.get(name, {}).values()),
        "specialist": grown, "parent": {**sizes.get("parent", {}), "score": score[name]},
    }  # fmt: skip


def _specialist(turn: Turn, result: Result, birth: Birth) -> dict[str, Any]:
    """A domain's specialist beside its forerunner."""
    name, before = birth.specialist.domain.name, birth.forerunner
    found = {
        **_model(birth.specialist.model), "method": " > ".join(step.method for step in turn.recipe.shrink),
        "score": _told(result.outcomes["specialists"][name]), "born": birth.how, "forerunner": None,
        "valid": birth.valid["forerunner" if birth.how == "carried on" else "reborn"],
        "reborn_valid": birth.valid["reborn"], **_searched(birth.specialist.model),
    }  # fmt: skip
    if before is not None:
        old = {"digest": before.digest, "path": str(before.path), "score": _told(result.forerunners[name])}
        found["forerunner"] = {**old, "valid": birth.valid["forerunner"]}
    return found


def _searched(model: Model) -> dict[str, Any]:
    """What a search tried before it chose this model: sizes and scores."""
    trials = model.manifest.get("metrics", {}).get("trials") if model.manifest.get("method") == "search" else None
    if not trials:
        return {}
    budget = model.manifest["parameters"]["budget"]
    kind = next(k for k in ("milliseconds", "bytes", "parameters") if budget[k])
    return {"searched_by": kind, "searched": [{"size": t[kind], "score": t["score"]} for t in trials]}


def _table(turn: Turn, result: Result) -> list[dict[str, Any]]:
    """Candidate and incumbent first, then the specialists, then the references."""
    rows, stages = [], {"candidate": [s.called for s in turn.recipe.feedback], "incumbent": ["incumbent"]}
    for name, by_domain in result.outcomes.items():
        role = name if name in {"incumbent", "candidate", "specialists"} else "reference"
        title = {
            "candidate": f"new: {_ways(turn)}",
            "incumbent": "incumbent (champion)" if turn.parent else "incumbent (probed base)",
        }.get(name, _NAMES.get(name, name))
        own = stages.get(name, [f"reference {name}"])
        grouped = tuple(f"{s.called} " for s in turn.recipe.feedback if s.tree) if name == "candidate" else ()
        asked = [c for c in turn.costs if c["stage"] in own or (grouped and c["stage"].startswith(grouped))]
        known = [c["seconds"] for c in asked if c.get("seconds") is not None]
        domains = {}
        for d, outcome in by_domain.items():
            metrics = outcome.meta["metrics"]
            untold = metrics.get("untold", {}).get("accuracy")
            domains[d] = {"told": _told(outcome), "untold": untold, "metrics": metrics["told"]}
        rows.append({"name": title, "role": role, "domains": domains, "seconds": sum(known) if known else None})
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


def record_folder(workspace: Path, key: str) -> Path:
    """Where the round with this key is written down."""
    return workspace / "rounds" / key[:20]


def read_records(workspace: Path, finished: Sequence[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The records of all finished rounds of a workspace, oldest first; ``finished`` are the ledger's events of them."""
    if finished is None:
        finished = Workspace(workspace).rounds()
    found = [(event, read_record(record_folder(workspace, str(event["round"])))) for event in finished]
    for event, record in found:
        if record is None:
            raise IntegrityError(
                "record-missing", f"round {event['number']} is finished and its record is gone",
                got=record_folder(workspace, str(event["round"])), remedy="bring the folder back from a copy",
            )  # fmt: skip
    return [record for _, record in found if record is not None]


def finished(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a workspace's finished rounds, oldest first, and the domains that have left it; none where nothing
    was run."""
    if not (root / "stages").is_dir():
        return [], []
    ledger = Workspace(root)
    return read_records(root, ledger.rounds()), ledger.left()


def with_choices(root: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A round's record with how its way back was chosen (``comparison``) and what its specialists were worth
    (``worth``), where the workspace holds these."""
    found = dict(record)
    for name, folder in (("comparison", COMPARED), ("worth", WORTH)):
        file = root / folder / f"{record.get('round')}.json"
        if file.is_file():
            told = json.loads(file.read_text())
            if name == "worth" or chose(told, record):
                found[name] = told
    return found


def chose(comparison: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a round took the way back that a comparison chose."""
    taken = record.get("recipe", {}).get("feedback")
    return any(
        t["candidate"] == comparison["winner"] and taken in (t["step"], [t["step"]]) for t in comparison["trials"]
    )
