"""The command line: thin, and quick to start. Results go to stdout, progress and logs to stderr.

Exit codes: 0 done; 1 error; 2 usage; 3 the gate refused; 4 bad data; 5 integrity; 75 try again; 143 SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fanbu.errors import FanbuError

if TYPE_CHECKING:
    from fanbu.domain import Domain
    from fanbu.types import Context

# Two runs on busy cores: threads that sleep while they wait are twice as quick as threads that spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="fanbu",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help=(__doc__ or "").split("\n")[0],
)
methods_app = typer.Typer(help="The ways down and the ways back.", invoke_without_command=True)
app.add_typer(methods_app, name="methods")

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key.key=value over the recipe or the method; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Over the recipe's seed.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps, over the recipe's.")]
WorkspacePath = Annotated[Path, typer.Argument(help="The workspace (runs/NAME), or the recipe that names it.")]
Domains = Annotated[Path, typer.Option(help="YAML with `domains:` as in a recipe (a recipe will do).")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and end.")] = False,
) -> None:
    if version:
        import fanbu

        typer.echo(fanbu.__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipePath, change: Set = None, seed: Seed = None, device: Device = None,
    workspace: Annotated[str | None, typer.Option(help="Over the recipe's workspace.")] = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Run one round to its verdict; what is finished already is skipped, so it resumes by itself."""
    from fanbu.progress import bar, log
    from fanbu.recipe import load_recipe
    from fanbu.report.html import write_report
    from fanbu.report.text import summary
    from fanbu.round import run as run_round

    extra = [f"{k}={v}" for k, v in (("seed", seed), ("device", device), ("workspace", workspace)) if v is not None]
    with bar() as progress:
        record = run_round(load_recipe(recipe, [*(change or []), *extra]), progress, log)
    page = write_report(
        {k: v for k, v in record.items() if k not in {"folder", "workspace", "champion"}}, Path(record["folder"])
    )
    accepted = record["verdict"]["accepted"]
    if as_json:
        typer.echo(json.dumps({**record, "report": str(page)}, default=str))
    else:
        typer.echo(summary(record))
        typer.echo(f"report: {page}")
    raise typer.Exit(0 if accepted else 3)


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(help="The large model: directory, package:NAME/folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Where the specialist goes.")],
    domains: Domains, domain: Annotated[str, typer.Option(help="Which of the domains.")],
    method_name: Annotated[str, typer.Option("--method", help="A way down.")] = "finetune",
    change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Make one specialist from a large model."""
    from fanbu.catalogue import method

    way = method(method_name, "shrink")
    arguments = _arguments(change)
    way.check(arguments)
    chosen = _domains(domains, [domain])[domain]
    with _context(seed, device) as context:
        parent = _opened(model, chosen, out, context)
        made = way.shrink(parent, chosen, out, context, **arguments)
    _print(
        {
            "model": str(made.path),
            "digest": made.digest,
            "parameters": made.parameters,
            **dict(made.manifest["metrics"]),
        },
        as_json,
    )


@app.command()
def feed(
    base: Annotated[str, typer.Argument(help="The large model.")],
    out: Annotated[Path, typer.Argument(help="Where the new large model goes.")],
    domains: Domains,
    specialist: Annotated[list[str], typer.Option(help="DOMAIN=DIRECTORY; repeatable.")],
    method_name: Annotated[str, typer.Option("--method", help="A way back.")] = "distill",
    change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Feed specialists back into a large model; contributions pass the boundary and are kept beside OUT."""
    from dataclasses import replace

    from fanbu.boundary import cross
    from fanbu.catalogue import method
    from fanbu.domain import Specialist
    from fanbu.model import open_model
    from fanbu.types import ProbeRow, ProbeSet

    way, arguments = method(method_name, "feedback"), _arguments(change)
    way.check(arguments)
    folders = dict(_pair(s) for s in specialist)
    chosen = _domains(domains, list(folders))
    texts = [
        ProbeRow(f"{d.name}/{i}", t, d.name)
        for d in chosen.values()
        if d.share.texts
        for i, t in enumerate(d.train.texts)
    ]
    with _context(seed, device) as context:
        context = replace(context, probe=ProbeSet(tuple(texts)))
        large = open_model(base)
        sent = []
        for name, folder in folders.items():
            own = Specialist(open_model(folder), chosen[name], large)
            contribution = way.contribute(own, large, context, **arguments)
            sent.append(cross(contribution, chosen[name].share, out.with_name(f"{out.name}.{name}.contribution")))
        made = way.absorb(large, sent, out, context, **arguments)
    _print({"model": str(made.path), "digest": made.digest, "crossed": {c.domain: c.bytes for c in sent}}, as_json)


