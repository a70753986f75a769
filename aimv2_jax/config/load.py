"""Loads an experiment file with its overrides as a checked `Config`, and turns a config back into plain values."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_collections

from aimv2_jax.config.schema import Config
from aimv2_jax.config.validate import validate
from aimv2_jax.errors import UserError

# Values outside this range would become zero or infinity on the devices.
_FLOAT32_TINY = 2.0**-126
_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127

_LISTED_RUNS = 8

# Config keys of earlier commits -> their current names.
_RENAMED = {
    "eval.kinds": "caption_types",
    "guard.recompute_every": "sdc_check_every",
    "guard.recompute_elsewhere": "sdc_rotate_devices",
    "init.drop": "ignore",
    "init.fresh": "reinit",
    "model.decoder.keep_rows": "token_keep_rate",
}


class _FlagText(str):
    """A value as typed on the command line; the type of its key decides how it is parsed."""


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Loads `path` (a file with `get_config()`), applies `(dotted key, text)` overrides, and checks every value.

    A file of several runs lists them in `RUNS`; `path` is then FILE:RUN, and the run is the argument of `get_config`.

    Raises:
      UserError: for a missing file, an unknown key, a value of the wrong type, or an invalid value.
    """
    tree = _read_experiment(*split_run(path))
    for key, text in overrides:
        _set_key(tree, key, _FlagText(text))
    return build_config(tree)


def split_run(path: str | Path) -> tuple[Path, str]:
    """Splits FILE.py:RUN; the run is empty where none is named."""
    file, _, run = str(path).rpartition(":")
    return (Path(file), run) if file.endswith(".py") else (Path(path), "")


def build_config(tree: Mapping[str, Any]) -> Config:
    """Turns a nested mapping into a checked `Config`; raises `UserError` with key, value and remedy."""
    config = _build(Config, tree, "")
    validate(config)
    if config.cooldown is None:
        return config
    steps = config.cooldown.start + config.cooldown.steps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists and numbers; the inverse of `build_config`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_digest(config: Config) -> str:
    """Eight hexadecimal digits that identify a resolved config."""
    return hashlib.sha256(config_text(config).encode()).hexdigest()[:8]


def config_text(config: Config) -> str:
    """The resolved config as `dotted.key = value` lines, for logs, golden files and diffs."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config_to_dict(config)).items())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_experiment(path: Path, run: str) -> dict[str, Any]:
    if not path.is_file():
        remedy = _new_spelling(path) or "Give an experiment such as experiments/quickstart.py"
        raise UserError("--config: no such file", str(path), remedy)
    # Experiments import each other with `from experiments import base`: the folder above `experiments` must be on
    # sys.path, also for an experiment in a subfolder.
    folders = path.resolve().parents
    root = str(next((folder for folder in folders if folder.name == "experiments"), folders[0]).parent)
    added = root not in sys.path
    if added:
        sys.path.insert(0, root)
    try:
        spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError("--config: not a Python file", str(path), "Give a .py file that defines get_config()")
        module = importlib.util.module_from_spec(spec)
        with _experiment_errors(path):
            spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                "--config: the file has no get_config()", str(path), "Define get_config() -> ConfigDict in it"
            )
        runs = getattr(module, "RUNS", None)
        if runs is not None and run not in runs:
            raise UserError(
                "--config: no such run of the file", run, f"Give {path}:RUN, where RUN is {_runs(run, runs)}"
            )
        with _experiment_errors(path):
            config = module.get_config(run) if run else module.get_config()
    finally:
        if added:
            sys.path.remove(root)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            "--config: get_config() must return an ml_collections.ConfigDict",
            type(config).__name__,
            "Start from experiments/base.py",
        )
    return config.to_dict()


def _runs(wanted: str, runs: Sequence[str]) -> str:
    """The names of runs in an error message: the first ones, after those that are like `wanted`."""
    like = difflib.get_close_matches(wanted, runs, n=3)
    names = [*like, *(run for run in runs if run not in like)]
    return f"one of {' '.join(names[:_LISTED_RUNS])}" + (f" (of {len(runs)})" if len(runs) > _LISTED_RUNS else "")


def _new_spelling(path: Path) -> str | None:
    """The remedy for an experiment that had its own file before it became a run of a family's file."""
    file, run = Path(f"{path.parent}.py"), path.stem  # ablations/, comparison/ and stages/
    if old := re.fullmatch(r"(pretrain|highres|native)_(?:(\d+)_)?(\w+?)(?:_224)?", path.stem):
        family, pixels, size = old.groups()
        file, run = path.with_name(f"{family}.py"), f"{size},{pixels}" if pixels else size
    return f"It is {file}:{run} now" if file.is_file() else None


@contextlib.contextmanager
def _experiment_errors(path: Path) -> Iterator[None]:
    """Raises any error in an experiment file as a UserError with its line number."""
    try:
        yield
    except SyntaxError as error:
        location = f"{error.filename or path}:{error.lineno or 1}"
        raise UserError("--config: not valid Python", location, f"Fix it: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        location = f"{path}:{lines[-1]}" if lines else str(path)
        message = str(error).strip().partition("\n")[0]
        raise UserError("--config: the file fails", location, f"Fix it: {type(error).__name__}: {message}") from error


def _set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError("unknown config key", dotted, f"{parent} holds a value, not keys")
        tree = child
    tree[leaf] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"config {prefix.rstrip('.')} must hold keys", _plain(tree), "Set the keys below it one by one")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise UserError("unknown config key", f"{prefix}{key}", _remedy_for(prefix, str(key), hints))
    missing = [key for key in hints if key not in tree]
    if missing:
        raise UserError("config key missing", f"{prefix}{missing[0]}", "Start from experiments/base.py, which sets it")
    return cls(**{key: _convert(hint, tree[key], f"{prefix}{key}") for key, hint in hints.items()})


def _remedy_for(prefix: str, key: str, known: Mapping[str, Any]) -> str:
    """The remedy for an unknown key: its new name if it was renamed, or a similar key."""
    if name := _RENAMED.get(f"{prefix}{key}"):
        return f"It is called {prefix}{name} now"
    matches = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {prefix}{matches[0]}" if matches else f"Known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Converts `value` to the type `hint`; raises a UserError with `key`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # Unions in the config are always `X | None`.
        if value is None or (isinstance(value, _FlagText) and value.lower() == "none"):
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, key)
    if isinstance(value, _FlagText) and hint is not str and origin is not Literal:
        value = _literal(value)
    if origin is Literal:
        if str(value) in args:
            return str(value)
        raise UserError(f"config {key} has an unknown value", _plain(value), f"Choose one of {', '.join(args)}")
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(_convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(inner, value)))
        raise UserError(f"config {key} has the wrong length", _plain(value), f"Give {len(inner)} values")
    # The origin of Mapping[...] is collections.abc.Mapping.
    if origin is Mapping and isinstance(value, Mapping):
        return {str(name): _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**31:  # Devices count in int32.
            return value
        raise UserError(f"config {key} is out of range", value, "Give a whole number below 2147483648")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == 0 or _FLOAT32_TINY <= abs(value) <= _FLOAT32_MAX:
            return float(value)
        raise UserError(f"config {key} must be finite in float32", value, "Give 0 or a magnitude from 1e-37 to 1e38")
    if hint is str and isinstance(value, str):
        return str(value)
    raise UserError(f"config {key} has the wrong type", _plain(value), f"Give {_type_name(hint)}")


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # The errors listed in its documentation.
        return str(text)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, _FlagText) else value


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    return "a list of values, as (a, b)" if typing.get_origin(hint) is tuple else "keys with values"
