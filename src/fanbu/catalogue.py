"""Names and schemas of the methods: a method's place in the tree is its name, its signature is its schema.

Other packages add methods by the entry-point group ``fanbu.methods`` (name = module). Listing reads syntax trees and
imports no method of fanbu's own.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache, cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_type_hints

from fanbu.errors import FitError, IntegrityError, UsageError
from fanbu.types import Context, Needs

if TYPE_CHECKING:
    from fanbu.contribution import Contribution
    from fanbu.domain import Domain, Specialist
    from fanbu.model import Model


@dataclass(frozen=True)
class Method:
    """One way down (``family`` is ``shrink``) or back (``family`` is the kind that crosses)."""

    name: str
    family: str
    module: str

    def __getstate__(self) -> dict[str, str]:
        """Without its module, which another process imports for itself."""
        return {"name": self.name, "family": self.family, "module": self.module}

    @cached_property
    def code(self) -> ModuleType:
        """The method's module, imported now."""
        return importlib.import_module(self.module)

    @property
    def summary(self) -> str:
        """The first line of its module's docstring, read without importing it."""
        return (ast.get_docstring(self._tree) or "").partition("\n")[0]

    @property
    def experimental(self) -> str | None:
        """Why it does not count as proven: its module's ``EXPERIMENTAL``, read without importing it."""
        for node in self._tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id="EXPERIMENTAL")], value=ast.Constant(value=str(why))):
                    return why
        return None

    @cached_property
    def _tree(self) -> ast.Module:
        spec = importlib.util.find_spec(self.module)
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else "")

    @property
    def needs(self) -> Needs:
        """What it needs of specialists and base (ways back only)."""
        needs: Needs = self.code.NEEDS
        return needs

    def needs_with(self, arguments: Mapping[str, Any]) -> Needs:
        """What it needs with these arguments: some of them let more cross (``needs_with`` of the module)."""
        more: Callable[[Mapping[str, Any]], Needs] | None = getattr(self.code, "needs_with", None)
        return more(arguments) if more else self.needs

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """Its functions: shrink, or contribute and absorb."""
        names = ["shrink"] if self.family == "shrink" else ["contribute", "absorb"]
        return [getattr(self.code, name) for name in names]

    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """(type, default) by name: the keyword-only arguments of its functions."""
        found: dict[str, tuple[Any, Any]] = {}
        for function in self.functions:
            hints = get_type_hints(function, include_extras=True)
            for p in inspect.signature(function).parameters.values():
                if p.kind is p.KEYWORD_ONLY:
                    found[p.name] = (hints[p.name], p.default)
        return found

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with their types right and defaults filled in. Raises UsageError that names the wrong one."""
        from pydantic import ConfigDict, TypeAdapter, ValidationError

        known = self.parameters()
        for name in arguments:
            if name not in known:
                raise UsageError(
                    "unknown-parameter", f"{self.name} has no parameter {name!r}", allowed=list(known) or "none",
                    got=name, remedy=suggestion(name, known),
                )  # fmt: skip
        result = {}
        for name, (kind, default) in known.items():
            value = arguments.get(name, default)
            if is_dataclass(default) and isinstance(value, Mapping):
                value = {**vars(default), **value}
            try:
                # A frozen dataclass such as Train carries its own configuration
                config = None if is_dataclass(kind) else ConfigDict(strict=True)
                result[name] = TypeAdapter(kind, config=config).validate_python(value)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, (name, *first["loc"])))
                raise UsageError(
                    "bad-parameter", f"{self.name}: {where}", allowed=f"{kind} ({first['msg']})", got=value,
                    remedy=f"see `fanbu methods show {self.name}`",
                ) from None  # fmt: skip
            if isinstance(result[name], float) and not math.isfinite(result[name]):
                raise UsageError(
                    "bad-parameter",
                    f"{self.name}: {name}",
                    allowed="a finite number",
                    got=value,
                    remedy="give a number",
                )
        return result

    # The laws that hold for every method, whatever its own code does

    def shrink(self, parent: Model, domain: Domain, out: Path, context: Context, **arguments: Any) -> Model:
        """One step down, with checked arguments."""
        made: Model = self.code.shrink(parent, domain, out, context, **self.check(arguments))
        return made

    def contribute(self, specialist: Specialist, base: Model, context: Context, **arguments: Any) -> Contribution:
        """What the specialist sends, with checked arguments."""
        self._check_fit(specialist, context)
        sent: Contribution = self.code.contribute(specialist, base, context, **self.own("contribute", arguments))
        return sent

    def absorb(
        self, base: Model, contributions: Sequence[Contribution], out: Path, context: Context, **arguments: Any
    ) -> Model:
        """The new large model. Contributions are taken in the order of their domains (and digests, where a domain
        sent several); none gives the base back."""
        from fanbu.model import copy_model

        checked = self.own("absorb", arguments)
        for c in contributions:
            if c.kind != self.needs.kind:
                raise FitError(
                    "other-kind", f"{self.name} cannot take what {c.domain} sent", allowed=self.needs.kind, got=c.kind,
                    remedy=f"send it with `contribute` of {self.name}",
                )  # fmt: skip
        if not contributions:
            return copy_model(base, out)
        several = len({c.domain for c in contributions}) < len(contributions)  # digests of large ones take a while
        ordered = sorted(contributions, key=lambda c: (c.domain, c.digest if several else ""))
        try:
            made: Model = self.code.absorb(base, ordered, out, context, **checked)
        except KeyError as error:
            raise IntegrityError(
                "contribution-broken",
                f"a contribution to {self.name} lacks {error}",
                remedy="ask its owner to send it again",
            ) from error
        return made

    def own(self, function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The checked arguments that one of its functions takes."""
        own = inspect.signature(getattr(self.code, function)).parameters
        return {k: v for k, v in self.check(arguments).items() if k in own}

    def _check_fit(self, specialist: Specialist, context: Context) -> None:
        task = specialist.domain.task
        if task not in self.needs.tasks:
            raise FitError(
                "other-task",
                f"{self.name} does not know {task}",
                allowed=self.needs.tasks,
                got=task,
                remedy="take another way",
            )
        if self.needs.probe and not context.probe.rows:
            raise FitError(
                "no-probe-set", f"{self.name} needs a probe set: texts that specialists are asked about",
                remedy="name one in the recipe under `probe`: from domains that share texts, or a public file",
            )  # fmt: skip


