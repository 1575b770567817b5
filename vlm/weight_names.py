"""What a tensor is called in a folder, and what in a model.

A folder of ours has the names of the published LLaVA folders, which every version of
transformers and the servers built on it read: ``language_model.model.*``,
``language_model.lm_head.*``, ``vision_tower.vision_model.*``, ``multi_modal_projector.*``.
In a model, each part has the names of its own class.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from vlm.model import VisionLanguageModel

_VISION, _LANGUAGE = "vision_tower.", "language_model."
# Longest first; both the legacy and the in-memory spelling of transformers 5 are read.
_SPELLINGS = (
    ("model.vision_tower.vision_model.", _VISION),
    ("model.vision_tower.", _VISION),
    ("vision_tower.vision_model.", _VISION),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that old versions of transformers stored and that are computed now.
_COMPUTED = (".embeddings.position_ids", ".rotary_emb.inv_freq")
# Towers whose published names have one level more than transformers 5 has in memory.
_INNER_LEVEL = ("clip_vision_model", "siglip_vision_model")
# transformers 5.24 has shorter names in memory for DINOv2's attention than on disk.
_DINO = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
)


class WeightNames:
    """The names of one model.

    Args:
        model: may have random weights; only its structure is looked at.

    Attributes:
        head: the output layer's weight in the model.
        embeddings: the token embeddings' weight in the model.
    """

    def __init__(self, model: "VisionLanguageModel") -> None:
        self._kind = model.config.vision_config.model_type
        self._base = f"{_LANGUAGE}{model.language_model.base_model_prefix}."
        self._known = frozenset(model.state_dict())
        self._head = _path(model, model.get_output_embeddings())
        self.head = self._head + ".weight"
        self.embeddings = _path(model, model.get_input_embeddings()) + ".weight"

    def in_model(self, name: str) -> str | None:
        """The model's name for a tensor of a folder; None for what is computed anew."""
        if name.endswith(_COMPUTED):
            return None
        for old, new in _SPELLINGS:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        if name.startswith("language_model.lm_head."):
            return self._head + name.removeprefix("language_model.lm_head")
        if name.startswith("language_model.model."):
            return self._base + name.removeprefix("language_model.model.")
        if name not in self._known and name.startswith(_VISION):
            for old, new in _DINO:
                name = name.replace(old, new)
        return name

    def on_disk(self, name: str) -> str:
        """The folder's name for a tensor of the model."""
        if name.startswith(self._head + "."):
            return "language_model.lm_head" + name.removeprefix(self._head)
        if name.startswith(self._base):
            return "language_model.model." + name.removeprefix(self._base)
        if not name.startswith(_VISION):
            return name
        if self._kind in _INNER_LEVEL:
            return "vision_tower.vision_model." + name.removeprefix(_VISION)
        if self._kind.startswith("dinov2"):
            for old, new in _DINO:
                name = name.replace(new, old)
        return name


def _path(model: nn.Module, part: nn.Module) -> str:
    """Where `part` sits in `model`."""
    return next(name for name, module in model.named_modules() if module is part)
