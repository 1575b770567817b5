"""The one training loop: Hugging Face Trainer with our optimisers and checkpoints."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from train.arguments import training_arguments
from train.averages import Averages
from train.checkpoints import (
    STATE,
    aside,
    clear_aside,
    load_sharded_optimizer,
    load_trained,
    move_into_place,
    save_sharded_optimizer,
    save_trained,
    telling_full_disk,
    trained_tensors,
)
from train.config import RunConfig
from train.finite import check_finite
from train.held_out import HeldOutLoss
from train.optimizer import build_optimizer, parameter_groups
from train.order import GroupedSampler
from train.quarantine import FILE, TOLD, BadRecord, QuarantineFile, Told
from train.ranks import everybody
from train.sharding import check_sharded, shard, whole_tensor
from train.signals import StopOnSignal
from train.survey import Survey
from vlm.caption_ranks import ranks_of_environment
from vlm.errors import ConfigError, RecordError

Around = Callable[[dict[str, Any]], AbstractContextManager[dict[str, Any]]]


class StageTrainer(HeldOutLoss):
    """Trainer whose checkpoints hold what is trained, and nothing that is frozen."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *, run_config: RunConfig, around: Around = nullcontext, **kwargs: Any
    ) -> None:
        super().__init__(args=training_arguments(run_config), **kwargs)
        self._run_config = run_config
        self._around = around
        self._stop = StopOnSignal()
        self.add_callback(self._stop)
        decay = run_config.ema_decay
        self.averages = None if decay is None else Averages(self.model, decay)
        if self.averages is not None:
            self.add_callback(self.averages)
        self._told: deque[Told] = deque()  # of the micro-batches that wait
        self._weightless = False
        self.num_drawn = 0  # usable records that this rank has taken for its steps
        self.seconds_waited = 0.0  # for loader workers, or for records where there are none
        self.weighs_tokens = run_config.stage != "contrastive"
        self._seen: list[tuple[Tensor, tuple[str, ...]]] = []  # losses and ids of this step
        self._quarantine = QuarantineFile(Path(run_config.output) / FILE, len(self.train_dataset))
        self._check_processes()

    def _check_processes(self) -> None:
        """Refuse a run that is not spread as it was started; shard it where it is to be."""
        started, found = ranks_of_environment()[1], self.args.world_size
        if started != found:
            raise ConfigError(
                f"{started} processes were started, but each would train with {found}; start them "
                "by torchrun, or by accelerate launch with a file of train/launch"
            )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"one process sees {self.args.n_gpu} GPUs; start one for each by torchrun "
                f"--nproc-per-node {self.args.n_gpu} --no-python vlm train ..., or choose one by "
                "CUDA_VISIBLE_DEVICES=0"
            )
        # A frozen tower of plain replicas may be left out by a rank whose batch has no picture.
        self.model.looks_always = found > 1 and (
            self._run_config.unfreeze_vision or self._run_config.sharding != "none"
        )
        if self._run_config.sharding == "fsdp2":
            shard(self.model, self.args.device, found)
            # Trainer then leaves placement and reduction to the model.
            self.is_distributed_loading_by_transformers = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._run_config.sharding == "fsdp2":
            check_sharded(self.model_wrapped, self.args.world_size)
        return prepared

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Nothing is deferred: each micro-batch's gradients are cut into slices at once.

        Waiting for the last one would keep whole gradients, which sharding is to avoid.
        """
        return nullcontext()

    @property
    def stopped_by(self) -> int:
        """The signal that stopped the run, or 0."""
        return self._stop.number

    @property
    def num_quarantined(self) -> int:
        """How many records were passed over so far, as the first rank knows it."""
        return len(self._quarantine)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, without what they tell of their records."""
        asked = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seconds_waited += time.perf_counter() - asked
        told = [batch.pop(TOLD, Told(())) for batch in batches]
        self._told = deque(told)
        self.num_drawn += sum(len(each.ids) - len(each.bad) for each in told)
        self._pass_over([bad for each in told for bad in each.bad])
        if isinstance(num_items, Tensor):
            num_items = num_items.clamp(min=1)  # all records of a step may have been passed over
        return batches, num_items

    def _pass_over(self, found: list[BadRecord]) -> None:
        found = everybody(found, self.args.device, self.args.world_size)
        if found and self.is_world_process_zero():
            self._quarantine.add(found)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward inside what the job puts around them."""
        told = self._told.popleft() if self._told else Told(())
        self._weightless = told.weightless
        with self._around(self._prepare_inputs(inputs)) as prepared:
            loss = super().training_step(model, prepared, num_items_in_batch)
        self._weightless = False
        self._seen.append((loss.detach(), told.ids))
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The model's own loss, or nothing of it for a batch without a record."""
        found = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return 0 * found if self._weightless else found

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor):
            norm = whole_tensor(norm)
        losses, names = zip(*self._seen, strict=True)
        self._seen.clear()
        check_finite(self.state.global_step + 1, losses, norm, names)
        return norm

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for held-out batches."""
        told = inputs.pop(TOLD, Told(()))
        self._pass_over(list(told.bad))
        if told.weightless and told.bad:
            raise RecordError(
                f"no picture of the held-out records {', '.join(told.ids)} can be used "
                f"({told.bad[0].reason}); mend them or remove them from eval_data"
            )
        with self._around(self._prepare_inputs(inputs)) as prepared:
            return super().prediction_step(model, prepared, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        batches = self._run_config.batches
        if batches.group_by == "none":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size
        if batches.group_by != "picture":
            size *= self.args.gradient_accumulation_steps * self.args.world_size
        found: Survey = self.train_dataset.survey
        return GroupedSampler(found, batches.group_by, size, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW or Muon over the trainable parameters, the projector at its own rate."""
        if self.optimizer is None:
            config = self._run_config
            muon = config.optimizer == "muon"
            groups = parameter_groups(
                self.model,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                projector_learning_rate=config.projector_learning_rate,
                vision_learning_rate=config.vision_learning_rate,
                muon=muon,
            )
            self.optimizer = build_optimizer(groups, muon=muon)
        return self.optimizer

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; of a checkpoint that stands there already, only load the weights.

        Trainer itself would take one step more than the recipe says.
        """
        state = TrainerState.load_from_json(str(checkpoint / STATE)) if checkpoint else None
        if state is not None and state.global_step >= state.max_steps:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            return
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self._stop.on_train_end()  # not called after an error

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes its checkpoints: aside, until they are whole."""
        return str(aside(Path(str(self.args.output_dir))))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, first = Path(str(self.args.output_dir)), self.is_world_process_zero()
        with telling_full_disk(f"the checkpoint of step {self.state.global_step} in {folder}"):
            try:
                if first:
                    clear_aside(folder)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if first:
                    move_into_place(folder)
            finally:
                if first:
                    clear_aside(folder)  # a full disk gets its room back

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; all ranks take part, for sharded parameters are gathered."""
        tensors = trained_tensors(self.model, keep=self.args.should_save)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_trained(tensors, folder)
            if self.averages is not None:
                self.averages.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint))
        if self.averages is not None:
            self.averages.load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._run_config.sharding != "fsdp2":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write = self.args.should_save
        save_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir), write=write)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._run_config.sharding != "fsdp2" or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
