"""Pictures and captions of the web in tar shards, as img2dataset writes LAION's."""

from data_recipes.recipe import Recipe, Rows

RECIPE = Recipe(
    about="captions of the web, from shards that img2dataset has downloaded",
    license="of each picture's owner",
    size="unknown",
    count=None,
    rows=Rows("laion-webdataset", "*.tar"),
)
