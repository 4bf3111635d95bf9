"""Rounds as runs of MLflow, and the champion as a registered model with an alias. Needs the extra ``track``.

Each finished round is one run, found again by its key, so tracking twice writes nothing twice. A model of the registry
points to the folder that the workspace holds already: nothing is copied, loaded or pickled.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.errors import RetryError, UsageError, needs_extra
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.record import read_records
from fanbu.report import format as f
from fanbu.report.verdict import crossed_bytes
from fanbu.types import canonical, digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
_ARTIFACTS = ("record.json", "recipe.yaml", "report.html")
_VALUE, _PARAMETERS, _NAME = 500, 1000, 60  # characters of a value, parameters of a run, characters of a name
# MLflow reports how it is used unless told otherwise, waits very long for a server that is not there, and prints.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}  # fmt: skip


def track(workspace: Path, uri: str | None = None, experiment: str | None = None) -> dict[str, Any]:
    """Writes all finished rounds of a workspace, and where its champion stands, to MLflow; says what was written.

    ``uri`` is MLflow's tracking URI, otherwise the environment's ``MLFLOW_TRACKING_URI``, otherwise ``mlflow.db`` in
    the workspace. ``experiment`` and the registered model are named after the recipe. Raises UsageError without the
    extra or without a finished round, and RetryError where MLflow cannot be reached.
    """
    records = read_records(workspace) if workspace.is_dir() else []
    if not records:
        raise UsageError(
            "no-rounds", f"no finished round in {workspace}", got=workspace,
            remedy="run a recipe first, or give its workspace",
        )  # fmt: skip
    ledger = Workspace(workspace)
    own = f"sqlite:///{ledger.root / 'mlflow.db'}"
    where = uri or os.environ.get("MLFLOW_TRACKING_URI") or own
    with _connected(where) as client:
        name = experiment or _name(str(records[-1].get("name")))
        book = Book(client, ledger, _experiment(client, name, ledger.root if where == own else None))
        written = [record["key"] for record in records if book.write(record)]
        model = _name(str(records[-1].get("name")))
        versions, champion = book.register(model)
    return {
        "uri": _without_password(where), "experiment": name, "runs": len(records), "written": written, "model": model,
        "versions": versions, "champion": champion,
    }  # fmt: skip


@contextmanager
def _connected(uri: str) -> Iterator[MlflowClient]:
    """A client of its own, so that nothing of the caller's MLflow is changed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with needs_extra("track"):
        import_module("alembic")  # MLflow's SQL store needs it and asks for it late
        import sqlalchemy
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    try:
        yield MlflowClient(tracking_uri=uri)
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        why = str(error).split("\n")[0].replace(uri, _without_password(uri))
        raise RetryError(
            "tracking", f"MLflow at {_without_password(uri)} did not take it: {why}",
            remedy="check the tracking URI and run again; nothing is written twice",
        ) from None  # fmt: skip


def _without_password(uri: str) -> str:
    return re.sub(r"://[^/@]*@", "://", uri)


