"""Checks of single settings, told by their names."""

import math

from vlm.errors import ConfigError

MAX_STOP_STRINGS = 8
MAX_STOP_LENGTH = 1000


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise ConfigError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


def checked_stop_strings(given: object) -> tuple[str, ...]:
    """As a tuple; raises ConfigError unless they are few, of sane length and not empty."""
    way_out = "give a string, or a list of up to 8 that are not empty"
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list | tuple):
        raise ConfigError(f"stop_strings is {given!r}, which is no list of strings; {way_out}")
    if len(strings) > MAX_STOP_STRINGS:
        raise ConfigError(f"stop_strings has {len(strings)} strings; {way_out}")
    for each in strings:
        if not isinstance(each, str) or not each:
            raise ConfigError(f"stop_strings has {each!r} in it; {way_out}")
        if len(each) > MAX_STOP_LENGTH:
            raise ConfigError(f"stop_strings: {len(each)} characters; at most {MAX_STOP_LENGTH}")
    return tuple(strings)
