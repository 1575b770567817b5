"""The stage that makes a vision tower from nothing: pictures beside the texts that fit them.

Shapes: B pictures, P patches, U different texts in the batch, T tokens, D width.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from vlm.errors import CheckpointError

_REST = "dual_encoder.safetensors"  # everything but the vision tower
MAX_TEXT_TOKENS = 64
_MAX_SCALE = 100.0  # the clamp of Radford et al. 2021, section 2.5


class DualEncoder(nn.Module):
    """A CLIP vision tower and a text tower that meet in one space.

    A picture and a text are as similar as the text and the patch that fits it best (the
    late interaction of FILIP, Yao et al. 2021, arXiv:2111.07783, with one vector a text).
    So every patch learns to name what it shows, which is what a language model that reads
    patches needs. Pictures smaller than the tower's size are close-ups: they are put at a
    place of the patch grid drawn by lot.
    """

    def __init__(self, vision_tower: CLIPVisionModel, vocab_size: int) -> None:
        super().__init__()
        config = vision_tower.config
        width = config.hidden_size
        self.vision_tower = vision_tower
        self.text_tower = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=MAX_TEXT_TOKENS,
                projection_dim=width,
                bos_token_id=None,
                eos_token_id=0,  # only for a pooling that is not used here
                pad_token_id=0,
            )
        )
        self.vision_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.text_head = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def encode_patches(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> unit vectors of their patches (B, P, D)."""
        tower = self.vision_tower
        patches = tower.embeddings.patch_embedding(pixel_values)
        rows, columns = patches.shape[-2:]
        positions = self._positions(len(pixel_values), rows, columns)
        first = tower.embeddings.class_embedding + tower.embeddings.position_embedding.weight[0]
        hidden = torch.cat(
            [
                first.expand(len(pixel_values), 1, -1),
                patches.flatten(2).transpose(1, 2) + positions,
            ],
            dim=1,
        )
        output = tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden))
        return F.normalize(self.vision_head(output.last_hidden_state[:, 1:]), dim=-1)

    def _positions(self, num: int, rows: int, columns: int) -> Tensor:
        config = self.vision_tower.config
        side = config.image_size // config.patch_size
        grid = self.vision_tower.embeddings.position_embedding.weight[1:].view(side, side, -1)
        if (rows, columns) == (side, side):
            return grid.flatten(0, 1)
        down = torch.randint(side - rows + 1, (num,)).tolist()
        right = torch.randint(side - columns + 1, (num,)).tolist()
        windows = [
            grid[y : y + rows, x : x + columns].flatten(0, 1)
            for y, x in zip(down, right, strict=True)
        ]
        return torch.stack(windows)

    def encode_texts(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Token ids (U, T), padded on the right -> unit vectors (U, D)."""
        hidden = self.text_tower(text_ids, attention_mask=text_mask).last_hidden_state
        last = text_mask.sum(1) - 1
        return F.normalize(self.text_head(hidden[torch.arange(len(last)), last]), dim=-1)

    def forward(
        self, pixel_values: Tensor, text_ids: Tensor, text_mask: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch; ``targets`` (B, U) is 1 where a text belongs to a picture."""
        patches = self.encode_patches(pixel_values)
        texts = self.encode_texts(text_ids, text_mask)
        scale = self.log_scale.exp().clamp(max=_MAX_SCALE)
        similarity = scale * (patches @ texts.T).amax(1)
        loss = (_matching_loss(similarity, targets) + _matching_loss(similarity.T, targets.T)) / 2
        return {"loss": loss, "similarity": similarity}

    def save(self, folder: Path) -> None:
        """Write the tower as a standard CLIP vision folder, and the rest beside it."""
        self.vision_tower.save_pretrained(folder)
        rest = {k: v for k, v in self.state_dict().items() if not k.startswith("vision_tower.")}
        save_file({k: v.contiguous() for k, v in rest.items()}, folder / _REST)

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> "DualEncoder":
        """Open what `save` wrote; a folder without the rest gets a new text tower.

        Raises:
            CheckpointError: the rest fits neither the tower nor the vocabulary.
        """
        model = cls(CLIPVisionModel.from_pretrained(folder), vocab_size)
        rest = folder / _REST
        if rest.is_file():
            try:
                found = model.load_state_dict(load_file(rest), strict=False)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise CheckpointError(f"{rest} does not fit {folder}: {reason}") from None
            missing = [key for key in found.missing_keys if not key.startswith("vision_tower.")]
            if missing or found.unexpected_keys:
                raise CheckpointError(
                    f"{rest}: missing keys {missing}, unexpected keys {found.unexpected_keys}"
                )
        return model


def new_vision_tower(size: Any) -> CLIPVisionModel:
    """A CLIP tower with random weights; ``size`` is a `train.config.VisionSize`."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=size.hidden_size,
            intermediate_size=3 * size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            image_size=size.image_size,
            patch_size=size.patch_size,
        )
    )


def _matching_loss(similarity: Tensor, targets: Tensor) -> Tensor:
    """InfoNCE with several right answers a row (B, U): the mean over them, rows of equal weight.

    A text that two pictures share is right for both; plain InfoNCE would push it from one.
    """
    log_shares = F.log_softmax(similarity, dim=1)
    return -((log_shares * targets).sum(1) / targets.sum(1)).mean()
