"""What a recipe may say: every key with its type, its bounds and its default."""

from typing import Literal

from pydantic import Field, model_validator

from vlm.strict_yaml import Strict

StageName = Literal["contrastive", "language", "align", "instruct"]


class VisionSize(Strict):
    """A CLIP tower to be made from nothing."""

    image_size: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    text_vocab_size: int = Field(1024, gt=261)


class LanguageSize(Strict):
    """A Llama decoder and its byte-level BPE tokenizer, to be made from nothing."""

    vocab_size: int = Field(gt=261)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    context_length: int = Field(gt=0)


class ModelConfig(Strict):
    """Where the parts come from.

    ``contrastive`` takes ``new_vision``, or ``vision`` to go on from a folder; ``language``
    takes ``new_language`` or ``language``; ``align`` takes ``vision`` and ``language``
    folders; ``instruct`` takes ``start``, the output folder of ``align``.

    ``preprocessing`` is what becomes of a picture that is not square: ``crop`` cuts its
    sides off, ``pad`` fills it up with the mean colour, ``keep`` is what the folder says.
    ``quantize`` stores the language model's linear layers in 4 or 8 bits (QLoRA).
    """

    new_vision: VisionSize | None = None
    new_language: LanguageSize | None = None
    vision: str | None = None
    language: str | None = None
    start: str | None = None
    projector: str = "mlp2x_gelu"
    vision_feature_layer: int = -2
    preprocessing: Literal["keep", "crop", "pad"] = "keep"
    quantize: Literal["4bit", "8bit"] | None = None


class LoraConfig(Strict):
    """LoRA on every linear layer of the language model but ``lm_head``."""

    r: int = Field(128, gt=0)
    alpha: int = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    use_dora: bool = False
    use_rslora: bool = False


class BatchConfig(Strict):
    """How records become batches; nothing here changes the loss.

    Attributes:
        packing: rows side by side with block-diagonal attention, in place of padding.
        share_pictures: records of one batch that begin with the same pictures and words
            compute that beginning once; needs packing.
        group_by: ``length`` puts records of like length into one batch, ``modality_length``
            keeps those with and without pictures apart as well (as LLaVA does), ``picture``
            keeps the records of one picture together, ``none`` draws at random.
        max_length: tokens of a record, visual tokens included; by default the model's.
        over_long: what becomes of longer records: ``error``, ``drop`` or ``split``, which
            makes several of one between its turns.
        feature_cache: folder that keeps what a frozen vision tower said of each picture.
    """

    packing: bool = True
    share_pictures: bool = True
    group_by: Literal["none", "length", "modality_length", "picture"] = "none"
    max_length: int | None = Field(default=None, gt=0)
    over_long: Literal["error", "drop", "split"] = "error"
    feature_cache: str | None = None


class WatchConfig(Strict):
    """What is shown while a run goes on.

    Attributes:
        report_to: trackers of transformers' Trainer, such as ``tensorboard``.
        samples: records whose answers are written out at each evaluation.
        probes: records that are also tried with a blank and with another picture.
    """

    report_to: list[str] = Field(default_factory=list)
    samples: int = Field(default=4, ge=0)
    probes: int = Field(default=64, ge=0)


class RunConfig(Strict):
    """One training run. Rates and sizes are per optimiser step unless said otherwise.

    ``batch_size`` is records per device and forward pass; the global batch is batch_size x
    gradient_accumulation x number of processes. ``template: plain`` is LLaVA's for
    alignment: pictures, answer and a line end, without the question.
    """

    stage: StageName
    output: str
    data: list[str] = Field(min_length=1)
    eval_data: str | None = None
    model: ModelConfig
    lora: LoraConfig | None = None
    template: Literal["chat", "plain"] = "chat"
    batches: BatchConfig = BatchConfig()
    watch: WatchConfig = WatchConfig()
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(gt=0)
    projector_learning_rate: float | None = Field(None, gt=0)
    vision_learning_rate: float | None = Field(None, gt=0)
    unfreeze_vision: bool = False
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(gt=0)
    gradient_accumulation: int = Field(1, gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = -1
    warmup_steps: float = Field(0.03, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    neftune_noise_alpha: float | None = Field(None, gt=0)
    liger: bool = False
    ema_decay: float | None = Field(None, gt=0, lt=1)
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = "none"
    num_workers: int = Field(0, ge=0)
    eval_steps: float = Field(0.1, gt=0)
    save_steps: float = Field(0.1, gt=0)
    log_steps: int = Field(20, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _parts_fit_the_stage(self) -> "RunConfig":
        model, stage = self.model, self.stage
        wanted = {
            "contrastive": model.new_vision or model.vision,
            "language": model.new_language or model.language,
            "align": model.vision and model.language,
            "instruct": model.start,
        }
        hint = {
            "contrastive": "model.new_vision or model.vision",
            "language": "model.new_language or model.language",
            "align": "model.vision and model.language",
            "instruct": "model.start",
        }
        if not wanted[stage]:
            raise ValueError(f"stage {stage} needs {hint[stage]}")
        if self.lora is not None and stage != "instruct":
            raise ValueError(f"lora is for the stage instruct, not for {stage}; remove it")
        if self.batches != BatchConfig() and stage not in ("align", "instruct"):
            raise ValueError(f"batches is for the stages align and instruct, not for {stage}")
        if model.quantize is not None and self.lora is None:
            raise ValueError("model.quantize needs lora: weights of few bits cannot be trained")
        if model.quantize is not None and self.sharding != "none":
            raise ValueError("model.quantize needs sharding=none: few bits cannot be cut up")
        if self.neftune_noise_alpha is not None and self.batches.packing:
            raise ValueError(
                "neftune_noise_alpha needs batches.packing=false: its noise depends on the length "
                "of a padded batch"
            )
        if self.liger and stage not in ("align", "instruct"):
            raise ValueError(f"liger is for the stages align and instruct, not for {stage}")
        if self.template == "plain" and stage != "align":
            raise ValueError(f"template=plain is for the stage align, not for {stage}")
        if self.ema_decay is not None and self.sharding != "none":
            raise ValueError("ema_decay needs sharding=none: averages are kept whole")
        if self.vision_learning_rate is not None and not self.unfreeze_vision:
            raise ValueError("vision_learning_rate needs unfreeze_vision=true: the tower is frozen")
        if self.batches.feature_cache is not None and self.unfreeze_vision:
            raise ValueError("batches.feature_cache needs a frozen tower; remove unfreeze_vision")
        return self


SECTIONS: dict[str, type[Strict]] = {
    "": RunConfig,
    "model.": ModelConfig,
    "model.new_vision.": VisionSize,
    "model.new_language.": LanguageSize,
    "lora.": LoraConfig,
    "batches.": BatchConfig,
    "watch.": WatchConfig,
}
