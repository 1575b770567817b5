"""The numbers of a step besides its loss: pace, padding, gradients and rates part by part.

They are read off the run as it goes by: tokens by a hook on the model, gradients where they
lie. Nothing here changes what is computed, and nothing waits for the device but at a log.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from train.sharding import whole_tensor

Numbers = dict[str, float]
# Where a parameter's first name is not the name of its part.
_NAMES = {
    "multi_modal_projector": "projector",
    "model": "language_model",
    "lm_head": "language_model",
}


def part_name(parameter: str) -> str:
    """The part that a parameter of this name belongs to; LoRA's own are the ``adapter``."""
    first = parameter.partition(".")[0]
    return "adapter" if ".lora_" in parameter else _NAMES.get(first, first)


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each part that has some."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_name(name), []).append(parameter)
    return parts


class Meter:
    """Counts from one log to the next, and tells what came of it.

    Args:
        model: which is trained; frozen and unfrozen already.
        num_records: how many records this rank has drawn so far.
        waited: seconds that this rank has waited for them so far.
        add_up: a tensor's sum over all ranks; every rank calls it at the same time.
        clock: seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        num_records: Callable[[], int],
        waited: Callable[[], float],
        add_up: Callable[[Tensor], Tensor],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._parts = trained_parts(model)
        self._model = model
        self._num_records, self._waited = num_records, waited
        self._add_up, self._clock = add_up, clock
        self._norms: dict[str, Tensor] = {}
        self._rates: Numbers = {}
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.begin()

    def begin(self) -> None:
        """Count and time from here."""
        self._started = self._reached = self._clock()
        self._records_before, self._waited_before = self._num_records(), self._waited()
        self._tokens: Tensor | int = 0
        self._positions = 0
        self._rested = 0.0

    def step_ended(self) -> None:
        """What follows may be no training, see `rested`."""
        self._reached = self._clock()

    def rested(self) -> None:
        """The time since the step's end went to other things and does not count."""
        now = self._clock()
        self._rested += now - self._reached
        self._reached = now

    def look_at_step(self, groups: list[dict[str, Any]]) -> None:
        """Note gradients and rates; all ranks call this, before the optimiser's step.

        Args:
            groups: of the optimiser.
        """
        rates = {p: float(group["lr"]) for group in groups for p in group["params"]}
        for part, parameters in self._parts.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:  # DeepSpeed keeps them elsewhere
                self._norms[part] = whole_tensor(get_total_norm(grads))
            known = [rates[p] for p in parameters if p in rates]
            if known:
                self._rates[part] = max(known)

    def numbers(self, logs: Mapping[str, Any]) -> Numbers:
        """All numbers since `begin`, which starts anew; every rank calls this.

        Args:
            logs: of Trainer; ``grad_norm`` is that of all gradients before they were clipped.

        Returns:
            samples_per_second and tokens_per_second of all ranks together, padding_share of
            all positions, waiting_share of the time (for records: more num_workers lower it),
            and grad_norm_PART and learning_rate_PART of the last step. A token
            is a position that is computed: a beginning that records share counts once.
        """
        seconds = self._clock() - self._started - self._rested
        records = self._num_records() - self._records_before
        waited = self._waited() - self._waited_before
        times = [round(1e6 * each) for each in (waited, seconds)]
        counts = (records, self._tokens, self._positions, *times)
        local = [torch.as_tensor(count) for count in counts]
        device = next(self._model.parameters()).device
        mine = torch.stack([count.to(device, torch.long) for count in local])
        num_records, tokens, positions, waiting, lasting = self._add_up(mine).tolist()
        found = {
            "samples_per_second": num_records / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / positions if positions else 0.0,
            "waiting_share": waiting / lasting if lasting else 0.0,
            **{f"grad_norm_{part}": norm for part, norm in self._before_clipping(logs)},
            **{f"learning_rate_{part}": rate for part, rate in self._rates.items()},
        }
        self._norms, self._rates = {}, {}
        self.begin()
        return found

    def _before_clipping(self, logs: Mapping[str, Any]) -> list[tuple[str, float]]:
        """Clipping multiplies all gradients by one number, which the total tells."""
        found = {part: float(norm) for part, norm in self._norms.items()}
        clipped = sum(norm**2 for norm in found.values()) ** 0.5
        scale = float(logs.get("grad_norm", clipped)) / clipped if clipped else 1.0
        return [(part, scale * norm) for part, norm in found.items()]

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        ids = kwargs.get("input_ids", kwargs.get("text_ids"))
        mask = kwargs.get("attention_mask", kwargs.get("text_mask"))
        if ids is None:
            return
        self._positions += ids.numel()
        self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
