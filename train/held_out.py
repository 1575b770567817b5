"""The held-out loss as a mean over all supervised tokens, whatever shares a batch."""

from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer

from train.ranks import everybody
from vlm.padding import IGNORE_INDEX


class FilledUp(Dataset[Any]):
    """A data set with Nones behind its records, up to a multiple of a number.

    The collator leaves them out, see `train.quarantine.Quarantine`.
    """

    def __init__(self, data: Any, multiple: int) -> None:
        self._data, self._multiple = data, multiple

    def __len__(self) -> int:
        return -(-len(self._data) // self._multiple) * self._multiple

    def __getitem__(self, index: int) -> Any:
        return self._data[index] if index < len(self._data) else None


class HeldOutLoss(Trainer):
    """Trainer that weighs each held-out batch by its supervised tokens.

    Trainer itself takes the mean of the batches' means, so that a short answer in a batch of
    short ones counts for more than the same answer beside a long one. And where the records do
    not divide by ranks and batches, it fills the last batches up with the first records, which
    count twice; here nothing does, see `FilledUp`.
    """

    weighs_tokens = True  # False where a loss is of whole batches, not of their tokens

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Trainer, with batches of records and of nothing that divide by the ranks."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.world_size
        if size > 1 and self.weighs_tokens and isinstance(data, Dataset):
            data = FilledUp(data, size * self.args.eval_batch_size)
        return super().get_eval_dataloader(data)

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
