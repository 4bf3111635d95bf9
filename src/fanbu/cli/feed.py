"""``fanbu feed``: specialists back into a large model; from domains, from plain directories, by a mergekit recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fanbu.cli import shared
from fanbu.cli.shared import Device, Json, Seed, Set
from fanbu.errors import UsageError

if TYPE_CHECKING:
    from fanbu.contribution import Contribution
    from fanbu.domain import Domain
    from fanbu.model import Model
    from fanbu.types import Context, ProbeSet


def feed(
    base: Annotated[str, typer.Argument(help="The large model; with --mergekit, where the new one goes.")],
    out: Annotated[Path | None, typer.Argument(help="Where the new large model goes.")] = None,
    domains: Annotated[
        Path | None, typer.Option(help="YAML with `domains:`; without it, weights of your own are merged.")
    ] = None,
    specialist: Annotated[list[str] | None, typer.Option(help="DOMAIN=DIRECTORY; repeatable.")] = None,
    method_name: Annotated[
        str | None, typer.Option("--method", help="A way back.", autocompletion=shared.ways("feedback"))
    ] = None,
    change: Set = None,
    mergekit: Annotated[Path | None, typer.Option(help="A YAML recipe of mergekit's, instead of all that.")] = None,
    unmerge: Annotated[list[str] | None, typer.Option(help="Take this domain out of --of again; repeatable.")] = None,
    only: Annotated[str | None, typer.Option(help="Make this domain's own model out of --of (made by emr).")] = None,
    of: Annotated[Path | None, typer.Option(help="The merged model that --unmerge or --only starts from.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what was sent beside OUT, for --unmerge.")] = False,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Merge adapters into one adapter (task_arithmetic).")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as the base by default.")] = None,
    memory: Annotated[str, typer.Option(help="What merging may hold at once, such as 2GB.")] = "512MB",
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="base or union: the tokens of a merge where tokenizers differ.",
            autocompletion=shared.one_of("base", "union"),
        ),
    ] = None,
    judge: Annotated[bool, typer.Option("--judge", help="Judge it on the domains; exit 3 if refused.")] = False,
    seed: Seed = None, device: Device = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Feed specialists back into a large model. With --domains what they send passes the boundary."""
    arguments, folders = shared.arguments_of(change), dict(_pair(s) for s in specialist or [])
    place = Path(base) if mergekit else _required(out, "OUT")
    if not (folders or mergekit or unmerge or only):
        raise UsageError("flag", "--specialist", allowed="DOMAIN=DIRECTORY", remedy="name at least one specialist")
    if judge and domains is None:
        raise UsageError("flag", "--judge", allowed="together with --domains", remedy="name the domains to judge on")
    if vocabulary is not None and (vocabulary not in ("base", "union") or domains or mergekit or unmerge):
        raise UsageError(
            "flag", "--vocabulary", allowed="base or union, with --specialist alone", got=vocabulary,
            remedy="merge directories of your own; a recipe of mergekit's says it by tokenizer_source",
        )  # fmt: skip
    with shared.context_of(seed, device) as plain:
        context = replace(plain, dtype=dtype, memory=_bytes(memory))
        made: Model | None
        told: dict[str, Any] = {}
        if mergekit:
            made = _by_mergekit(mergekit, place, context)
        elif unmerge or only:
            made = _taken_out(base, unmerge or [], only, _required(of, "--of"), place, context)
        elif as_adapter:
            made, told = None, _joined(base, place, folders, method_name, arguments, context)
        elif domains:
            made, told = _from_domains(base, place, domains, folders, method_name or "distill", arguments, context)
        else:
            arguments |= {"keep": keep, "vocabulary": vocabulary}
            made = _merged(base, place, folders, method_name or "task_arithmetic", arguments, context)
    head = {"model": str(made.path), "digest": made.digest} if made else {}
    shared.print_values({**head, **told}, as_json)
    if judge and domains and made:
        from fanbu.cli import steps

        steps.judge(base, str(made.path), domains, None, seed, device, as_json)


def _merged(
    base: str, out: Path, folders: Mapping[str, str], name: str, arguments: dict[str, Any], context: Context
) -> Model:
    from fanbu import api
    from fanbu.model import open_model

    large = open_model(base, verify=False)
    return api.merge(large, folders, out, context, method_name=name, **arguments)


