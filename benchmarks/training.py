"""A training epoch: this package beside Trainer and transformers' LLaVA class, padded.

    python benchmarks/training.py                          # tiny: all three cases
    python benchmarks/training.py --scale mid --samples 16
    python benchmarks/training.py --scale mid --samples 16 --memory   # peaks of two processes

Same random weights, same records, float32, one process, the two ways in turn; one optimiser
step an epoch, so that both take the same step whatever shares a batch, and their losses must
agree. The peer is what one writes with Trainer: records padded in batches of 8, LoRA by peft,
pictures through the model's processor. As in LLaVA's mixture most answers are a word or a
phrase: seven of ten have 2 to 8 tokens; the others are descriptions of 40 to 240. Questions
have 8 to 24, and a system text of 35, as LLaVA's, comes first. Cases: instruct with one
question a picture, instruct with four, and align, where the tower's features are kept on
disk: its first epoch, in which they are made, and later ones.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import write_llava
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from train.arguments import training_arguments
from train.config import RunConfig
from train.dataset import RecordDataset
from train.jobs import JOBS
from train.samples import survey_data
from train.stages import STAGES, apply_stage
from train.trainer import StageTrainer
from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.messages import Record

CASES = {"instruct, 1 a picture": ("instruct", 1), "instruct, 4": ("instruct", 4)}
CASES["align"] = ("align", 1)
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # of the peer's LoRA
BATCH = 8
now = time.perf_counter
SYSTEM = "as many tokens as LLaVA's own text."  # 35


@dataclass
class Run:
    """Seconds and loss of each epoch."""

    seconds: list[float]
    losses: list[float]


class Clock(TrainerCallback):
    """Notes when each epoch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        if not self.ends:
            self.ends.append(now())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Next."""
        self.ends.append(now())


def write_records(folder: Path, samples: int, each: int) -> Path:
    """Records about drawn pictures, `each` questions a picture, as files."""
    draw = random.Random(0)
    lines = []
    for number in range(samples):
        picture = f"{number // each}.jpg"
        if not (folder / picture).exists():
            testing.draw_image((640, 480), seed=number).save(folder / picture, quality=90)
        length = draw.randint(2, 8) if draw.random() < 0.7 else draw.randint(40, 240)
        question, answer = (
            "".join(draw.choices("abcdefgh ", k=n - 2)) + "x."
            for n in (draw.randint(8, 24), length)
        )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        lines.append(json.dumps({"id": str(number), "images": [picture], "messages": messages}))
    path = folder / f"records-{each}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(model: Path, data: Path, stage: str, each: int, epochs: int) -> RunConfig:
    """The run; accumulation makes one step of an epoch."""
    samples = len(RecordDataset([data]))
    batches: dict[str, Any] = {"group_by": "picture"} if each > 1 else {}
    if stage == "align":
        batches = {"feature_cache": str(data.parent / "features")}
    parts = {"start": str(model)} if stage == "instruct" else {"vision": "-", "language": "-"}
    return RunConfig.model_validate(
        {
            "stage": stage,
            "output": str(data.parent / f"out-{stage}-{each}"),
            "data": [str(data)],
            "model": parts,
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0} if stage == "instruct" else None,
            "batches": batches,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "batch_size": BATCH,
            "gradient_accumulation": samples // BATCH,
            "epochs": epochs,
            "save_steps": 10_000,
            "log_steps": 1,
        }
    )


def by_vlm(model: Path, config: RunConfig) -> Run:
    """The package's own run, without writing a result."""
    data = RecordDataset(config.data)
    stage = config.stage
    if stage == "align":  # from the same weights as the peer's
        loaded, processor = load_checkpoint(model)
        from train.dialogues import Dialogues

        dialogues = Dialogues(loaded, processor, config.batches)
        trained, collate, around = loaded, dialogues.collate, dialogues.around
    else:
        job = JOBS[stage](config, data)
        assert job.dialogues is not None
        trained, collate, around, dialogues = job.model, job.collate, job.around, job.dialogues
    apply_stage(trained, STAGES[stage], config.lora)
    samples, _ = survey_data(config, dialogues, data)
    trainer = StageTrainer(
        run_config=config,
        around=around,
        model=trained,
        data_collator=collate,
        train_dataset=samples,
    )
    return timed(trainer)


