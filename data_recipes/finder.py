"""Copies single pictures out of zips and folders; nothing is extracted by its own name."""

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from data_recipes.recipe import Pictures
from vlm.errors import RecordError


class Finder:
    """Finds pictures by the publisher's names and puts them below a folder.

    Args:
        pictures: where they may be.
        folder: with the publisher's files.
        out: folder for the copies.
    """

    def __init__(self, pictures: tuple[Pictures, ...], folder: Path, out: Path) -> None:
        self.out = out.resolve()
        self._pictures = pictures
        self._folder = folder
        self._archives: dict[str, zipfile.ZipFile] = {}

    def place(self, image: str) -> bool:
        """Put a picture below ``out``; False when no source has it.

        Raises:
            RecordError: its name leaves the folder, or an archive is damaged.
        """
        name = PurePosixPath(image)
        if name.is_absolute() or ".." in name.parts or "\\" in image or "\0" in image:
            raise RecordError(f"picture {image!r} leaves the data folder; correct the annotations")
        target = self.out / name
        return target.exists() or any(
            self._copy(p, p.inside + image.removeprefix(p.prefix), target)
            for p in self._pictures
            if image.startswith(p.prefix)
        )

    def _copy(self, pictures: Pictures, inside: str, target: Path) -> bool:
        path = self._folder / pictures.source.file
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
            if str(path) not in self._archives:
                self._archives[str(path)] = zipfile.ZipFile(path)
            return self._archives[str(path)]
        except zipfile.BadZipFile as error:
            raise RecordError(f"{path}: {error}; it may be truncated: fetch it again") from error
