"""Writes the report of one round: ``report.html``, one file that works offline, and ``report.json``, the record."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fanbu.report import charts, comparison, run, verdict
from fanbu.report import format as f


def write_report(record: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder/report.html`` and ``folder/report.json``, each atomically, and return the path of the page.

    ``record`` is JSON-plain; any optional part of it may be missing. Numbers that are not finite become null, as JSON
    has no other word for them.
    """
    page = render(record)
    plain = json.dumps(_finite(record), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", plain + "\n")
    return _write(folder / "report.html", page)


def render(record: Mapping[str, Any]) -> str:
    """The page of one record. Everything that comes from the record is escaped."""
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
    return environment.get_template("page.html.j2").render(key=charts.key, **sections(record))


def _shown(value: object) -> object:
    """What ``{{ }}`` prints: plain texts lose their hidden characters (drawings and macros are not plain)."""
    return f.clean(value) if type(value) is str else value


def _breakable(name: str) -> str:
    """A name as escaped HTML that may break its line after an underscore or a slash."""
    return re.sub(r"([_/])", r"\1<wbr>", escape(f.clean(name)))


def sections(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, section by section: words and inline SVG, no more sums to do."""
    judged = f.part(record, "verdict")
    return {
        "title": f.text(record.get("name") or "unnamed"),
        "round": "" if record.get("round") is None else f", round {f.text(record['round'])}",
        "facts": _facts(record),
        "version": f.text(record.get("version")),
        "mode": f.text(judged.get("mode")),
        "level": _level(judged.get("level") or f.part(record, "recipe", "gate").get("confidence")),
        "banner": verdict.banner(record),
        "forest": verdict.forest(record),
        "untold": verdict.untold_forest(record),
        "comparison": comparison.comparison(record),
        "specialists": run.specialists(record),
        "crossings": run.crossings(record),
        "costs": run.costs(record),
        "warnings": run.warnings(record),
        "reproduce": run.reproduce(record),
        "limits": verdict.limits(record),
    }


def _facts(record: Mapping[str, Any]) -> list[str]:
    seed, domains = record.get("seed"), len(f.part(record, "domains"))
    told = [f.text(record.get("task")), f.moment(record.get("created"))]
    told += [f"seed {f.text(seed)}"] if seed is not None else []
    told += [f"{domains} domain{'s' if domains > 1 else ''}"] if domains else []
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
