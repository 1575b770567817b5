"""Same folder, same numbers: ours against transformers' LlavaForConditionalGeneration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.messages import Message, assistant, user
from vlm.model import VisionLanguageModel
from vlm.processor import Processor
from vlm.weight_names import WeightNames

TOLERANCE = 1e-5
IMAGES = [testing.draw_image((60, 40), seed=1), testing.draw_image((28, 28), seed=2)]
CHAT: list[Message] = [
    user("what is this?", IMAGES[0]),
    assistant("a dog"),
    user("and?", IMAGES[1]),
]


def theirs(folder: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], (kind, info[kind])
    return model.eval()


def their_batch(folder: Path) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    chat = [
        {
            "role": m.role,
            "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text}],
        }
        for m in CHAT
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=prompt, images=IMAGES, return_tensors="pt")
    return {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def greedy(model: VisionLanguageModel, batch: dict[str, torch.Tensor], steps: int) -> list[int]:
    """Greedy tokens without a cache: the plainest possible loop."""
    features = model.encode_images(batch["pixel_values"])
    ids = batch["input_ids"]
    for _ in range(steps):
        logits = model(input_ids=ids, image_features=features, logits_to_keep=1).logits
        logits[..., model.config.image_token_index] = -torch.inf
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -steps:].tolist()


@torch.no_grad()
def assert_same(folder: Path, model: VisionLanguageModel, processor: Processor) -> None:
    reference = theirs(folder)
    expected = their_batch(folder)
    batch = processor.collate([processor.encode(CHAT, add_generation_prompt=True)])
    assert batch.keys() == expected.keys()
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name
    difference = (model(**batch).logits - reference(**expected).logits).abs().max()
    assert difference <= TOLERANCE
    answer: Any = reference.generate(
        **expected,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        suppress_tokens=[model.config.image_token_index],
        eos_token_id=None,
    )
    assert greedy(model, batch, 12) == answer[0, -12:].tolist()


CASES = [
    ("llama", {}),
    ("qwen2", {}),
    ("llama", {"tie": True}),
    ("qwen2", {"tie": True, "template": testing.CHATML}),
    ("llama", {"strategy": "full", "layer": -1}),
    ("llama", {"layer": [-3, -2], "template": testing.ROLE_TOKENS}),
    ("qwen2", {"tower": "siglip", "strategy": "full", "layer": -1}),
    ("qwen2", {"tower": "siglip", "strategy": "default"}),
    ("qwen2", {"tower": "siglip", "strategy": "full", "layer": [0, -2], "tie": True}),
    ("llama", {"tower": "dinov2"}),
    ("mistral", {}),
    ("qwen3", {"tie": True}),
    ("phi3", {"tower": "siglip", "strategy": "full"}),
    ("gpt_neox", {}),
]


@pytest.mark.parametrize(("language", "options"), CASES)
def test_their_folder_in_our_hands(
    tmp_path: Path, language: testing.Language, options: dict[str, Any]
) -> None:
    folder = testing.tiny_llava_folder(tmp_path, language, **options)
    model, processor = load_checkpoint(folder)
    names = WeightNames(model)
    reference = {names.in_model(name): t for name, t in theirs(folder).state_dict().items()}
    ours = model.state_dict()
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, reference[name]), name
    assert_same(folder, model, processor)


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("tie", [False, True])
def test_our_folder_in_their_hands(
    tmp_path: Path, language: testing.Language, projector: str, tie: bool
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", language, tie=tie)
    model, processor = compose(vision, text, projector=projector)
    save_checkpoint(model, processor, tmp_path / "out")
    assert_same(tmp_path / "out", model, processor)


@pytest.mark.parametrize("tower", ["siglip", "dinov2"])
@pytest.mark.parametrize("language", ["qwen2", "phi3", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("template", [None, testing.LLAMA2])
def test_composed_families_in_their_hands(
    tmp_path: Path, tower: testing.Tower, language: testing.Language, template: str | None
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v", tower=tower)
    text = testing.tiny_language_folder(tmp_path / "l", language, template=template)
    model, processor = compose(vision, text)
    assert processor.num_visual_tokens == 4
    save_checkpoint(model, processor, tmp_path / "out")
    assert_same(tmp_path / "out", model, processor)


@pytest.mark.parametrize("template", testing.TEMPLATES.values(), ids=testing.TEMPLATES.keys())
def test_ids_of_whole_dialogues(tmp_path: Path, template: str) -> None:
    """Ordinary texts get the ids that transformers' tokenizer gives in one piece."""
    tokenizer = testing.byte_tokenizer(template)
    folder = testing.tiny_llava_folder(tmp_path, template=template)
    processor = Processor.from_folder(folder)
    texts = ["What's in the barn?", "Two — or “3”…\n\n- a cat 🐈\n- the  thing", "why?", "as is."]
    messages = [user(texts[0]), assistant(texts[1]), user(texts[2]), assistant(texts[3])]
    chat = [{"role": m.role, "content": m.text} for m in messages]
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert processor.encode(messages).input_ids == expected


def test_an_interleave_folder_of_sizes_that_do_not_divide(tmp_path: Path) -> None:
    """SigLIP so400m has 384 pixels in patches of 14: the last six are not seen."""
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=33,
        patch_size=14,
        vision_use_head=False,
    )
    text = testing.tiny_text_config("qwen2", tie=True)
    folder = testing.tiny_llava_folder(tmp_path, "qwen2", tower="siglip", strategy="full", layer=-1)
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config,
            text_config=text,
            image_token_index=3,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"height": 33, "width": 33}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert_same(folder, *load_checkpoint(folder))
