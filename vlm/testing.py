"""Tiny models for tests: random weights, a byte-level tokenizer, drawn pictures.

Everything is built in memory and saved by transformers and tokenizers themselves, in
well under a second and with no download. The tokenizer spells text byte by byte, so it
can write any text, and every test string has a predictable length.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CohereConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.image_processing_backends import PilBackend

from vlm.template import DEFAULT_TEMPLATE

IMAGE_SIZE = 28
PATCH_SIZE = 14
NUM_VISUAL_TOKENS = 4
SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
VICUNA = DEFAULT_TEMPLATE
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = none %}{% endif %}"
    "{% for m in rest %}"
    "{% if loop.index0 == 0 and system is not none %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ROLE_TOKENS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"vicuna": VICUNA, "chatml": CHATML, "llama2": LLAMA2, "role_tokens": ROLE_TOKENS}
_MLP = {"intermediate_size": 64}
_GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
_CAPPED = {"head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True}
TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, {**_MLP, "projection_dim": 32}),
    "siglip": (SiglipVisionConfig, _MLP),
    "dinov2": (Dinov2Config, {}),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, {}),
}
LANGUAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": 16}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "phi3": (Phi3Config, _GROUPED),
    "gemma2": (Gemma2Config, {**_GROUPED, **_CAPPED}),
    "gpt_neox": (GPTNeoXConfig, _MLP),
    "opt": (OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "granite": (GraniteConfig, {**_GROUPED, "logits_scaling": 8.0, "embedding_multiplier": 2.0}),
    "cohere": (CohereConfig, {**_GROUPED, "logit_scale": 0.25}),
}
Tower = Literal["clip", "siglip", "dinov2", "dinov2_with_registers"]
Language = Literal[
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gpt_neox", "opt", "granite", "cohere"
]


@cache
def _tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    merges = []
    for pair in (("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n")):
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    return str(tokenizer.to_str())


def byte_tokenizer(template: str | None = VICUNA) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 270 tokens with the special tokens above and four merges."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def tiny_vision_config(tower: Tower = "clip") -> PretrainedConfig:
    """A tower with 3 layers of width 32 for 28x28 pictures in 2x2 patches."""
    config, more = TOWERS[tower]
    return config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        **more,
    )


def tiny_text_config(
    language: Language = "llama", tie: bool = False, width: int = 32
) -> PretrainedConfig:
    """A decoder with 2 layers and a context of 512."""
    config, more = LANGUAGES[language]
    return config(
        vocab_size=len(byte_tokenizer()),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        **{"tie_word_embeddings": tie, **more},
    )


def image_processor(tower: Tower = "clip") -> PilBackend:
    """The tower's preprocessing for 28x28 pictures."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if tower == "siglip":
        return SiglipImageProcessorPil(size=square)
    kind = CLIPImageProcessorPil if tower == "clip" else BitImageProcessorPil
    return kind(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)


def tiny_vision_folder(path: str | os.PathLike[str], seed: int = 0, tower: Tower = "clip") -> Path:
    """Write a random vision tower and its preprocessing into `path`."""
    with _seeded(seed):
        AutoModel.from_config(tiny_vision_config(tower)).save_pretrained(path)
    image_processor(tower).save_pretrained(path)
    return Path(path)


def tiny_language_folder(
    path: str | os.PathLike[str],
    language: Language = "llama",
    seed: int = 0,
    *,
    template: str | None = VICUNA,
    tie: bool = False,
) -> Path:
    """Write a random language model and the byte tokenizer into `path`."""
    with _seeded(seed):
        model = AutoModelForCausalLM.from_config(tiny_text_config(language, tie))
        _spread(model)
    model.save_pretrained(path)
    byte_tokenizer(template).save_pretrained(path)
    return Path(path)


def tiny_llava_folder(
    path: str | os.PathLike[str],
    language: Language = "llama",
    seed: int = 0,
    *,
    template: str | None = VICUNA,
    tie: bool = False,
    layer: int | list[int] = -2,
    strategy: Literal["default", "full"] = "default",
    tower: Tower = "clip",
    width: int = 32,
) -> Path:
    """Write a random LLaVA folder by transformers' own classes into `path`."""
    config = LlavaConfig(
        vision_config=tiny_vision_config(tower),
        text_config=tiny_text_config(language, tie, width),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=NUM_VISUAL_TOKENS,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tie,
    )
    with _seeded(seed):
        model = LlavaForConditionalGeneration(config)
        _spread(model)
    model.save_pretrained(path)
    tokenizer = byte_tokenizer(template)
    LlavaProcessor(
        image_processor=image_processor(tower),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower != "siglip"),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)
    return Path(path)


def draw_image(size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), seed: int = 0) -> Image.Image:
    """An RGB picture of coloured blocks that depends on `seed` alone."""
    random = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (6, 3), generator=random).tolist()
    image = Image.new("RGB", size, tuple(colours[0]))
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(colours[1:]):
        left, top = i * size[0] // 6, (i * 5 % 6) * size[1] // 6
        draw.rectangle((left, top, left + size[0] // 3, top + size[1] // 3), fill=tuple(colour))
    return image


def _spread(model: torch.nn.Module) -> None:
    """Larger weights than the default, so that a wrong input moves the logits visibly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from `seed` and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