def by_trainer(folder: Path, config: RunConfig) -> Run:
    """Trainer, transformers' class, padded batches."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    if config.lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
        model = inject_adapter_in_model(lora, model)
    model.model.multi_modal_projector.requires_grad_(True)
    processor: Any = AutoProcessor.from_pretrained(folder)
    own = load_checkpoint(folder)[1]

    def collate(records: list[Record]) -> dict[str, torch.Tensor]:
        from PIL import Image

        turns = [
            [
                {
                    "role": m.role,
                    "content": [{"type": "image"}] * len(m.images)
                    + [{"type": "text", "text": m.text}],
                }
                for m in record.messages
            ]
            for record in records
        ]
        texts = [processor.apply_chat_template(turn) for turn in turns]
        pictures = [Image.open(record.images[0]).convert("RGB") for record in records]
        processor.tokenizer.padding_side = "right"
        batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        for row, record in enumerate(records):
            ids, mask = own.encode_ids(record.messages)
            learnt = torch.tensor(mask)
            labels[row, : len(ids)] = torch.tensor(ids).where(learnt, -100)
        return {**batch, "labels": labels}

    arguments: TrainingArguments = training_arguments(config)
    return timed(
        Trainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=RecordDataset(config.data),
        )
    )


def timed(trainer: Trainer) -> Run:
    """Train, and read off times and losses."""
    clock = Clock()
    trainer.add_callback(clock)
    step, found = trainer.training_step, []
    trainer.training_step = lambda *args: found.append(step(*args)) or found[-1]  # type: ignore
    trainer.args.save_strategy = "no"
    trainer.args.disable_tqdm = True
    trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    size = trainer.args.gradient_accumulation_steps
    losses = [sum(map(float, found[i : i + size])) for i in range(0, len(found), size)]
    return Run(seconds, losses)  # a step's parts add up to its loss, which the log rounds


def compare(folder: Path, scale: str, samples: int, epochs: int, rounds: int) -> Table:
    """All cases, both ways in turn."""
    table = Table(title=f"{scale}, {samples} samples, {torch.get_num_threads()} threads")
    for column in ("case", "epoch", "samples/s", "Trainer's", "times", "loss differs by"):
        table.add_column(column, justify="left" if column in ("case", "epoch") else "right")
    model = write_llava(folder / "model", scale)
    for name, (stage, each) in CASES.items():
        ours, theirs = [], []
        for number in range(rounds + 1):  # the first is not counted
            place = folder / f"{stage}-{each}-{number}"
            place.mkdir()
            count = samples if number else BATCH
            config = config_of(model, write_records(place, count, each), stage, each, epochs)
            ours.append(by_vlm(model, config))
            theirs.append(by_trainer(model, config))
        add_rows(table, name, samples, ours[1:], theirs[1:])
    return table


def add_rows(table: Table, name: str, samples: int, ours: list[Run], theirs: list[Run]) -> None:
    """Medians over the rounds; of `align` the first epoch and the later ones apart."""
    off = max(
        abs(a - b)
        for one, two in zip(ours, theirs, strict=True)
        for a, b in zip(one.losses[:1], two.losses[:1], strict=True)
    )
    parts = (
        {"first": slice(0, 1), "later": slice(1, None)} if name == "align" else {"all": slice(None)}
    )
    for part, epochs in parts.items():
        a, b = (
            sorted(s for run in runs for s in run.seconds[epochs])[
                sum(len(run.seconds[epochs]) for run in runs) // 2
            ]
            for runs in (ours, theirs)
        )
        table.add_row(
            name, part, f"{samples / a:.2f}", f"{samples / b:.2f}", f"{b / a:.2f}", f"{off:.1e}"
        )


def peaks(scale: str, samples: int) -> Table:
    """Peak resident memory of one epoch in a process of its own, four questions a picture."""
    table = Table(title=f"{scale}, {samples} samples, peak memory of a process")
    for column in ("way", "GB", "of Trainer's"):
        table.add_column(column, justify="left" if column == "way" else "right")
    found = {}
    for way in ("trainer", "vlm"):
        command = [sys.executable, __file__, "--scale", scale, "--samples", str(samples)]
        command += ["--threads", str(torch.get_num_threads()), "--only", way]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[way] = int(output.split()[-1]) / 1e6
    for way, size in found.items():
        table.add_row(way, f"{size:.2f}", f"{size / found['trainer']:.2f}")
    return table


def only(folder: Path, scale: str, samples: int, way: str) -> int:
    """One epoch of one way; peak resident memory in kB."""
    model = write_llava(folder / "model", scale)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = config_of(model, write_records(folder, samples, 4), "instruct", 4, 1)
    (by_vlm if way == "vlm" else by_trainer)(model, config)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after > before, "writing the model took more memory than training it"
    return after


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use")
    parser.add_argument("--memory", action="store_true", help="peaks, in two processes")
    parser.add_argument("--only", choices=("vlm", "trainer"), help="one epoch, and its peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global now
        now = time.process_time
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        if options.only:
            print(only(Path(name), options.scale, options.samples, options.only))
        elif options.memory:
            Console().print(peaks(options.scale, options.samples))
        else:
            Console().print(
                compare(Path(name), options.scale, options.samples, options.epochs, options.rounds)
            )


if __name__ == "__main__":
    main()