def _experiment(client: MlflowClient, name: str, root: Path | None) -> str:
    """The id of an experiment by its name. In the workspace's own database, the artifacts lie beside it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, (root / "mlartifacts").as_uri() if root else None))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


@dataclass
class Book:
    """One workspace's place in MLflow: ``runs`` are the ids of its runs by the key of their round."""

    client: MlflowClient
    ledger: Workspace
    experiment: str
    runs: dict[str, str] = field(default_factory=dict)

    def write(self, record: Mapping[str, Any]) -> bool:
        """One round as a run; False where it was there already. What history says about it is kept true anyway."""
        from mlflow.entities import Metric, Param, RunTag

        key = str(record["key"])
        known = self.client.search_runs([self.experiment], f"tags.`fanbu.key` = '{_plain(key)}'", max_results=1)
        number, when = int(record.get("round") or 1), _milliseconds(record.get("created"))
        run = known[0] if known else None
        if run is None:
            title = f"{record.get('name')}, round {number}"
            run = self.client.create_run(self.experiment, when, {"fanbu.key": key}, title)
        self.runs[key], tags = run.info.run_id, _decision(record, self.ledger)
        fresh = run.info.status != "FINISHED"
        if fresh:  # or cut off while it was written: the same values once more change nothing
            parameters = [Param(name, value) for name, value in parameters_of(record).items()]
            metrics = [Metric(name, value, when, number) for name, value in metrics_of(record).items()]
            tags = {**_tags(record), **tags}
            for start in range(0, len(parameters), 100):
                self.client.log_batch(run.info.run_id, params=parameters[start : start + 100])
            for start in range(0, len(metrics), 500):
                self.client.log_batch(run.info.run_id, metrics=metrics[start : start + 500])
            self._artifacts(run.info.run_id, record)
        changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
        if changed:
            self.client.log_batch(run.info.run_id, tags=changed)
        if fresh:
            seconds = metrics_of(record).get("seconds", 0.0)
            self.client.set_terminated(run.info.run_id, "FINISHED", when + int(1000 * seconds))
        return fresh

    def _artifacts(self, run: str, record: Mapping[str, Any]) -> None:
        folder = self.ledger.root / "rounds" / str(record["key"])[:20]
        for name in _ARTIFACTS:
            if (folder / name).is_file():
                self.client.log_artifact(run, str(folder / name))

    def register(self, name: str) -> tuple[dict[str, str], str | None]:
        """A version for every model that was champion, and the alias on the one that is: ({digest: version}, it)."""
        from mlflow.exceptions import MlflowException

        try:
            model = self.client.get_registered_model(name)
        except MlflowException:
            model = self.client.create_registered_model(name, description="Champions of a fanbu workspace.")
        every = self.client.search_model_versions(f"name = '{_plain(name)}'")
        known = {v.tags["fanbu.digest"]: str(v.version) for v in every if "fanbu.digest" in v.tags}
        mine: dict[str, str] = {}
        for event in self.ledger.history():
            sha = event["model"]  # None where a domain left and took the champion with it
            if sha and event["event"] != "refused" and sha not in mine:
                mine[sha] = known.get(sha) or self._version(name, event)
        pointer, before = self.ledger.champion(), dict(model.aliases).get(ALIAS)
        version = mine.get(pointer["model"]) if pointer else None
        if version is None and before is not None:
            self.client.delete_registered_model_alias(name, ALIAS)
        elif version is not None and str(before) != version:
            self.client.set_registered_model_alias(name, ALIAS, version)
        return mine, version

    def _version(self, name: str, event: Mapping[str, Any]) -> str:
        folder = (self.ledger.root / str(event["path"])).resolve()
        run = self.runs.get(str(event.get("round"))) or next(iter(self.runs.values()))
        tags = {
            "fanbu.digest": str(event["model"]), "fanbu.event": str(event["event"]), "fanbu.path": str(folder),
            "fanbu.host": socket.gethostname(), "fanbu.round": str(event.get("round") or ""),
        }  # fmt: skip
        source, reason = self._source(folder, run, tags), str(event.get("reason") or event["event"])
        made = self.client.create_model_version(name, source, run, tags, None, reason[:_VALUE], 0)
        return str(made.version)

    def _source(self, folder: Path, run: str, tags: Mapping[str, str]) -> str:
        """The model's own folder. A server takes no folder outside its runs: it gets a note that names the folder."""
        if not self.client.tracking_uri.startswith(("http://", "https://", "databricks")):
            return folder.as_uri()
        place = f"models/{tags['fanbu.digest'][:20]}"
        with tempfile.TemporaryDirectory() as temporary:
            note = Path(temporary) / "where.json"
            write_text(note, canonical(dict(tags)))
            self.client.log_artifact(run, str(note), place)
        return f"runs:/{run}/{place}"


def _plain(text: str) -> str:
    return text.replace("'", "").replace("\\", "")


