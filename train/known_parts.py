"""Configs of the hub's models that shipped recipes name, for plans where the hub is not at hand.

Sizes as their owners published them in ``config.json``; ``num_tokens`` is what the tokenizer has
(``len``), and a vocabulary may have more rows. A folder of the same name goes before.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)


@dataclass(frozen=True)
class KnownPart:
    """A tower or a decoder.

    Attributes:
        kind: class of its config.
        sizes: arguments of the class.
        num_tokens: of a decoder's tokenizer, an image token not counted.
    """

    kind: type[PretrainedConfig]
    sizes: dict[str, Any]
    num_tokens: int = 0

    def config(self) -> PretrainedConfig:
        """A new config."""
        return self.kind(**self.sizes)


def _vicuna(width: int, inner: int, layers: int, heads: int) -> KnownPart:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32_000}
    return KnownPart(
        LlamaConfig, {**sizes, "max_position_embeddings": 4096, "dtype": "float16"}, 32_000
    )


KNOWN_PARTS: dict[str, KnownPart] = {
    "lmsys/vicuna-7b-v1.5": _vicuna(4096, 11_008, 32, 32),
    "lmsys/vicuna-13b-v1.5": _vicuna(5120, 13_824, 40, 40),
    "Qwen/Qwen2.5-0.5B-Instruct": KnownPart(
        Qwen2Config,
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
        151_665,
    ),
    "openai/clip-vit-large-patch14-336": KnownPart(
        CLIPVisionConfig,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    ),
    "google/siglip-base-patch16-224": KnownPart(
        SiglipVisionConfig,
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
        },
    ),
}
