"""For the reference: a default that is a named constant is shown as its number."""

import ast
from typing import Any

import griffe


class Numbers(griffe.Extension):
    """Puts the value of a constant of the package in place of its name in every signature."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """After the package and what it imports is known."""
        _resolve(pkg, loader.modules_collection, set())


def _resolve(owner: griffe.Object | griffe.Alias, known: Any, seen: set[str]) -> None:
    for member in owner.members.values():
        if member.is_alias or member.path in seen:
            continue
        seen.add(member.path)
        if isinstance(member, griffe.Function):
            for parameter in member.parameters:
                if isinstance(parameter.default, griffe.ExprName):
                    parameter.default = _number(parameter.default, known)
        elif isinstance(member, (griffe.Class, griffe.Module)):
            _resolve(member, known, seen)


def _number(name: griffe.ExprName, known: Any) -> griffe.ExprName | str:
    """The literal that the constant is, or its name where it is something else."""
    try:
        constant = known[name.canonical_path]
        constant = constant.final_target if constant.is_alias else constant
        text = str(constant.value)
        ast.literal_eval(text)
    except (griffe.AliasResolutionError, griffe.NameResolutionError, AttributeError, KeyError, ValueError, SyntaxError):
        return name
    return text
