"""Tiny random folders of other families, written by transformers' own classes.

Those with a video part are written part by part, as older ones at the hub are: without
torchvision, which the tests do without, their whole processor cannot be made.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.smolvlm import processing_smolvlm

from vlm import testing
from vlm.assistant import Assistant, load

IMAGE = testing.SPECIAL_TOKENS.index("<image>")
SQUARE = {"height": 28, "width": 28}
GRIDS = [[28, 56], [56, 28], [56, 56]]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {**SIZES, "image_size": 28, "patch_size": 14}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DIALOGUE = (
    "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokens(*extra: str) -> Any:
    tokenizer = testing.byte_tokenizer(None)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    return tokenizer


def language(tokenizer: Any, kind: Any = hf.LlamaConfig, **more: Any) -> Any:
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **more}
    return kind(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **ENDS)


def write(folder: Path, model: Any, processor: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_parts(folder: Path, model: Any, tokenizer: Any, images: Any, template: str) -> None:
    write(folder, model, tokenizer)
    images.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)


def settle(folder: Path, **settings: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps(settings))


def llava_next(folder: Path) -> None:
    tokenizer = tokens()
    config = hf.LlavaNextConfig(
        vision_config=testing.tiny_vision_config(),
        text_config=language(tokenizer),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
    )
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=SQUARE, image_grid_pinpoints=GRIDS
    )
    processor = hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=testing.CHATML,
    )
    write(folder, hf.LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> None:
    tokenizer = tokens("<video>")
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=language(tokenizer, hf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRIDS,
    )
    images = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRIDS)
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    write_parts(folder, model, tokenizer, images, testing.CHATML)
    settle(folder, num_image_tokens=4, vision_feature_select_strategy="full")


def blip(folder: Path, text_config: Any, tokenizer: Any, instruct: bool = False) -> None:
    config_class = hf.InstructBlipConfig if instruct else hf.Blip2Config
    config = config_class(
        vision_config=VISION,
        qformer_config={**SIZES, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)},
        text_config=text_config,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    images = hf.BlipImageProcessorPil(size=SQUARE)
    if instruct:
        processor = hf.InstructBlipProcessor(images, tokenizer, tokens(), num_query_tokens=4)
        write(folder, hf.InstructBlipForConditionalGeneration(config), processor)
    else:
        processor = hf.Blip2Processor(images, tokenizer, num_query_tokens=4)
        write(folder, hf.Blip2ForConditionalGeneration(config), processor)


def blip2_opt(folder: Path) -> None:
    tokenizer = tokens()
    decoder = language(tokenizer, hf.OPTConfig, ffn_dim=64, word_embed_proj_dim=32)
    blip(folder, decoder, tokenizer)


def blip2_t5(folder: Path) -> None:
    tokenizer = tokens()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    start = {"decoder_start_token_id": 0, "vocab_size": len(tokenizer)}
    blip(folder, hf.T5Config(**sizes, **start, **ENDS), tokenizer)


def instructblip(folder: Path) -> None:
    tokenizer = tokens()
    blip(folder, language(tokenizer), tokenizer, instruct=True)


def idefics(folder: Path) -> None:
    tokenizer = tokens("<fake_token_around_image>", "<end_of_utterance>")
    vision = {"embed_dim": 32, **VISION}
    config = hf.IdeficsConfig(
        vocab_size=len(tokenizer) - 2,
        additional_vocab_size=2,
        cross_layer_interval=1,
        use_resampler=False,
        alpha_initializer="ones",
        max_position_embeddings=512,
        vision_config=vision,
        **{**SIZES, "num_attention_heads": 4},
        **ENDS,
    )
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessorPil(image_size=28), tokenizer)
    write(folder, hf.IdeficsForVisionText2Text(config), processor)


def idefics3(folder: Path, family: str = "Idefics3") -> None:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    around = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>")
    tokenizer = tokens(*around, *places)
    config = getattr(hf, f"{family}Config")(
        vision_config={**VISION, "patch_size": 7},
        text_config=language(tokenizer).to_dict(),
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    images = getattr(hf, f"{family}ImageProcessorPil")(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    model = getattr(hf, f"{family}ForConditionalGeneration")(config)
    write_parts(folder, model, tokenizer, images, DIALOGUE)
    settle(folder, image_seq_len=4)


def smolvlm(folder: Path) -> None:
    idefics3(folder, "SmolVLM")


def paligemma(folder: Path) -> None:
    images = hf.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tokens())
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=32),
        text_config=language(processor.tokenizer, hf.GemmaConfig, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    write(folder, hf.PaliGemmaForConditionalGeneration(config), processor)


def qwen2_vl(folder: Path) -> None:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokenizer = tokens(*(f"<|{name}|>" for name in names))
    image, video, start, end = tokenizer.convert_tokens_to_ids([f"<|{n}|>" for n in names])
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**language(tokenizer, hf.Qwen2Config).to_dict(), "model_type": "qwen2_vl_text"}
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        text_config={**text, "rope_parameters": rope},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = hf.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    template = testing.CHATML.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    model = hf.Qwen2VLForConditionalGeneration(config)
    write_parts(folder, model, tokenizer, images, template)


BUILDERS: list[Callable[[Path], None]] = [
    *(llava_next, llava_onevision, blip2_opt, blip2_t5, instructblip),
    *(idefics, idefics3, smolvlm, paligemma, qwen2_vl),
]


class Relative:
    """A folder and its assistant."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.assistant: Assistant = load(folder)
        self.type: str = hf.AutoConfig.from_pretrained(folder).model_type
        self.chats = (folder / "chat_template.jinja").is_file()
        self.takes_many = self.chats or name == "idefics"


@pytest.fixture(scope="session", autouse=True)
def _number_words() -> Iterator[None]:
    """SmolVLM's processor insists on num2words, though it spells numbers for videos only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        yield


@pytest.fixture(scope="session")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Relative]:
    """Any family by the name of its builder, built once."""
    found: dict[str, Relative] = {}

    def get(name: str) -> Relative:
        if name not in found:
            folder = tmp_path_factory.mktemp("relatives") / name
            folder.mkdir()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                next(build for build in BUILDERS if build.__name__ == name)(folder)
            found[name] = Relative(name, folder)
        return found[name]

    return get


@pytest.fixture(params=[build.__name__ for build in BUILDERS])
def relative(request: pytest.FixtureRequest, relatives: Callable[[str], Relative]) -> Relative:
    """Every family in turn."""
    return relatives(request.param)
