"""Checks of single values of a config, which raise `UserError` with the key, the value and a remedy."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError


def at_least(config: Config, low: float, *keys: str) -> None:
    check_each(config, keys, lambda number: number >= low, f"Give at least {low}", "is too small")


def positive(config: Config, *keys: str) -> None:
    check_each(config, keys, lambda number: number > 0, "Give a positive number", "must be above zero")


def check_each(
    config: Config,
    keys: Sequence[str],
    accepts: Callable[[float], bool],
    remedy: str,
    problem: str = "is out of range",
) -> None:
    """Raises UserError for the first number under the dotted `keys` that `accepts` rejects."""
    for key in keys:
        for name, number in _numbers(key, operator.attrgetter(key)(config)):
            require(accepts(number), f"{name} {problem}", number, remedy)


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yields each number in `value` with its dotted key; None yields nothing."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(f"{key}.{name}", item)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _numbers(f"{key}[{i}]", item)
    elif value is not None:
        yield key, value


def require(condition: object, problem: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"config {problem}", value, remedy)


def check_multiple(key: str, size: int, patch_size: int) -> None:
    require(
        size >= 1 and size % patch_size == 0,
        f"{key} is not a multiple of model.patch_size",
        f"{size} px, patches of {patch_size}",
        f"Use for example {max(2, round(size / patch_size)) * patch_size}",
    )
