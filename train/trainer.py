"""The one training loop: Hugging Face Trainer with our optimisers and checkpoints."""

import dataclasses
import json
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from train.config import RunConfig
from train.optimizer import build_optimizer, parameter_groups
from train.order import GroupedSampler
from train.survey import Survey
from vlm.errors import CheckpointError

Around = Callable[[dict[str, Any]], AbstractContextManager[dict[str, Any]]]
CHECKPOINTS = "checkpoints"  # below a run's output folder
_TRAINED = "trained.safetensors"
_STATE = "trainer_state.json"


class StageTrainer(Trainer):
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

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward inside what the job puts around them."""
        with self._around(self._prepare_inputs(inputs)) as prepared:
            return super().training_step(model, prepared, num_items_in_batch)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The same for held-out batches."""
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
                muon=muon,
            )
            self.optimizer = build_optimizer(groups, muon=muon)
        return self.optimizer

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; of a checkpoint that stands there already, only load the weights.

        Trainer itself would take one step more than the recipe says.
        """
        state = TrainerState.load_from_json(str(checkpoint / _STATE)) if checkpoint else None
        if state is not None and state.global_step >= state.max_steps:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            return
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self._stop.on_train_end()  # not called after an error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: parameter.detach().contiguous()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        save_file(tensors, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / _TRAINED
        saved = load_file(path)
        wanted = {n: p for n, p in (model or self.model).named_parameters() if p.requires_grad}
        if saved.keys() != wanted.keys():
            odd = sorted(saved.keys() ^ wanted.keys())
            raise CheckpointError(
                f"{path} holds other parameters than this run trains ({', '.join(odd[:4])}); "
                "choose another output folder"
            )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and stop; a second one kills."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Ask for a checkpoint and the end, once a signal came."""
        if _any_rank(self.stopped, args):
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(number, self._before[number])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: Trainer writes its own state last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE}") if _is_json(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _any_rank(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is set on any rank: one that stopped alone would leave the rest waiting."""
    if args.world_size == 1:
        return flag
    shared = torch.tensor(int(flag), device=args.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared)


def _activation_checkpointing(config: RunConfig) -> dict[str, bool]:
    """The option under the name that this transformers knows: 5.24 renamed it."""
    if not config.gradient_checkpointing:
        return {}
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"
    return {new if new in names else "gradient_checkpointing": True}


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The run in Trainer's own words."""
    return TrainingArguments(
        output_dir=str(Path(config.output) / CHECKPOINTS),
        # Said aloud: without it, ranks with no GPU would each train alone.
        use_cpu=not torch.accelerator.is_available(),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        **_activation_checkpointing(config),
        dataloader_num_workers=config.num_workers,
        dataloader_persistent_workers=config.num_workers > 0,
        eval_strategy="steps" if config.eval_data else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.log_steps,
        seed=config.seed,
        data_seed=config.seed,
        report_to="none",
        remove_unused_columns=False,
        label_names=["targets"] if config.stage == "contrastive" else ["labels"],
        prediction_loss_only=True,
    )
