"""What is no LLaVA-1.5, is damaged or could run code is refused, and nothing is written."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.errors import CheckpointError, ConfigError, MissingExtraError, VlmError
from vlm.original import import_original
from vlm.original_tokenizer import read_tokenizer

Make = Callable[..., Any]
PICKLE = "pytorch_model.bin"
FACTORS = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}
PROJECTOR = "model.mm_projector.2.weight"


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def refused(
    folder: Path, *reasons: str, kind: type[VlmError] = CheckpointError, **parts: Any
) -> None:
    with pytest.raises(kind) as caught:
        import_original(folder, folder.parent / "out", **parts)
    for reason in reasons:
        assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_aspect_ratio": "anyres"}, "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ({"image_aspect_ratio": "anyres_max_9"}, "LLaVA-NeXT"),
        ({"mm_projector_type": "mlp3x_gelu"}, "'mlp3x_gelu' has no place"),
        ({"mm_projector_type": "mlp1x_gelu"}, "known: linear, mlp2x_gelu"),
        ({"mm_projector_type": "identity"}, "'identity' has no place"),
        ({"mm_projector_type": None}, "None has no place"),
        ({"mm_use_im_start_end": True}, "<im_start> and <im_end>"),
        ({"mm_resampler_type": "perceiver"}, "a resampler before the projector"),
        ({"s2": True}, "several picture sizes"),
        ({"mm_vision_select_feature": "cls"}, "known: patch, cls_patch"),
        ({"mm_vision_select_layer": None}, "add the layer"),
        ({"mm_vision_select_layer": "-2"}, "not a whole number"),
        ({"mm_vision_select_layer": 9}, "layer 9 does not exist"),
        ({"mm_hidden_size": 1024}, "width 32 but the projector takes 1024"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "unknown architecture 'LlavaMptForCausalLM'"),
        ({"architectures": None, "model_type": "llava_mpt"}, "unknown architecture 'llava_mpt'"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"quantization_config": {}}, "quantised"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"torch_dtype": "int8"}, "weights are torch.int8"),
        ({"torch_dtype": "half a byte"}, "config.json"),
        ({"mm_vision_select_feature": ["patch"]}, "known: patch, cls_patch"),
        ({"architectures": [{}]}, "unknown architecture {}"),
        ({"num_hidden_layers": 3}, "9 missing: language_model.model.layers.2."),
        ({"vocab_size": 271}, "[270, 32] in the folder, [271, 32] by the config"),
        ({"mm_vision_tower": None}, "no vision tower is named; give it with --vision FOLDER"),
        ({"mm_vision_tower": "/nowhere"}, "'/nowhere' is not at hand; give it with --vision"),
    ],
)
def test_configs(shop: Make, settings: dict[str, Any], reason: str) -> None:
    refused(shop().whole(**settings), reason)


def test_a_tower_of_the_hub_without_a_network(shop: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shop().whole(mm_vision_tower="openai/clip-vit-large-patch14-336")
    refused(folder, "'openai/clip-vit-large-patch14-336'", "--vision FOLDER", "cannot be reached")


def test_standard_folders_and_empty_ones(shop: Make) -> None:
    old = shop()
    refused(old.source, "needs no conversion")
    refused(old.folder("bare"), "neither a whole model (pytorch_model.bin), a projector")
    refused(old.path / "nowhere", "no such folder")
    refused(old.language(), "config.json has no mm_ keys")


class Program:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def damaged(state: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Contents of a pickle, and why each is refused."""
    rest = {name: tensor for name, tensor in state.items() if name != PROJECTOR}
    linear = {
        n.replace("projector.0", "projector"): t for n, t in rest.items() if ".2.bias" not in n
    }
    return {
        "program": ({"a": Program()}, "posix.mkdir"),
        "module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        "text": ({**state, "version": "1"}, "'version' is a str and no plain tensor"),
        "nested": ({"state_dict": state}, "'state_dict' is a dict"),
        "list": (list(state.values()), "holds a list"),
        "sparse": ({**state, PROJECTOR: torch.eye(32).to_sparse()}, "no plain tensor"),
        "meta": ({**state, PROJECTOR: torch.empty(32, 32, device="meta")}, "no plain tensor"),
        "missing": (rest, "1 missing: multi_modal_projector.linear_2.weight"),
        "one layer": (linear, "2 missing: multi_modal_projector.linear_2.bias"),
        "twice": ({**state, "model.mm_projector.weight": torch.ones(32, 32)}, "by two names"),
        "unexpected": ({**state, "model.image_newline": torch.ones(2)}, "image_newline"),
        "shape": ({**state, PROJECTOR: torch.ones(32, 16)}, "[32, 16] in the folder, [32, 32]"),
        "nan": ({**state, PROJECTOR: torch.full((32, 32), torch.nan)}, "linear_2.weight holds NaN"),
    }


