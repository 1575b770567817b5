"""Random LLaVA folders of the sizes that the benchmarks compare on; no benchmark itself.

tiny: ViT 6 x 192 with 64 patches, Llama 6 x 256, vocabulary 4,096 (about 10 million weights).
mid: ViT 12 x 768 with 196 patches, Llama 12 x 768, vocabulary 32,000 (about 220 million).
7b: the shape of LLaVA-1.5-7B, ViT 24 x 1024 with 576 patches, Llama 32 x 4096; for a GPU.
"""

import json
from pathlib import Path
from typing import Any

import torch

# Never the likeliest token (its output row is zero), so it can end answers on command.
STOP_ID = 5
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "tiny": (
        {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "patch_size": 28},
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 4096},
        0.15,
    ),
    "mid": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 32_000,
        },
        0.06,
    ),
    "7b": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        },
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32_064,
            "intermediate_size": 11_008,
        },
        0.03,
    ),
}


def write_llava(
    folder: Path,
    scale: str,
    patch_size: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the folder by transformers' own classes.

    The decoder's weights are wide enough for answers of many different tokens.

    Args:
        folder: to write.
        scale: a key of `SHAPES`.
        patch_size: other than the scale's, for other numbers of visual tokens.
        image_size: of the square pictures, other than the scale's.
        dtype: of the weights.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from vlm import testing

    vision, text, spread = SHAPES[scale]
    vision = {"image_size": 224, **vision}
    image_size = vision["image_size"] = image_size or vision["image_size"]
    vision["patch_size"] = patch_size or vision["patch_size"]
    text = {"intermediate_size": 8 * text["hidden_size"] // 3, **text}
    testing.tiny_llava_folder(folder, template=testing.ROLE_TOKENS)  # tokenizer and processor
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, intermediate_size=4 * vision["hidden_size"]),
        text_config=LlamaConfig(**text, initializer_range=spread),
        image_token_index=testing.SPECIAL_TOKENS.index("<image>"),
    )
    model = Llava(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight[STOP_ID] = 0
        model.lm_head.weight[config.image_token_index] = 0  # a word like any other would not do
    model.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["patch_size"] = vision["patch_size"]
    settings["image_processor"]["size"] = {"shortest_edge": image_size}
    settings["image_processor"]["crop_size"] = {"height": image_size, "width": image_size}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder
