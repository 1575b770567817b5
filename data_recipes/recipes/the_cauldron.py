"""The Cauldron: fifty sets of questions in one layout, by subset."""

from data_recipes.recipe import Recipe, Rows

RECIPE = Recipe(
    about="50 sets of questions about pictures, for Idefics2",
    license="of each subset, see the publisher's page",
    size="unknown",
    count=None,
    rows=Rows("the-cauldron", "*.parquet", "HuggingFaceM4/the_cauldron"),
)
