"""Recipes as text: YAML of bounded size without surprises, and changes to single keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fanbu.errors import UsageError

MAX_RECIPE = 2**20


class _Once(yaml.SafeLoader):
    """Refuses a key that is there twice: the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.YAMLError(f"key {key.value!r} is there twice (again before line {node.end_mark.line + 1})")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of bounded size, without aliases (a few lines of them can stand for gigabytes)."""
    if not path.is_file():
        raise UsageError("recipe-not-found", f"no recipe at {path}", got=path, remedy="check the path")
    if path.stat().st_size > MAX_RECIPE:
        raise UsageError(
            "recipe-too-large", f"{path}", allowed=f"{MAX_RECIPE} bytes", remedy="a recipe is a short text"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UsageError("recipe-alias", f"{path} uses YAML aliases (*name)", remedy="write the value out")
        value = yaml.load(text, _Once)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("recipe-broken", f"{path} is no YAML: {error}", remedy="repair it") from None
    if not isinstance(value, dict):
        raise UsageError(
            "recipe-broken", f"{path} is no mapping", got=type(value).__name__, remedy="start with fanbu: 1"
        )
    return value


def apply_change(value: dict[str, Any], change: str) -> None:
    """Sets ``key.key=value`` in a mapping of mappings."""
    key, equals, text = change.partition("=")
    if not equals:
        raise UsageError("set-form", "--set", allowed="key.key=value", got=change, remedy="write it like this")
    *path, last = key.split(".")
    for name in path:
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise UsageError("set-form", f"--set {key}: {name} is no mapping", got=change, remedy="check the key")
    try:
        value[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(
            "set-form", f"--set {key}: the value is no YAML: {error}", got=change, remedy="quote it"
        ) from None
