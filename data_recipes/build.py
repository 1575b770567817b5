"""Build a public data set: pictures, records.jsonl, missing.jsonl and counts.json."""

import json
import shutil
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path, PurePosixPath

from data_recipes.download import fetch, require
from data_recipes.recipe import Pictures, Recipe
from data_recipes.recipes import recipe
from vlm.errors import ConfigError, RecordError
from vlm.messages import ImagePart, Record, TextPart


def build(
    name: str,
    out: Path,
    from_dir: Path | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``out/records.jsonl``, which appears last, and the pictures below ``out/images``.

    Records whose picture is absent go to ``missing.jsonl`` and are left out; ``counts.json``
    has written, missing and expected numbers. Files are downloaded to ``out/downloads``
    unless ``from_dir`` has them. What a broken build has done is not done again.

    Raises:
        ConfigError: no such recipe, or files are absent.
        RecordError: a file is not in its publisher's format, or a picture's name leaves the folder.
    """
    chosen = recipe(name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    folder = from_dir or out / "downloads"
    if from_dir is None:
        fetch((*chosen.sources, *(p.source for p in chosen.pictures if p.source.url)), folder)
    require(chosen.sources, folder)
    out.mkdir(parents=True, exist_ok=True)
    return _write(chosen, folder, out, limit, progress)


def _write(
    chosen: Recipe,
    folder: Path,
    out: Path,
    limit: int | None,
    progress: Callable[[int], None] | None,
) -> Path:
    finder = Finder(chosen.pictures, folder, out / "images")
    done = out / "records.jsonl"
    part = out / "records.jsonl.part"
    written = missing = 0
    with part.open("w", encoding="utf-8") as file, (out / "missing.jsonl").open("w") as lost:
        for record in islice(chosen.records(folder), limit):
            images = [image for image in record.images if isinstance(image, str)]
            absent = [image for image in images if not finder.place(image)]
            if absent:
                missing += 1
                lost.write(json.dumps({"id": record.id, "images": absent}) + "\n")
                continue
            file.write(as_line(record, chosen.license) + "\n")
            written += 1
            if progress:
                progress(written)
    counts = {"written": written, "missing": missing, "expected": chosen.count}
    (out / "counts.json").write_text(json.dumps(counts) + "\n")
    part.replace(done)
    return done


def as_line(record: Record, license: str) -> str:
    """A record as a line of JSONL; its pictures lie below ``images``."""
    messages = []
    for message in record.messages:
        parts = [
            {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"}
            for p in message.content
        ]
        plain = not any(isinstance(p, ImagePart) for p in message.content)
        messages.append({"role": message.role, "content": message.text if plain else parts})
    raw = {
        "id": record.id,
        "images": [f"images/{image}" for image in record.images if isinstance(image, str)],
        "messages": messages,
        "source": record.source,
        "license": license,
    }
    return json.dumps(raw, ensure_ascii=False)


class Finder:
    """Copies single pictures out of zips and folders; nothing is extracted by its own name."""

    def __init__(self, pictures: tuple[Pictures, ...], folder: Path, out: Path) -> None:
        self.pictures = pictures
        self.folder = folder
        self.out = out
        self.archives: dict[str, zipfile.ZipFile] = {}

    def place(self, image: str) -> bool:
        """Put a picture below ``out``; False when no source has it."""
        name = PurePosixPath(image)
        if name.is_absolute() or ".." in name.parts or "\\" in image:
            raise RecordError(f"picture {image!r} leaves the data folder; correct the annotations")
        target = self.out / name
        return target.exists() or any(
            self._copy(p, p.inside + image.removeprefix(p.prefix), target)
            for p in self.pictures
            if image.startswith(p.prefix)
        )

    def _copy(self, pictures: Pictures, inside: str, target: Path) -> bool:
        path = self.folder / pictures.source.file
        part = target.with_name(target.name + ".part")
        if path.is_dir():
            found = (path / inside).resolve()
            if not found.is_file() or not found.is_relative_to(path.resolve()):
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, part)
        elif path.is_file():
            archive = self._open(path)
            try:
                info = archive.getinfo(inside)
            except KeyError:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(info) as read, part.open("wb") as write:
                    shutil.copyfileobj(read, write)
            except (zipfile.BadZipFile, EOFError) as error:
                raise RecordError(f"{path}, {inside}: {error}; fetch it again") from error
        else:
            return False
        part.replace(target)
        return True

    def _open(self, path: Path) -> zipfile.ZipFile:
        try:
            if str(path) not in self.archives:
                self.archives[str(path)] = zipfile.ZipFile(path)
            return self.archives[str(path)]
        except zipfile.BadZipFile as error:
            raise RecordError(f"{path}: {error}; it may be truncated: fetch it again") from error
