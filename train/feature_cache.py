"""What a frozen vision tower said of each picture, on disk: one small file a picture.

The name of a file is a hash of the picture's bytes below a folder named by a hash of the
tower, its layers and the preprocessing, so that nothing stale is ever read. Files are
written whole and renamed: ranks, loader workers and runs may share a folder.

Shapes: N visual tokens, Dv tower width.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.engine.features import preprocessing_identity
from vlm.errors import ConfigError
from vlm.model import VisionLanguageModel
from vlm.processor import Processor

_NAME = "features"


class DiskFeatures:
    """Features (N, Dv) by the SHA-256 of a picture's bytes.

    Args:
        folder: of the cache; made if need be.
        model: whose tower is frozen.
        processor: of the model.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, model: VisionLanguageModel, processor: Processor) -> None:
        self.folder = folder / _identity(model, processor)
        width = model.multi_modal_projector.linear_1.in_features
        self.num_bytes_each = (
            processor.num_visual_tokens * width * model.vision_tower.dtype.itemsize
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"batches.feature_cache={folder} cannot be written ({error.strerror}); "
                "name another folder, or none"
            ) from error

    def get(self, key: str) -> torch.Tensor | None:
        """The features of a picture, or None; a broken file counts as none."""
        try:
            return load_file(self._path(key))[_NAME]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def put(self, key: str, features: torch.Tensor) -> None:
        """Keep the features of a picture.

        Raises:
            ConfigError: the disk is full, or the folder cannot be written any more.
        """
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({_NAME: features.contiguous().cpu()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ConfigError(
                f"batches.feature_cache: {path} cannot be written ({error}); make room, or run "
                "with batches.feature_cache=null"
            ) from error

    def num_bytes(self, num_pictures: int) -> int:
        """Bytes on disk once so many pictures are in it."""
        return num_pictures * self.num_bytes_each

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _identity(model: VisionLanguageModel, processor: Processor) -> str:
    config = model.config
    digest = hashlib.sha256(preprocessing_identity(processor).encode())
    chosen = [config.vision_feature_layer, config.vision_feature_select_strategy]
    digest.update(json.dumps([chosen, config.vision_config.to_dict()], default=str).encode())
    for name, tensor in model.vision_tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
