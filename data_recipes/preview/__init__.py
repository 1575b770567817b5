"""A contact sheet of records, on one page that needs no other file and no network."""

from data_recipes.preview.cards import Eyes
from data_recipes.preview.page import preview

__all__ = ["Eyes", "preview"]
