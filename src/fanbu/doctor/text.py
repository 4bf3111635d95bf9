"""What the doctor found, and a plan, as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fanbu.report.format import seconds, size
from fanbu.report.text import Words, aligned

SPLITS = ("train", "valid", "test", "unlabelled")


def doctor_page(found: Mapping[str, Any], t: Words = str) -> str:
    """All findings; problems last, so that they are seen."""
    lines = [*_installed(found, t), "", *_machine(found["machine"], t)]
    if found["recipe"]:
        lines += ["", f"{t('recipe')}: {found['recipe']}", *_domains(found["domains"], t)]
        lines += [*_methods(found["methods"], t), *estimate_lines(found["estimate"], t)]
    lines += ["", *(f"{t('warning')}: {w}" for w in found["warnings"])]
    for problem in found["problems"]:
        lines += [f"{t('problem')}: {problem['where']}: {problem['message']}", f"  see {problem['see']}"]
    lines.append(t("It will work.") if found["ok"] else f"{t('It will not work.')} ({len(found['problems'])})")
    return "\n".join(lines)


def _installed(found: Mapping[str, Any], t: Words) -> list[str]:
    core = [f"{p['name']} {p['version'] or t('missing')}" for p in found["installed"] if not p["extra"]]
    rows = [
        [e["name"], t("yes") if e["installed"] else f"{t('no')} ({', '.join(e['missing'])})", t(e["for"])]
        for e in found["extras"]
    ]
    table = aligned([[t("extra"), t("installed"), t("what for")], *rows], 3) if rows else []
    return [f"{t('installed')}: {', '.join(core)}", "", *table]


def _machine(here: Mapping[str, Any], t: Words) -> list[str]:
    free = f"{size(here['memory_free_bytes'])} {t('free')}"
    return [
        f"{t('machine')}: {here['system']}, {here['cores']} {t('cores')} ({here['threads']} {t('usable')})",
        f"{t('memory')}: {size(here['memory_bytes'])}, {free}",
        f"{t('disk')}: {size(here['disk_free_bytes'])} {t('free')}",
        f"{t('accelerator')}: {here['accelerator'] or t('none')}; {t('training in')} {here['precision']}",
    ]


def _domains(domains: Mapping[str, Any], t: Words) -> list[str]:
    if not domains:
        return []
    heading = [t("domain"), t("role"), t("share"), *(t(s) for s in SPLITS), t("labels")]
    rows = [
        [name, t(d["role"]), _share(d["share"], t), *(str(d["rows"][s]) for s in SPLITS), str(d["labels"])]
        for name, d in domains.items()
    ]
    lines = ["", *aligned([heading, *rows], 3)]
    return [*lines, *(f"{t('warning')}: {name}: {w}" for name, d in domains.items() for w in d["warnings"])]


def _share(share: Mapping[str, Any], t: Words) -> str:
    parts = [word for word in ("texts", "labels") if share[word]] or ["neither"]
    return " + ".join(t(p) for p in parts)


def _methods(methods: list[Mapping[str, Any]], t: Words) -> list[str]:
    rows = [[("*" if m["chosen"] else " ") + m["name"], t("fits") if m["fits"] else t("no"), m["why"]] for m in methods]
    return ["", *aligned([[" " + t("way back"), t("fits"), t("why not")], *rows], 3)] if rows else []


def ways_page(found: Mapping[str, Any], t: Words = str) -> str:
    """Every way back: whether it fits, and why not; what may be wrong with the domains."""
    rows = [
        [("*" if m["chosen"] else " ") + m["name"] + (" (experimental)" if m["experimental"] else ""), m["family"]]
        for m in found["ways"]
        if m["fits"]
    ]
    lines = [
        f"{t('ways back that fit')} ({len(rows)}):",
        *aligned([[" " + t("way back"), t("what crosses")], *rows], 2),
    ]
    unfit = [[" " + m["name"], m["why"], m["would"]] for m in found["ways"] if not m["fits"]]
    if unfit:
        heading = [" " + t("way back"), t("does not fit because"), t("would fit if")]
        lines += ["", *aligned([heading, *unfit], 3)]
    return "\n".join([*lines, "", *(f"{t('warning')}: {w}" for w in found["warnings"])])


def costs_page(costs: Mapping[str, Mapping[str, Any]], t: Words = str) -> str:
    """What ways back will take in a round, the quickest first."""
    known = sorted((c["seconds"], name) for name, c in costs.items() if "seconds" in c)
    rows = [
        [name, seconds(took), size(costs[name]["peak_bytes"]), size(costs[name]["crossed_bytes"])]
        for took, name in known
    ]
    heading = [t("way back"), t("time"), t("memory"), t("what crosses")]
    failed = [f"{t('could not be tried')}: {name}: {c['error']}" for name, c in costs.items() if "error" in c]
    return "\n".join([*aligned([heading, *rows]), *failed])


def estimate_lines(estimate: Mapping[str, Any] | None, t: Words) -> list[str]:
    """The time by stage and in all, with memory and disk."""
    if estimate is None:
        return []
    heading = [t("stage"), t("training steps"), t("rows predicted"), t("time")]
    rows = [[s["stage"], str(s["batches"]), f"{s['predicted']:.0f}", seconds(s["seconds"])] for s in estimate["stages"]]
    whole = f"{t('round')} {estimate['round']}: {seconds(estimate['round_seconds'])}"
    if estimate["rounds"] > 1:
        whole += f"; {t('all rounds to come')} ({estimate['rounds']}): {seconds(estimate['seconds'])}"
    room = f"{t('memory')}: {size(estimate['memory_bytes'])}; {t('disk')}: {size(estimate['disk_bytes'])}"
    return ["", *aligned([heading, *rows]), f"{t('estimate')}: {whole}; {room}"]


def plan_page(found: Mapping[str, Any], t: Words = str) -> str:
    """What a run would do."""
    lines = [
        f"{found['name']}: {t('rounds')} {found['rounds']} ({found['finished']} {t('finished')}), "
        f"{t('workspace')} {found['workspace']}, {found['device']}, {found['precision']}",
        f"{t('model')}: {found['model']}",
    ]
    heading = [t("domain"), t("role"), t("what crosses"), *(t(s) for s in SPLITS), t("labels")]
    rows = [
        [name, t(d["role"]), ", ".join(d["crosses"]), *(str(d["rows"][s]) for s in SPLITS), str(d["labels"])]
        for name, d in found["domains"].items()
    ]
    lines += ["", *aligned([heading, *rows], 3), ""]
    lines += [f"{t('warning')}: {w}" for d in found["domains"].values() for w in d["warnings"]]
    lines += [f"{t('way down')}: {_step(s)}" for s in found["shrink"]]
    lines += [f"{t('way back')}: {_step(s)}" for s in found["feedback"]]
    lines += [f"{t('reference')}: {r if isinstance(r, str) else _step(r)}" for r in found["references"]]
    lines.append(f"{t('margin')}: {found['gate']['margin']}" + _margins(found["gate"]["margins"]))
    return "\n".join([*lines, *estimate_lines(found["estimate"], t), "", t("Nothing was trained.")])


def _step(step: Mapping[str, Any]) -> str:
    own = [(k, v) for k, v in step.items() if k != "method"]
    plain = [pair for k, v in own for pair in (v.items() if isinstance(v, dict) else [(k, v)])]
    parameters = ", ".join(f"{k} {v}" for k, v in plain)
    return f"{step['method']} ({parameters})" if parameters else str(step["method"])


def _margins(margins: Mapping[str, float]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in margins.items())})" if margins else ""
