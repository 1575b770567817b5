"""What a mix.yaml may say: every key with its type, its bounds and its default."""

from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from data_recipes.formats.tables import HUB
from vlm.errors import ConfigError
from vlm.strict_yaml import Strict, explain, read_yaml


class Filters(Strict):
    """Which records of a source are kept; all conditions hold together.

    Attributes:
        min_characters, max_characters: of all turns, both ends included.
        min_tokens, max_tokens: of the whole record as the model sees it, visual tokens
            included; they need a processor.
        min_score: keys of ``meta`` with the least value; a record without one is left out.
        sources, licenses: values of ``source`` and ``license`` that are allowed.
        has_picture: true keeps records with pictures, false those without.
    """

    min_characters: int | None = Field(default=None, ge=0)
    max_characters: int | None = Field(default=None, ge=0)
    min_tokens: int | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=0)
    min_score: dict[str, float] = Field(default_factory=dict)
    sources: list[str] | None = None
    licenses: list[str] | None = None
    has_picture: bool | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether a processor has to count."""
        return self.min_tokens is not None or self.max_tokens is not None


class SourceConfig(Strict):
    """One source; at most one of the three ways to say how much of it is taken.

    Attributes:
        path: whatever `data_recipes.formats.read` takes, relative to the file.
        format: a key of `data_recipes.formats.FORMATS`; found row by row by default.
        images: another folder in which its pictures may lie, relative to the file.
        split: of a data set that has several.
        epochs: how often each record comes, 1 by default; 1.5 takes half of them twice.
        count: how many records are taken; more than there are means several epochs.
        weight: share of what ``size`` leaves beside the sources that are counted.
        filters: which records are kept.
    """

    path: str
    format: str | None = None
    images: str | None = None
    split: str | None = None
    epochs: float | None = Field(default=None, gt=0)
    count: int | None = Field(default=None, gt=0)
    weight: float | None = Field(default=None, gt=0)
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _one_measure(self) -> "SourceConfig":
        given = [name for name in ("epochs", "count", "weight") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.path}: {' and '.join(given)} exclude each other; keep one")
        return self


class MixConfig(Strict):
    """A mixture.

    Attributes:
        sources: in any order; the order is part of what the seed decides.
        size: records of the whole mixture; goes with sources that have a weight.
        seed: another one gives another order and, of a part of a source, other records.
        shuffle: false keeps each source's own order; sources alternate evenly all the same.
    """

    sources: list[SourceConfig] = Field(min_length=1)
    size: int | None = Field(default=None, gt=0)
    seed: int = 0
    shuffle: bool = True

    @model_validator(mode="after")
    def _size_goes_with_weights(self) -> "MixConfig":
        has_weight = any(source.weight is not None for source in self.sources)
        if has_weight and self.size is None:
            raise ValueError("a weight is a share of size; add size, the records of the mixture")
        if self.size is not None and not has_weight:
            raise ValueError("size goes with sources that have a weight; give one, or remove size")
        return self


SECTIONS: dict[str, type[Strict]] = {
    "": MixConfig,
    "sources.": SourceConfig,
    "sources.filters.": Filters,
}


def load_mix(path: Path | str) -> MixConfig:
    """Read a mix.yaml; its sources' paths become those seen from here.

    Raises:
        ConfigError: no YAML, an unknown key, a wrong value.
    """
    path = Path(path)
    values = read_yaml(path)
    try:
        config = MixConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(str(path), error, SECTIONS)) from None
    sources = []
    for source in config.sources:
        update = {key: _seen_from_here(getattr(source, key), path) for key in ("path", "images")}
        sources.append(source.model_copy(update=update))
    return config.model_copy(update={"sources": sources})


def _seen_from_here(name: str | None, path: Path) -> str | None:
    return name if name is None or name.startswith(HUB) else str(path.parent / name)
