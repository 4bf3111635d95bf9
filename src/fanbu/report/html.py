"""Writes the reports: of one round (and ``report.json``, its record), and of all rounds of a workspace.

Each page is one file that works offline and runs no script.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.report import charts, choosing, comparison, detail, pareto, run, verdict, workspace
from fanbu.report import format as f
from fanbu.report.words import Say, counted, words

if TYPE_CHECKING:
    import jinja2


def write_report(record: Mapping[str, Any], folder: Path, lang: str = "en") -> Path:
    """Write ``folder/report.html`` and ``folder/report.json``, each atomically, and return the path of the page.

    ``record`` is JSON-plain; any optional part of it may be missing. Numbers that are not finite become null, as JSON
    has no other word for them. Raises UsageError for a language that there are no labels in.
    """
    page = render(record, lang)
    plain = json.dumps(_finite(record), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", plain + "\n")
    return _write(folder / "report.html", page)


def write_workspace_report(
    records: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    champion: Mapping[str, Any] | None,
    folder: Path,
    lang: str = "en",
) -> Path:
    """Write ``folder/report.html`` about all rounds, atomically, and return its path.

    ``records`` (oldest first), ``history`` and ``champion`` are what the workspace in ``folder`` holds: the page links
    to the rounds' own pages in it. Raises UsageError for a language that there are no labels in.
    """
    page = render_workspace(records, history, champion, lang)
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / "report.html", page)


def render(record: Mapping[str, Any], lang: str = "en") -> str:
    """The page of one record. Everything that comes from the record is escaped."""
    t = words(lang)
    return _environment().get_template("page.html.j2").render(t=t, lang=lang, key=charts.key, **sections(record, t))


def render_workspace(
    records: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    champion: Mapping[str, Any] | None,
    lang: str = "en",
) -> str:
    """The page of all rounds. Everything that comes from records and history is escaped."""
    t = words(lang)
    parts = workspace.sections(records, history, champion, t)
    return _environment().get_template("workspace.html.j2").render(t=t, lang=lang, **parts)


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = lambda name: markupsafe.Markup(_breakable(str(name)))
    return environment


def _shown(value: object) -> object:
    """What ``{{ }}`` prints: plain texts lose their hidden characters (drawings and macros are not plain)."""
    return f.clean(value) if type(value) is str else value


def _breakable(name: str) -> str:
    """A name as escaped HTML that may break its line after an underscore or a slash."""
    return re.sub(r"([_/])", r"\1<wbr>", escape(f.clean(name)))


def sections(record: Mapping[str, Any], t: Say) -> dict[str, Any]:
    """What the template shows, section by section: words and inline SVG, no more sums to do."""
    judged = f.part(record, "verdict")
    return {
        "title": f.text(record.get("name") or t("unnamed")),
        "round": "" if record.get("round") is None else t(", round {n}", n=f.text(record["round"])),
        "facts": _facts(record, t),
        "version": f.text(record.get("version")),
        "mode": f.text(judged.get("mode")),
        "level": _level(judged.get("level") or f.part(record, "recipe", "gate").get("confidence")),
        "banner": verdict.banner(record, t),
        "forest": verdict.forest(record, t),
        "untold": verdict.untold_forest(record, t),
        "examples": detail.examples(record),
        "calibration": detail.calibration(record, t),
        "comparison": comparison.comparison(record, t),
        "chosen": choosing.chosen(record, t),
        "worth": choosing.worth(record, t),
        "tree": choosing.tree(record),
        "arrivals": detail.arrivals(record, t),
        "specialists": run.specialists(record, t),
        "searches": pareto.searches(record, t),
        "crossings": run.crossings(record, t),
        "costs": run.costs(record),
        "warnings": run.warnings(record),
        "reproduce": run.reproduce(record, t),
        "limits": verdict.limits(record, t),
    }


def _facts(record: Mapping[str, Any], t: Say) -> list[str]:
    seed, domains = record.get("seed"), len(f.part(record, "domains"))
    told = [f.text(record.get("task")), f.moment(record.get("created"))]
    told += [t("seed {seed}", seed=f.text(seed))] if seed is not None else []
    told += [counted(t, domains, "{n} domain", "{n} domains")] if domains else []
    return [fact for fact in told if fact != f.DASH]


def _level(value: object) -> str:
    got = f.number(value)
    return "" if got is None or not 0 < got < 1 else f"{100 * got:.4g}% "


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: str) -> Path:
    """Write a text so that readers see the old file or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            # A lone surrogate has no UTF-8; backslashreplace writes it as JSON would.
            file.write(content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