def _taken_out(
    base: str, domains: list[str], only: str | None, merged: Path, out: Path, context: Context
) -> Model:  # fmt: skip
    from fanbu import api
    from fanbu.model import open_model

    if only:
        return api.only(open_model(base), open_model(merged), only, out, context)
    return api.unmerge(open_model(base), open_model(merged), domains, out, context)


def _joined(
    base: str, out: Path, folders: Mapping[str, str], name: str | None, arguments: dict[str, Any], context: Context
) -> dict[str, Any]:
    """One adapter of several; what ``--set`` says is ``join_adapters``'s: scale, weights, rank or error."""
    from fanbu.merging.adapter import weights_contribution
    from fanbu.merging.extract import join_adapters
    from fanbu.model import open_model

    known = {"scale", "weights", "rank", "error"}
    if name not in (None, "task_arithmetic") or set(arguments) - known:
        raise UsageError(
            "flag", "--as-adapter", allowed=f"task_arithmetic, with {', '.join(sorted(known))}",
            got=name or sorted(set(arguments) - known), remedy="merge into a full model, then `fanbu extract`",
        )  # fmt: skip
    large = open_model(base)
    sent = [weights_contribution(folder, large, domain) for domain, folder in folders.items()]
    made = join_adapters(sent, large, out, context, **arguments)
    return {"adapter": str(made.path), "matrices": len(made.ranks), "bytes": made.bytes, "error": round(made.error, 6)}


def _by_mergekit(config: Path, out: Path, context: Context) -> Model:
    from fanbu.from_mergekit import run_mergekit

    return run_mergekit(config, out, context)


def _from_domains(
    base: str, out: Path, domains: Path, folders: Mapping[str, str], name: str, arguments: dict[str, Any],
    context: Context,
) -> tuple[Model, dict[str, Any]]:  # fmt: skip
    """Through the boundaries of the domains; what crossed is kept beside ``out``."""
    from fanbu.api import kept_beside
    from fanbu.boundary import cross
    from fanbu.catalogue import method
    from fanbu.domain import Specialist
    from fanbu.model import open_model

    way = method(name, "feedback")
    way.check(arguments)
    chosen = shared.domains_of(domains, list(folders))
    large = open_model(base)
    sent: list[Contribution] = []
    probe, texts = _probe(chosen, out) if way.needs.probe or way.name == "probe" else (context.probe, [])
    context = replace(context, probe=probe)
    for domain, folder in folders.items():
        own = Specialist(open_model(folder), chosen[domain], large)
        contribution = way.contribute(own, large, context, **arguments)
        sent.append(cross(contribution, chosen[domain].share, kept_beside(out, domain)))
    made = way.absorb(large, sent, out, context, **arguments)
    crossed = {d: sum(c.bytes for c in [*texts, *sent] if c.domain == d) for d in folders}
    return made, {"crossed": crossed}


def _probe(domains: Mapping[str, Domain], out: Path) -> tuple[ProbeSet, list[Contribution]]:
    """The texts of the domains that share texts, through their boundaries and without test texts, as in a round."""
    from fanbu.boundary import cross
    from fanbu.probe_set import probe_rows, probe_texts, without_test_texts
    from fanbu.types import ProbeSet

    sharing = [d for d in domains.values() if d.share.texts]
    sent = [cross(probe_texts(d, None), d.share, out.with_name(f"{out.name}.{d.name}.texts")) for d in sharing]
    rows = [row for texts in sent for row in probe_rows(texts)]
    return ProbeSet(tuple(without_test_texts(rows, domains.values()))), sent


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise UsageError("flag", "--specialist", allowed="DOMAIN=DIRECTORY", got=text, remedy="write it like this")
    return name, folder


def _required(value: Path | None, name: str) -> Path:
    if value is None:
        raise UsageError("flag", f"{name} is missing", allowed="a directory", remedy="see `fanbu feed --help`")
    return value


def _bytes(text: str) -> int:
    """A size such as 512MB or 2 GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError("flag", "--memory", allowed="a size such as 512MB or 2GB", got=text, remedy="write it so")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
