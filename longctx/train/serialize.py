"""Frozen dataclasses to JSON values and back, driven by their annotations."""

import dataclasses
import types
import typing
from typing import Any, Literal, Union

# Names the class of an object; a keyword, which no field can be called.
KIND = "class"


def to_json(value: Any) -> Any:
    """`value` (dataclasses, tuples, str, int, float, bool, None) as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {KIND: type(value).__name__} | fields
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    return value


def from_json(annotation: Any, value: Any, where: str = "") -> Any:
    """The inverse of `to_json`, for a value of the type `annotation`.

    Raises:
      ValueError: the value does not fit; the message names the field as `where`.
    """
    if isinstance(annotation, typing.TypeAliasType):
        annotation = annotation.__value__
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _from_union(options, value, where)
    if dataclasses.is_dataclass(annotation):
        return _from_fields(annotation, value, where)
    if origin is tuple:
        return _from_tuple(options, value, where)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{where}={value!r} must be one of {options}")
        return value
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in (None, type(None)):
        annotation = type(None)
    if annotation not in (str, int, float, bool, type(None)):
        raise TypeError(f"{where}: configuration fields cannot have the type {annotation}")
    if type(value) is not annotation:
        raise ValueError(f"{where}={value!r} must be of type {annotation.__name__}")
    return value


def _from_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, dict):
        for option in options:
            if dataclasses.is_dataclass(option) and option.__name__ == value.get(KIND):
                return from_json(option, value, where)
    for option in options:
        if not dataclasses.is_dataclass(option):
            try:
                return from_json(option, value, where)
            except ValueError:
                continue
    raise ValueError(f"{where}={value!r} fits none of {options}")


def _from_tuple(options: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}={value!r} must be a list")
    if len(options) == 2 and options[1] is Ellipsis:
        options = (options[0],) * len(value)
    if len(options) != len(value):
        raise ValueError(f"{where}={value!r} must have {len(options)} entries")
    return tuple(
        from_json(o, v, f"{where}[{i}]")
        for i, (o, v) in enumerate(zip(options, value, strict=True))
    )


def _from_fields(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}={value!r} must be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {name: v for name, v in value.items() if name != KIND}
    for name in given.keys() - fields.keys():
        raise ValueError(f"{_join(where, name)}: {cls.__name__} has no such field")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in given and not optional:
            raise ValueError(f"{_join(where, name)} is missing")
    return cls(**{n: from_json(hints[n], v, _join(where, n)) for n, v in given.items()})


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
