"""A drawn world of emoji and coloured shapes: pictures with captions, questions and answers.

Everything follows from a seed, so a data set is a command and not a download.
"""

from data_recipes.scenes.build import build, make_scene
from data_recipes.scenes.draw import draw_scene
from data_recipes.scenes.world import Scene, SceneObject, draw_lots

__all__ = ["Scene", "SceneObject", "build", "draw_lots", "draw_scene", "make_scene"]