@pytest.mark.parametrize("case", damaged({}))
def test_pickles(shop: Make, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = shop()
    monkeypatch.chdir(old.path)
    folder = old.whole()
    content, reason = damaged(old.without("vision_tower"))[case]
    torch.save(content, folder / PICKLE)
    refused(folder, reason)
    assert not Path("ran").exists()


def test_files_that_are_cut_absent_or_elsewhere(shop: Make) -> None:
    old = shop()
    folder = old.whole(num_shards=2)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    for content in (b"", b"no pickle", whole[: len(whole) // 2]):
        shard.write_bytes(content)
        refused(folder, shard.name, "damaged")
    torch.save(torch.load(folder / "pytorch_model-00001-of-00002.bin"), shard)
    refused(folder, "is in another shard too")
    shard.unlink()
    refused(folder, f"shard {shard.name} is missing")
    index = folder / f"{PICKLE}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    refused(folder, "'../x.bin' is no bin file here")


def test_a_language_model_that_is_not_reproduced(
    shop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.language.final_logits", lambda config, logits: logits * 2)
    refused(shop().whole(), "changes logits in a way that is not reproduced")


def test_parts_of_other_models(shop: Make, tmp_path: Path) -> None:
    old = shop()
    stage1 = old.projector()
    refused(stage1, "no language model is named; give it with --language FOLDER")
    refused(stage1, "no pytorch_model.bin or model.safetensors", language=stage1)
    narrow = testing.tiny_vision_folder(tmp_path / "narrow")
    refused(stage1, "'clip_vision_model' does not say how many positions", language=narrow)
    base = old.language()
    (base / "tokenizer.json").unlink()
    refused(stage1, "no tokenizer.json", language=base)
    refused(old.whole(), "leave out --language", kind=ConfigError, language=old.source)
    (old.tower / "model.safetensors").unlink()
    refused(stage1, f"{old.tower}: no pytorch_model.bin", language=old.source)
    (old.tower / "preprocessor_config.json").unlink()
    refused(stage1, "no processor_config.json", language=old.source)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora True is no plain LoRA; merge the adapter with peft"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r 0 and lora_alpha 8"),
        ({"r": 2}, "A and B of rank 2 are needed"),
    ],
)
def test_adapters_that_are_more_than_plain(
    shop: Make, settings: dict[str, Any], reason: str
) -> None:
    folder, _ = shop().adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    refused(folder, reason)


def test_weights_of_adapters(shop: Make) -> None:
    folder, _ = shop().adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    file.unlink()
    refused(folder, "no adapter_model.bin")
    for change, reason in (
        ({name.format("A"): torch.ones(4, 16)}, "is 32 x 16 but the weight has shape [32, 32]"),
        ({name.format("B").replace(".0.", ".7."): torch.ones(32, 4)}, "layers.7.self_attn"),
        ({name.format("A"): torch.full((4, 32), torch.nan)}, "q_proj.weight holds NaN"),
        ({name.format("embedding_A"): torch.ones(1)}, "unexpected weight"),
        (
            {name.format(half).replace(".0.", ".7."): f for half, f in FACTORS.items()},
            "does not have",
        ),
    ):
        torch.save(state | change, file.with_suffix(".bin"))
        refused(folder, reason)
    torch.save(state, file.with_suffix(".bin"))
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, "no non_lora_trainables.bin")


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_import_leaves_nothing(
    shop: Make, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    folder = shop().whole()

    def interrupted(*_: object) -> None:
        raise stop

    monkeypatch.setattr("vlm.processor.Processor.save", interrupted)  # the weights are there
    with pytest.raises(CheckpointError if isinstance(stop, OSError) else KeyboardInterrupt):
        import_original(folder, folder.parent / "out")


def test_nothing_is_overwritten(shop: Make, tmp_path: Path) -> None:
    old = shop()
    folder, target = old.whole(), tmp_path / "target"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for taken in (folder, folder / "config.json"):
        with pytest.raises(CheckpointError, match="nothing is overwritten"):
            import_original(folder, taken)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    target.mkdir()  # an empty folder is taken
    import_original(folder, target)
    load_checkpoint(target)


def test_tokenizers_of_before_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = testing.tiny_text_config("qwen2")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        read_tokenizer(tmp_path, config)
    testing.byte_tokenizer().backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = "the  thing, “3” 🐈"
    assert read_tokenizer(tmp_path, config).encode(text) == testing.byte_tokenizer().encode(text)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'
    )
    with pytest.raises(CheckpointError, match="auto_map"):
        read_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr("vlm.original_tokenizer.is_sentencepiece_available", lambda: False)
    with pytest.raises(MissingExtraError, match="pip install sentencepiece protobuf"):
        read_tokenizer(tmp_path, config)
    monkeypatch.setattr("vlm.original_tokenizer.is_sentencepiece_available", lambda: True)
    monkeypatch.setattr("vlm.original_tokenizer.is_protobuf_available", lambda: True)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: cannot be made"):
        read_tokenizer(tmp_path, config)
