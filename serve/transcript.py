"""A conversation as a file: to read (.md), or as a record to train from (.jsonl)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.session import Turn
from vlm.errors import ConfigError


def save(turns: Sequence[Turn], path: Path) -> int:
    """Write the turns that have an answer to a new file.

    Args:
        turns: of one conversation.
        path: ending in .md, or in .jsonl for a record as `vlm train` reads it.

    Returns:
        How many turns were written.

    Raises:
        ConfigError: the ending is another, there is no answer yet, or the file exists or
            cannot be written.
    """
    said = [turn for turn in turns if turn.answered]
    if not said:
        raise ConfigError("there is no answer to save yet; ask something first")
    writers = {".md": _markdown, ".jsonl": _record}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise ConfigError(f"{path} ends in neither .md nor .jsonl; choose one of them")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(write(said, path.stem))
    except FileExistsError as error:
        raise ConfigError(f"{path} exists; choose another name") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from error
    return len(said)


def _markdown(turns: Sequence[Turn], name: str) -> str:
    blocks = [f"# {name}"]
    for turn in turns:
        blocks += [f"![{Path(picture).name}](<{_place(picture)}>)" for picture in turn.pictures]
        blocks += [f"**{turn.question.strip()}**", turn.answer.strip()]
    return "\n\n".join(blocks) + "\n"


def _record(turns: Sequence[Turn], name: str) -> str:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        shown: list[dict[str, str]] = [{"type": "image"} for _ in turn.pictures]
        asked = [*shown, {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": asked})
        told = [{"type": "text", "text": turn.answer}]
        messages.append({"role": "assistant", "content": told})
    images = [_place(picture) for turn in turns for picture in turn.pictures]
    row = {"id": name, "images": images, "messages": messages, "source": "chat"}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _place(picture: str) -> str:
    return str(Path(picture).resolve())
