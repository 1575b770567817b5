"""A recipe in the words of Hugging Face Trainer."""

import dataclasses
from pathlib import Path

import torch
from transformers import TrainingArguments

from train.checkpoints import CHECKPOINTS
from train.config import RunConfig
from train.sharding import deepspeed_config


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
        neftune_noise_alpha=config.neftune_noise_alpha,
        **_activation_checkpointing(config),
        dataloader_num_workers=config.num_workers,
        # Workers that outlive an epoch draw no seed for the next one, which a resumed run does:
        # dropout would differ, and so it would between numbers of workers.
        dataloader_persistent_workers=False,
        eval_strategy="steps" if config.eval_data else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_nan_inf_filter=False,  # such a step ends the run, see train.finite
        deepspeed=deepspeed_config(config),
        logging_steps=config.log_steps,
        seed=config.seed,
        data_seed=config.seed,
        report_to="none",
        remove_unused_columns=False,
        label_names=["targets"] if config.stage == "contrastive" else ["labels"],
        prediction_loss_only=True,
    )
