"""The keys of a recipe for people: ``python -m trainer.train --help``."""

from __future__ import annotations

from collections.abc import Collection

from trainer.core.settings import Settings, as_list, sections, tag_of


def describe(cls: type[Settings], prefix: str = "", leave_out: Collection[str] = ()) -> str:
    """Every key with its type, default and docstring, a line each: the body of ``--help``. What all variants of a
    section share stands before them, once."""
    lines = []
    for key, field in cls.model_fields.items():
        if key in leave_out:
            continue
        nested = list(sections(field.annotation))
        text = " ".join((field.description or "").split())
        if not nested:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"  {prefix + key + ' = ' + default:<44} {text}")
            continue
        listed = "list[" in str(field.annotation)
        if listed:
            first = next(iter(nested[0].model_fields))
            text += f" A list: {as_list(prefix + key, {first: first.upper()})}"
        lines.append(f"\n{prefix + key}: {text}" if text else f"\n{prefix + key}:")
        inside = f"{prefix}{key}[]." if listed else f"{prefix}{key}."
        if len(nested) == 1:
            lines.append(describe(nested[0], inside))
            continue
        shared = _shared(nested)
        if shared:
            lines.append(describe(nested[0], inside, leave_out=nested[0].model_fields.keys() - shared))
        for variant in nested:
            about = " ".join((variant.__doc__ or "").split("\n\n")[0].split())
            default = " (default)" if type(field.default) is variant else ""
            lines.append(f"  -- {tag_of(variant)}{default}: {about}")
            own = describe(variant, inside, leave_out={"name", *shared})
            lines += [own] if own else []
    return "\n".join(lines)


def _shared(variants: list[type[Settings]]) -> set[str]:
    """Keys that mean the same in all variants of a section."""
    first, *others = (variant.model_fields for variant in variants)
    return {key for key, field in first.items() if all(repr(other.get(key)) == repr(field) for other in others)}
