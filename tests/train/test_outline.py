"""What is known of a model before it is made is what it turns out to be."""

from pathlib import Path
from typing import Any

import pytest

from train.config import load_config
from train.known_parts import KNOWN_PARTS
from train.outline import llava_config, maker_of, meta_model, processor_of, start_folder
from train.settings import RunConfig
from vlm import testing
from vlm.checkpoint import compose, load_checkpoint
from vlm.errors import CheckpointError
from vlm.lora import attach, save_adapter
from vlm.messages import assistant, user
from vlm.testing import Language, Tower

SETTLED = ("image_token_index", "vision_feature_select_strategy", "tie_word_embeddings")


def align(vision: Path | str, language: Path | str, **values: Any) -> RunConfig:
    model = {"vision": str(vision), "language": str(language)}
    fixed = {"output": "out", "data": ["x"], "learning_rate": 1e-3, "batch_size": 1}
    return RunConfig.model_validate({"stage": "align", "model": model, **fixed, **values})


@pytest.mark.parametrize(
    ("tower", "language"), [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "gemma2")]
)
def test_it_is_the_model_that_compose_makes(
    tower: Tower, language: Language, tmp_path: Path
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "vision", tower=tower)
    decoder = testing.tiny_language_folder(tmp_path / "language", language)
    config = align(vision, decoder)
    found = llava_config(config)
    assert found is not None
    made, processor = compose(vision, decoder, "mlp2x_gelu")
    for key in SETTLED:
        assert getattr(found, key) == getattr(made.config, key), key
    assert found.dtype == made.dtype
    outlined, _ = meta_model(config, found)
    assert {n: p.shape for n, p in outlined.named_parameters()} == {
        n: p.shape for n, p in made.named_parameters()
    }
    ours = processor_of(config)
    assert ours is not None
    chat = [user("what is it?", testing.draw_image()), assistant("a fish")]
    assert ours.encode_ids(chat) == processor.encode_ids(chat)
    plain = processor_of(align(vision, decoder, template="plain"))
    assert plain is not None
    assert plain.encode_ids(chat) == processor.plain().encode_ids(chat)


def test_a_vocabulary_without_an_image_token_grows_as_it_will(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "vision")
    decoder = testing.tiny_language_folder(tmp_path / "language")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = decoder / file
        path.write_text(path.read_text().replace("<image>", "<image2>"))
    found = llava_config(align(vision, decoder))
    assert found is not None
    made, _ = compose(vision, decoder)
    assert found.text_config.vocab_size == made.config.text_config.vocab_size == 320
    assert found.image_token_index == made.config.image_token_index


def test_known_parts_have_the_published_numbers_of_weights() -> None:
    """As their model cards and safetensors headers tell; a tower without SigLIP's pooling."""
    grown = 64 * 2  # rows of both embeddings: 32,001 tokens become 32,064
    pooling = 768 + 4 * (768 + 1) * 768 + 2 * 768 + 2 * 768 * 3072 + 3072 + 768
    counts = {}
    for name in ("llava-1.5-7b-align", "llava-1.5-13b-align", "siglip-qwen2.5-0.5b-align"):
        run = load_config(name)
        found = llava_config(run)
        assert found is not None
        model, _ = meta_model(run, found)
        for part, key in (
            ("vision_tower", run.model.vision),
            ("language_model", run.model.language),
        ):
            counts[key] = sum(p.numel() for p in model.get_submodule(part).parameters())
    assert counts == {
        "openai/clip-vit-large-patch14-336": 303_507_456,
        "lmsys/vicuna-7b-v1.5": 6_738_415_616 + grown * 4096,
        "lmsys/vicuna-13b-v1.5": 13_015_864_320 + grown * 5120,
        "google/siglip-base-patch16-224": 92_884_224 - pooling,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    }
    assert counts.keys() == KNOWN_PARTS.keys()


def test_a_start_is_its_folder_its_adapters_base_or_what_an_earlier_run_makes(
    llava: str, tmp_path: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_checkpoint(llava)
    save_adapter(attach(model, r=2, alpha=4), tmp_path / "adapter")
    assert start_folder(str(tmp_path / "adapter")).resolve() == Path(llava).resolve()
    assert start_folder(llava) == Path(llava)
    earlier = align(parts["vision"], parts["language"], output=str(tmp_path / "made"))
    assert maker_of(str(tmp_path / "made"), [earlier]) is earlier
    later = RunConfig.model_validate(
        {**earlier.model_dump(), "stage": "instruct", "model": {"start": str(tmp_path / "made")}}
    )
    found, expected = llava_config(later, [earlier]), llava_config(earlier)
    assert found is not None and expected is not None and found.to_dict() == expected.to_dict()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"`vlm train quick-align` makes it"):
        start_folder("runs/quick/align")


def test_nothing_is_known_of_what_comes_from_nothing(parts: dict[str, str], tmp_path: Path) -> None:
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    tower = RunConfig.model_validate(
        {
            **align("x", "x").model_dump(),
            "stage": "contrastive",
            "output": str(tmp_path / "tower"),
            "model": {"new_vision": size},
        }
    )
    assert llava_config(tower) is None
    after = align(tmp_path / "tower", parts["language"])
    assert llava_config(after, [tower]) is None and processor_of(after, [tower]) is None