@app.command()
def judge(
    incumbent: Annotated[str, typer.Argument(help="The old large model.")],
    candidate: Annotated[str, typer.Argument(help="The new one.")],
    domains: Domains, change: Set = None, seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare two large models on the domains' test rows; exit 0 if the new one is accepted, 3 if not."""
    from fanbu import api
    from fanbu.model import open_model
    from fanbu.recipe import read_gate
    from fanbu.report.text import verdict_table

    gate = read_gate(_arguments(change))
    chosen = _domains(domains, None)
    with _context(seed, device) as context:
        verdict = api.judge(open_model(candidate), open_model(incumbent), chosen, context, gate)
    typer.echo(json.dumps(verdict) if as_json else verdict_table(verdict))
    raise typer.Exit(0 if verdict["accepted"] else 3)


@app.command()
def report(workspace: WorkspacePath, as_json: Json = False) -> None:
    """Write the report of the last round again and print its path."""
    from fanbu.record import read_records
    from fanbu.report.html import write_report

    root = _workspace(workspace)
    records = read_records(root)
    if not records:
        raise _nothing(root)
    record = records[-1]
    page = write_report(record, root / "rounds" / record["key"][:20])
    typer.echo(json.dumps(record) if as_json else f"report: {page}")


@app.command()
def history(workspace: WorkspacePath, as_json: Json = False) -> None:
    """What happened: promotions, refusals, rollbacks, and the tree of models."""
    from fanbu.ledger import Workspace
    from fanbu.report.text import history_tree

    ledger = Workspace(_workspace(workspace))
    if as_json:
        typer.echo(json.dumps({"champion": ledger.champion(), "events": ledger.history()}))
    else:
        typer.echo(history_tree(ledger.history(), ledger.champion()))


@app.command()
def promote(
    workspace: WorkspacePath, model: Annotated[str, typer.Argument(help="First characters of its digest.")],
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make a model of the history the champion, whatever the gate said."""
    from fanbu.ledger import Workspace

    _print(Workspace(_workspace(workspace)).promote(model), as_json)


@app.command()
def rollback(workspace: WorkspacePath, as_json: Json = False) -> None:
    """Go back to the champion before this one; nothing is trained."""
    from fanbu.ledger import Workspace

    _print(Workspace(_workspace(workspace)).rollback(), as_json)


@methods_app.callback()
def _methods(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_methods(as_json=False)


@methods_app.command("list")
def list_methods(as_json: Json = False) -> None:
    """All methods with one line each."""
    from fanbu.catalogue import methods

    rows = [{"name": m.name, "family": m.family, "summary": m.summary} for m in methods().values()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in sorted(rows, key=lambda r: (r["family"] != "shrink", r["family"], r["name"])):
        typer.echo(f"{row['family']:<12} {row['name']:<12} {row['summary']}")


@methods_app.command("show")
def show_method(name: str, as_json: Json = False) -> None:
    """One method: what it does, what it needs, its parameters."""
    import inspect

    from fanbu.catalogue import method
    from fanbu.report.text import method_page

    chosen = method(name)
    parameters = {k: {"type": _name(kind), "default": _default(d)} for k, (kind, d) in chosen.parameters().items()}
    if as_json:
        typer.echo(json.dumps({"name": chosen.name, "family": chosen.family, "parameters": parameters}, default=str))
    else:
        typer.echo(
            method_page(chosen.name, chosen.family, [inspect.getdoc(f) or "" for f in chosen.functions], parameters)
        )


def _name(kind: Any) -> str:
    kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _default(value: Any) -> Any:
    from dataclasses import asdict, is_dataclass

    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _context(seed: int | None, device: str | None) -> Any:
    from contextlib import contextmanager

    from fanbu.progress import bar
    from fanbu.recipe import resolve_machine
    from fanbu.types import Context

    @contextmanager
    def opened() -> Any:
        precision: Any
        where, precision, threads = resolve_machine(device or "auto", "auto", 0)
        with bar() as progress:
            yield Context(
                seed=seed or 0,
                device=where,
                precision=precision,
                threads=threads,
                progress=progress,
            )

    return opened()


def _opened(source: str, domain: Domain, out: Path, context: Context) -> Any:
    """A bare body is opened as a classifier beside OUT first, and said so."""
    from fanbu.heads import open_classifier
    from fanbu.model import load_tokenizer, open_model, provenance, save_network
    from fanbu.progress import log

    model = open_model(source)
    if model.task is not None or domain.task != "text-classification":
        return model
    log(f"{source} is a bare body: opened as a classifier in {out}.opened")
    network = open_classifier(model, context)
    return save_network(
        network, load_tokenizer(model), out.with_name(f"{out.name}.opened"), provenance("open", [model], context)
    )


def _domains(path: Path, names: list[str] | None) -> dict[str, Domain]:
    from fanbu.errors import UsageError
    from fanbu.recipe import read_domains

    known = read_domains(path)
    unknown = set(names or []) - set(known)
    if unknown:
        raise UsageError("unknown-domain", f"{path}", allowed=list(known), got=unknown, remedy="check the name")
    return {n: known[n]() for n in (names or known)}


def _arguments(changes: list[str] | None) -> dict[str, Any]:
    from fanbu.recipe import apply_change

    value: dict[str, Any] = {}
    for change in changes or []:
        apply_change(value, change)
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise _usage("--specialist", "DOMAIN=DIRECTORY", text)
    return name, folder


def _usage(what: str, allowed: str, got: str) -> FanbuError:
    from fanbu.errors import UsageError

    return UsageError("flag", what, allowed=allowed, got=got, remedy="write it like this")


def _workspace(path: Path) -> Path:
    if path.is_file():
        from fanbu.recipe import load_recipe

        path = Path(load_recipe(path).workspace)
    if not (path / "stages").is_dir():
        raise _nothing(path)
    return path


def _nothing(path: Path) -> FanbuError:
    from fanbu.errors import UsageError

    return UsageError(
        "no-rounds", f"no finished round in {path}", got=path, remedy="run a recipe first, or give its workspace"
    )


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, default=str))
    else:
        for key, value in values.items():
            typer.echo(f"{key}: {value}")


def _stop(number: int, frame: Any) -> None:
    sys.stderr.write("\nstopped; run the same command again to go on\n")
    sys.stderr.flush()
    os._exit(128 + number)  # at once, whatever a library is doing: finished stages are safe by construction


def main() -> None:
    """Runs the command line and turns errors into messages and exit codes."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except FanbuError as error:
        _fail(error)
    except OSError as error:
        from fanbu.tensors import disk_error

        told = disk_error(error, Path(str(error.filename or ".")))
        if not isinstance(told, FanbuError):
            raise
        _fail(told)


def _fail(error: FanbuError) -> NoReturn:
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps({"error": error.as_dict()}) + "\n")
    sys.stderr.write(f"error: {error}\n")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
