"""The held-out loss as a mean over all supervised tokens, whatever shares a batch."""

from typing import Any

from transformers import Trainer

from train.ranks import everybody
from vlm.padding import IGNORE_INDEX


class HeldOutLoss(Trainer):
    """Trainer that weighs each held-out batch by its supervised tokens.

    Trainer itself takes the mean of the batches' means, so that a short answer in a batch of
    short ones counts for more than the same answer beside a long one. Where the records do not
    divide by ranks and batches, the first of them fill the last batches up, and count twice.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, with the loss of all tokens."""
        self._parts: list[tuple[float, float]] = []
        output = super().evaluation_loop(*args, **kwargs)
        parts = everybody(self._parts, self.args.device, self.args.world_size)
        count = sum(tokens for _, tokens in parts)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if count and name in output.metrics:
            output.metrics[name] = sum(loss * tokens for loss, tokens in parts) / count
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; remembers the batch's loss and its weight."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if "labels" in inputs and found[0] is not None:
            tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(self.args.device)
            size = self.args.world_size
            if size > 1:  # Trainer's loss is then a rank's sum by the mean count of the ranks
                tokens = self.accelerator.gather(tokens).sum() / size
            self._parts.append((float(found[0]), float(tokens)))
        return found
