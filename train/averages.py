"""An exponential moving average of what is trained (Polyak averaging), off by default."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

FILE = "averages.safetensors"  # in a checkpoint


class Averages(TrainerCallback):
    """Averages weights over the steps: ``average = decay * average + (1 - decay) * weight``.

    The average starts as the first step's weights. Sums are taken in float32.

    Args:
        model: whose trained parameters are averaged.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take in the weights of a step."""
        for name, parameter in self._trained():
            if name in self._means:
                self._means[name].lerp_(parameter.float(), 1 - self._decay)
            else:
                self._means[name] = parameter.detach().float().clone()

    def save(self, folder: Path) -> None:
        """Write the averages into a checkpoint."""
        save_file(self._means, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        device = {name: parameter.device for name, parameter in self._trained()}
        found = load_file(folder / FILE)
        self._means = {name: tensor.to(device[name]) for name, tensor in found.items()}

    @torch.no_grad()
    def put_in(self) -> None:
        """Make the averages the model's weights, at the end of a run."""
        for name, parameter in self._trained():
            parameter.copy_(self._means[name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