def _name(raw: str) -> str:
    """A name that MLflow takes; one that had to be changed gets a mark, so that two never become one."""
    kept = re.sub(r"[^\w\- .]", "_", raw).strip(" .")[:_NAME]
    return kept if kept == raw and kept else f"{kept or 'unnamed'}-{digest(raw)[:6]}"


def _milliseconds(moment: object) -> int:
    try:
        return int(datetime.fromisoformat(str(moment)).timestamp() * 1000)
    except ValueError:
        return 0


def _decision(record: Mapping[str, Any], ledger: Workspace) -> dict[str, str]:
    """What history says about a round: later events may be by hand."""
    said = [e for e in ledger.history() if e["event"] in {"promoted", "refused"} and e.get("round") == record["key"]]
    verdict = f.part(record, "verdict")
    word = record.get("decision") or ("promoted" if verdict.get("accepted") is True else "refused")
    champion = (ledger.champion() or {}).get("model")
    return {
        "fanbu.decision": str(said[-1]["event"] if said else word),
        "fanbu.reason": str((said[-1].get("reason") if said else None) or verdict.get("reason") or "")[:5000],
        "fanbu.champion": "yes" if champion == f.part(record, "candidate").get("digest") else "no",
    }


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    """What never changes about a round."""
    plain = {name: record.get(name) for name in ("round", "seed", "task", "parent", "version")}
    models = {name: f.part(record, name).get("digest") for name in ("base", "incumbent", "candidate")}
    versions = {f"version.{name}": value for name, value in f.part(record, "versions").items()}
    method = {"method": f.part(record, "candidate").get("method"), "left": ", ".join(f.texts(record, "left")) or None}
    found = {**plain, **models, **method, **versions}
    return {f"fanbu.{_name(str(name))}": str(value)[:_VALUE] for name, value in found.items() if value is not None}


def parameters_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The recipe, flattened: ``feedback.train.lr``; parts of a list go by their name or their number."""
    found: dict[str, str] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(inner, (*path, _name(str(key))))
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
            for number, item in enumerate(value):
                named = item.get("name") if isinstance(item, Mapping) else None
                walk(item, (*path, _name(str(named)) if named else str(number)))
        elif value is not None:
            found[".".join(path)[:200]] = (value if isinstance(value, str) else canonical(value))[:_VALUE]

    walk(f.part(record, "recipe"), ())
    return dict(list(found.items())[:_PARAMETERS])


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number that a round is judged by, and what it cost. What is not known is left out."""
    found: dict[str, object] = {}
    for row in f.rows(record, "table"):
        if row.get("role") in ("candidate", "incumbent"):
            for domain, scores in f.part(row, "domains").items():
                for mode in ("told", "untold"):
                    found[f"{mode}/{_name(domain)}/{row['role']}"] = f.part({"": scores}, "").get(mode)
    verdict = f.part(record, "verdict")
    for domain, row in f.part(verdict, "domains").items():
        for side in ("delta", "low", "high"):
            found[f"change/{_name(domain)}/{side}"] = f.part({"": row}, "").get(side)
    for side in ("delta", "low", "high"):
        found[f"change_mean/{side}"] = f.part(verdict, "average").get(side)
    for side in ("value", "low", "high"):
        found[f"gain_kept/{side}"] = f.part(verdict, "gain_kept").get(side)
    crossed = {domain: crossed_bytes(row) for domain, row in f.part(record, "domains").items()}
    found |= {f"bytes_crossed/{_name(domain)}": value for domain, value in crossed.items()}
    found["bytes_crossed_all"] = sum(value for value in crossed.values() if value is not None)
    costs = [row for row in f.rows(record, "costs") if row.get("reused") is not True]
    for what in ("seconds", "cpu_seconds"):
        found[what] = sum(f.number(row.get(what)) or 0.0 for row in costs)
    found["accepted"] = float(verdict.get("accepted") is True)
    return {name: got for name, value in found.items() if (got := f.number(value)) is not None}
