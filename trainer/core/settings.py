"""Typed settings: a YAML section is a frozen class, defined beside the component that it configures.

    class OptimSettings(Settings):
        beta2: float = 0.95
        "Second-moment decay; SigLIP (arXiv 2303.15343, section 4.6) needs 0.95 at large batch."

Attribute docstrings become ``--help``. Unknown keys are errors with their dotted path and the nearest known name.
Variants of a section are chosen by its ``name:`` (a discriminated union is the registry).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trainer.core.logs import EVERY_NODE
from trainer.core.shipped import shipped
from trainer.core.types import UserError

logger = logging.getLogger(__name__)


OPERATIONAL = "operational"
"""Marks a key or section (``Annotated[int, OPERATIONAL]``) that changes what a run costs, keeps or prints, but not what
it learns."""


class Settings(BaseModel):
    """Base of every section: frozen, documented by attribute docstrings, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    renamed: ClassVar[dict[str, str | dict[str, str]]] = {}
    """Old names that still work for one release: a key, or ``{"key": {old value: new value}}``."""

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not any(key in tree for key in cls.renamed):
            return tree
        result: dict[str, Any] = {}
        for key, value in tree.items():
            new = cls.renamed.get(key)
            if isinstance(new, str) and new not in tree:
                warn_renamed(f"{key} is now called {new}")
                key, new = new, cls.renamed.get(new)
            if isinstance(new, dict) and isinstance(value, str) and value in new:
                warn_renamed(f"{key}: {value} is now called {new[value]}")
                value = new[value]
            result[key] = value
        return result

    @model_validator(mode="before")
    @classmethod
    def _default_variants(cls, tree: Any) -> Any:
        """A section with variants but without ``name:`` is the default variant."""
        if not isinstance(tree, dict):
            return tree
        named = {
            key: getattr(field.default, "name", None) for key, field in cls.model_fields.items() if field.discriminator
        }
        return tree | {
            key: {"name": name, **tree[key]}
            for key, name in named.items()
            if name is not None and isinstance(tree.get(key), dict)
        }


@cache
def warn_renamed(text: str) -> None:
    """Warns of the old name of a setting, once per process and on one rank of each node."""
    logger.warning("%s; the old name will be removed in the next release", text, extra=EVERY_NODE)


