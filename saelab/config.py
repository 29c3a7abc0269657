"""TOML and JSON to frozen dataclasses and back. Strict: an unknown key or a wrong type is an error that names the cure.

A config class is a frozen dataclass. Its fields are bool, int, float, str, Path, None, Literal, tuples of these, dicts
with str keys, other config classes, or a union of config classes told apart by their ``arch`` (a ``ClassVar[str]``).
The docstring under a field becomes the comment in the TOML that ``to_toml`` prints.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from saelab.errors import ConfigError, nearest

C = TypeVar("C")


def load(cls: type[C], path: Path | None = None, overrides: Sequence[str] = (), **flags: Any) -> C:
    """The config of class ``cls`` from what ``merge`` collects.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, or a value that the class refuses.
    """
    return from_mapping(cls, merge(path, overrides, **flags))


def merge(path: Path | None = None, overrides: Sequence[str] = (), **flags: Any) -> dict[str, Any]:
    """Settings from a TOML or JSON file, changed by ``--set`` overrides and by command-line flags; later sources win.

    ``overrides`` are strings such as ``"optim.lr=3e-4"``. ``flags`` whose value is None were not given; a double
    underscore in a flag's name stands for a dot.
    """
    mapping = read_mapping(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set needs key=value, got {override!r}; write for example --set optim.lr=3e-4")
        _assign(mapping, key.strip().split("."), _value_of(text.strip()))
    for name, value in flags.items():
        if value is not None:
            _assign(mapping, name.split("__"), value)
    return mapping


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON file.

    Raises:
        ConfigError: the file is missing, is not UTF-8, does not parse, or holds no table.
    """
    try:
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; --print-config writes one to start from") from None
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not readable as {path.suffix or 'TOML'}: {error}; correct the file") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a TOML or JSON file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a table of settings, not {content!r}; --print-config writes one")
    return content


def from_mapping(cls: type[C], mapping: Mapping[str, Any], where: str = "") -> C:
    """Build ``cls`` from plain data, checking every key and type.

    Raises:
        ConfigError: names the key (with ``where`` in front of it) and the nearest known one.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise ConfigError(f"{where}{key} is not a setting of {cls.__name__}; {nearest(key, fields)}")
        values[key] = _convert(hints[key], value, where + key)
    required = [name for name, f in fields.items() if name not in values and _has_no_default(f)]
    if required:
        raise ConfigError(
            f"{where}{required[0]} must be set; give it in the config file or with --set {where}{required[0]}=..."
        )
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain data, every default written out, that ``from_mapping`` turns back into an equal config."""
    mapping = {}
    if hasattr(type(config), "arch"):
        mapping["arch"] = type(config).arch
    for field in dataclasses.fields(config):
        mapping[field.name] = _plain(getattr(config, field.name))
    return mapping


def to_toml(config: Any) -> str:
    """A commented TOML file that reads back to ``config``; settings that are off (None) stand commented out."""
    return "\n".join(_toml_lines(config, ())).strip() + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a config class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = inspect.cleandoc(following.value.value)  # type: ignore[union-attr, attr-defined]
    return docs


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; the inverse of ``merged({}, ...)``."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def merged(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``mapping`` with ``changes`` put in, whose names may be dotted or nested; nothing is shared with ``mapping``."""
    result: dict[str, Any] = {}
    for name, value in [*flattened(mapping).items(), *flattened(changes).items()]:
        _assign(result, name.split("."), value)
    return result


def _assign(mapping: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        mapping = mapping.setdefault(key, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"{'.'.join(keys)} cannot be set, because {key} is a single value; set {key} itself")
    mapping[keys[-1]] = value


def _value_of(text: str) -> Any:
    """A TOML value; a bare word is a string, so that ``--set sae.arch=topk`` needs no quotes; ``none`` is off."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` as ``hint`` wants it, or a ConfigError that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, name)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{name} must be one of {', '.join(map(repr, args))}, got {value!r}; "
                f"{nearest(str(value), map(str, args))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, got {value!r}; write for example {name} = [...]")
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) != len(value):
            raise ConfigError(f"{name} must have {len(items)} entries, got {len(value)}; write {len(items)} of them")
        return tuple(_convert(item, v, f"{name}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{name} must be a table, got {value!r}; write [{name}] and its keys below")
        return {key: _convert(args[1], v, f"{name}.{key}") for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _convert_config(hint, value, name)
    return _convert_scalar(hint, value, name)


def _convert_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, name)
    by_arch = {option.arch: option for option in options}
    if not isinstance(value, Mapping) or "arch" not in value:
        raise ConfigError(f"{name}.arch must be set; it is one of {', '.join(sorted(by_arch))}")
    if value["arch"] not in by_arch:
        raise ConfigError(f"{name}.arch {value['arch']!r} is unknown; {nearest(str(value['arch']), by_arch)}")
    return _convert_config(by_arch[value["arch"]], value, name)


def _convert_config(cls: Any, value: Any, name: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a table of settings, got {value!r}; write [{name}] and its keys below")
    rest = dict(value)
    arch = rest.pop("arch", None)
    if arch is not None and arch != getattr(cls, "arch", None):
        raise ConfigError(
            f"{name}.arch is {arch!r}, but these settings are for "
            f"{getattr(cls, 'arch', cls.__name__)!r}; make them agree"
        )
    return from_mapping(cls, rest, where=f"{name}.")


def _convert_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {hint.__name__}, got {value!r}; correct the value")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _toml_lines(config: Any, path: tuple[str, ...]) -> list[str]:
    docs, tables = field_docs(type(config)), []
    lines = [f'arch = "{type(config).arch}"'] if hasattr(type(config), "arch") else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tables.append((field.name, value))
            continue
        lines += [f"# {line}" for line in docs.get(field.name, "").splitlines()]
        lines.append(f"# {field.name} =" if value is None else f"{field.name} = {_toml_value(_plain(value))}")
    for name, table in tables:
        inner = (*path, name)
        lines += [
            "",
            *(f"# {line}" for line in docs.get(name, "").splitlines()),
            f"[{'.'.join(inner)}]",
            *_toml_lines(table, inner),
        ]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):  # null stands for what is off, and TOML leaves that out
        pairs = [f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None]
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value, ensure_ascii=False)  # JSON's strings, numbers and booleans are TOML's
