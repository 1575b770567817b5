"""Several sources as one: how much of each, which records, in which order."""

from data_recipes.mix.gather import Gathered, gather
from data_recipes.mix.mixture import Mixture
from data_recipes.mix.run import Mixed, mix
from data_recipes.mix.settings import Filters, MixConfig, SourceConfig, load_mix

__all__ = [
    "Filters",
    "Gathered",
    "MixConfig",
    "Mixed",
    "Mixture",
    "SourceConfig",
    "gather",
    "load_mix",
    "mix",
]