KIND = re.compile(r"str|int|constrained-int|float|bool|(list|literal|function-\w+)\[.*\]")
"""Path elements that pydantic adds for the type of a value."""
S = TypeVar("S", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a recipe in it, such as {path / 'recipe.yaml'}")
    if not path.is_file():
        folder = shipped("recipes")
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{path}: no such recipe; RingLIP ships {names}, in {folder}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: a recipe is a mapping of sections, but this file is a {type(tree).__name__}")
    return tree or {}


def override(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``section.key=value`` assignments applied; values are parsed as YAML."""
    result = _copy(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"{assignment!r}: write an override as section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{path}: {text!r} is not readable as YAML") from error
        *parents, key = path.split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if isinstance(child, list):
                start = path[: path.index(f"{parent}.") + len(parent)]
                raise UserError(f"{path}: {start!r} is a list; give all of it: {as_list(start, {key: value})}")
            if not isinstance(child, dict):
                raise UserError(f"{path}: {parent!r} is a value, not a section")
            node = child
        node[key] = value
    return result


def as_list(path: str, item: dict[str, Any]) -> str:
    """The override for a list of one section."""
    return (
        f"{path}={shlex.quote(yaml.safe_dump([item], default_flow_style=True, width=1000, allow_unicode=True).strip())}"
    )


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def parse(cls: type[S], tree: dict[str, Any], source: str) -> S:
    """``tree`` as a ``cls``; raises UserError with one line per mistake, naming ``source`` and the dotted key."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [f"{source}: {line}" for line in _lines(cls, error.errors(include_url=False))]
        raise UserError("\n".join(lines)) from None


def _lines(cls: type[Settings], items: list[Any]) -> list[str]:
    """One line per mistake. For a value of several possible types (``str | list``) pydantic reports an error for each
    type."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for item in items:
        kinds = [place for place, part in enumerate(item["loc"]) if KIND.fullmatch(str(part))]
        groups.setdefault(item["loc"][: kinds[0]] if kinds else item["loc"], []).append(item)
    lines = []
    for where, group in groups.items():
        inside = [
            item for item in group if len(item["loc"]) > len(where) + 1
        ]  # the type that was meant: it fits except for these
        if inside or len(group) == 1:
            lines += [_explain(cls, item) for item in inside or group]
        else:
            lines.append("; or ".join([_explain(cls, group[0]), *(item["msg"] for item in group[1:])]))
    return lines


def _explain(cls: type[Settings], item: Any) -> str:
    # pydantic puts the tag of a union into the path: remove what the user did not write.
    path, known = _follow(cls, item["loc"])
    dotted = ".".join(path)
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {dotted!r}; {hint}"
    if item["type"] == "missing":
        return f"{dotted!r} is required"
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        close = difflib.get_close_matches(
            str(context["tag"]), context["expected_tags"].replace("'", "").split(", "), n=1
        )
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{dotted + '.name'!r} is {context['tag']!r}, known: {context['expected_tags']}{hint}"
    if item["type"] == "union_tag_not_found":
        return f"{dotted + '.name'!r} is required: it chooses the variant"
    if item["type"] == "list_type" and isinstance(item["input"], dict):
        return f"{dotted!r} is a list: write {as_list(dotted, item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    if not dotted:
        return message
    got = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
    return f"{dotted!r}: {message}{got}"


def _follow(cls: type[Settings], loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The path as the user wrote it, and the known keys of its last section."""
    path: list[str] = []
    variants: list[type[Settings]] = [cls]
    known: list[str] = list(cls.model_fields)
    for part in loc:
        if KIND.fullmatch(str(part)):
            continue
        tagged = [
            v for v in variants if "name" in v.model_fields and part in get_args(v.model_fields["name"].annotation)
        ]
        if tagged and len(variants) > 1:
            variants, known = tagged, list(tagged[0].model_fields)
            continue
        path.append(str(part))
        known = sorted({key for variant in variants for key in variant.model_fields}) or known
        found = [v.model_fields[part].annotation for v in variants if part in v.model_fields]
        if found:
            variants = list(sections(found[0]))
    return path, known


def sections(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes inside a field's annotation: itself, the variants of a union, the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        for argument in get_args(annotation):
            yield from sections(argument)


def changes(cls: type[Settings], before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "loss.name sigmoid -> softmax" for every key that differs between two dumps of ``cls`` and is not
    OPERATIONAL."""
    return [f"{key} {old} -> {new}" for key, old, new, operational in differences(cls, before, now) if not operational]


def differences(
    cls: type[Settings], before: dict[str, Any], now: dict[str, Any], prefix: str = "", operational: bool = False
) -> Iterator[tuple[str, Any, Any, bool]]:
    """(dotted key, value in ``before``, value in ``now``, whether it is operational) of each difference between two
    dumps of ``cls``; an absent key has the value None."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        field = cls.model_fields.get(key)
        cost = operational or (field is not None and OPERATIONAL in field.metadata)
        nested = list(sections(field.annotation)) if field is not None else []
        if isinstance(old, dict) and isinstance(new, dict):
            tagged = [variant for variant in nested if tag_of(variant) == f"name: {new.get('name')}"]
            yield from differences((tagged or nested or [Settings])[0], old, new, f"{prefix}{key}.", cost)
        else:
            yield f"{prefix}{key}", old, new, cost


def tag_of(variant: type[Settings]) -> str:
    """What chooses a variant: ``name: sigmoid``."""
    field = variant.model_fields.get("name")
    tags = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return f"name: {tags[0]}" if tags else variant.__name__


def check_out(out: Path | None) -> None:
    """Raises UserError if ``--out`` cannot be written, before the work begins; creates its folder."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be created ({error.strerror}); choose another") from None
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} cannot be written to; choose another")
