"""Settings in a YAML file: strict keys, and errors that name the nearest known one."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm.errors import ConfigError


class Strict(BaseModel):
    """A section of a file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file.

    Raises:
        ConfigError: it cannot be read, or holds anything else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value pairs, it holds {type(values).__name__}")
    return values


def explain(title: str, error: ValidationError, sections: Mapping[str, type[Strict]]) -> str:
    """What is wrong with a file, on one line.

    Args:
        title: what the file is called.
        error: of the outermost section.
        sections: each section by the keys that lead to it, joined and ended by dots.
    """
    parts = []
    for item in error.errors():
        where = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            keys = ".".join(str(step) for step in item["loc"] if not isinstance(step, int))
            near = _nearest(keys, sections)
            parts.append(f"unknown key {where!r}{f'; did you mean {near!r}?' if near else ''}")
        elif item["type"] == "missing":
            parts.append(f"key {where!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{where}: {message} (got {item['input']!r})" if where else message)
    return f"{title}: {'; '.join(parts)}"


def _nearest(key: str, sections: Mapping[str, type[Strict]]) -> str | None:
    """The known key that is spelt most like this one, or has its name elsewhere."""
    known = [prefix + name for prefix, model in sections.items() for name in model.model_fields]
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    return next(iter(difflib.get_close_matches(key, known, 1) or same_name), None)