@cache
def methods() -> tuple[Method, ...]:
    """All methods. A name is one way down and one way back at most."""
    root = Path(__file__).parent
    found: dict[tuple[str, bool], Method] = {}
    for path in sorted([*root.glob("shrink/*.py"), *root.glob("feedback/*/*.py")]):
        if not path.stem.startswith("_"):
            module = ".".join(("fanbu", *path.relative_to(root).with_suffix("").parts))
            found[path.stem, path.parent.name == "shrink"] = Method(path.stem, path.parent.name, module)
    for point in entry_points(group="fanbu.methods"):
        code = point.load()
        family = "shrink" if hasattr(code, "shrink") else code.NEEDS.kind
        if (point.name, family == "shrink") in found:
            raise UsageError(
                "method-twice", f"two packages bring a method {point.name!r}", got=point.value,
                remedy="uninstall one of them",
            )  # fmt: skip
        found[point.name, family == "shrink"] = Method(point.name, family, code.__name__)
    return tuple(found.values())


def method(name: str, way: str | None = None) -> Method:
    """A method by name; ``way`` (``shrink`` or ``feedback``) says what it must be, where the name alone does not."""
    known = [m for m in methods() if way is None or (m.family == "shrink") == (way == "shrink")]
    found = [m for m in known if m.name == name]
    if not found:
        names = dict.fromkeys(m.name for m in known)
        raise UsageError(
            "unknown-method", f"no {way or 'method'} method {name!r}", allowed=list(names), got=name,
            remedy=suggestion(name, names),
        )  # fmt: skip
    if len(found) > 1:
        raise UsageError(
            "which-way", f"{name!r} is a way down and a way back", allowed=["shrink", "feedback"], got=None,
            remedy="say which of the two",
        )  # fmt: skip
    return found[0]


def suggestion(name: str, known: Mapping[str, Any]) -> str:
    """``did you mean`` with the nearest name, or where to look."""
    from difflib import get_close_matches

    near = get_close_matches(str(name), list(known), 1, 0.6)
    return f"did you mean {near[0]!r}?" if near else "take one of the allowed names"
