"""What the documents show is what the code takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fanbu.catalogue import method, methods
from fanbu.recipe import DomainSpec, GateSpec, ProbeSpec, Recipe, ShareSpec
from fanbu.types import Train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
RECIPES = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
    if "\nfanbu: 1" in f"\n{block}"
]


@pytest.mark.parametrize(("page", "block"), RECIPES, ids=[f"{p}-{i}" for i, (p, _) in enumerate(RECIPES)])
def test_recipes_in_the_documents_are_recipes(page: str, block: str) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(block))
    for step in recipe.shrink:
        method(step.method, "shrink").check(step.arguments)
    method(recipe.feedback.method, "feedback").check(recipe.feedback.arguments)


def test_the_recipes_that_ship_are_recipes() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        Recipe.model_validate(yaml.safe_load(path.read_text()))


def test_every_key_and_every_method_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    fields = [f for m in (Recipe, DomainSpec, ProbeSpec, ShareSpec, GateSpec) for f in m.model_fields]
    for name in [*fields, *Train.__dataclass_fields__]:
        assert f"`{name}`" in text, name
    design = (ROOT / "docs" / "design.md").read_text() + (ROOT / "README.md").read_text()
    for name in methods():
        assert f"`{name}`" in design, name


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
