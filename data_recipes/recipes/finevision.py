"""FineVision: some two hundred sets of questions in one layout, by subset."""

from data_recipes.recipe import Recipe, Rows

RECIPE = Recipe(
    about="24M dialogues of some 200 sets, each turn rated",
    license="of each subset, see the publisher's page",
    size="about 5 TB",
    count=None,
    rows=Rows("finevision", "*.parquet", "HuggingFaceM4/FineVision"),
)
