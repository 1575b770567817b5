"""Folders in the original LLaVA repository's layout, written by hand from a standard one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vlm import testing

State = dict[str, torch.Tensor]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
NAMES = {
    "language_model.": "",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "tokenizer_model_max_length": 384,
    "use_mm_proj": True,
}


def old_names(source: Path) -> State:
    """The weights of a standard folder by the names of the original repository."""
    state = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        prefix = next(p for p in NAMES if name.startswith(p))
        rest = name.removeprefix(prefix).removeprefix("vision_model.")
        state[NAMES[prefix] + rest] = tensor
    return state


class Workshop:
    """A standard folder, and old-layout folders with the same weights beside it."""

    def __init__(self, path: Path, language: testing.Language = "llama", **options: Any) -> None:
        self.path = path
        self.source = testing.tiny_llava_folder(path / "source", language, seed=5, **options)
        self.state = old_names(self.source)
        self.text = json.loads((self.source / "config.json").read_text())["text_config"]
        self.text["rope_theta"] = self.text.pop("rope_parameters")["rope_theta"]
        self.text["torch_dtype"] = "float32"
        tower = CLIPVisionModel(testing.tiny_vision_config())
        prefix = NAMES["vision_tower."]
        wanted = {n.removeprefix(prefix): t for n, t in self.state.items() if prefix in n}
        tower.load_state_dict(wanted)
        tower.save_pretrained(path / "tower")
        testing.image_processor().save_pretrained(path / "tower")
        self.tower = path / "tower"

    def select(self, *words: str) -> State:
        return {n: t for n, t in self.state.items() if any(word in n for word in words)}

    def without(self, *words: str) -> State:
        return {n: t for n, t in self.state.items() if n not in self.select(*words)}

    def folder(self, name: str, **settings: Any) -> Path:
        """A folder with config and tokenizer, and no weights."""
        folder = self.path / name
        folder.mkdir()
        config = {**self.text, **LLAVA, "mm_vision_tower": str(self.tower), **settings}
        (folder / "config.json").write_text(json.dumps(config))
        testing.byte_tokenizer().save_pretrained(folder)
        return folder

    def whole(self, name: str = "old", *, num_shards: int = 1, **settings: Any) -> Path:
        folder = self.folder(name, **settings)
        state = self.without("vision_tower")
        if num_shards == 1:
            torch.save(state, folder / PICKLE)
            return folder
        files = [f"pytorch_model-{i:05}-of-{num_shards:05}.bin" for i in range(1, num_shards + 1)]
        for i, file in enumerate(files):
            torch.save({n: state[n] for n in list(state)[i::num_shards]}, folder / file)
        where = {name: files[i % num_shards] for i, name in enumerate(state)}
        (folder / f"{PICKLE}.index.json").write_text(json.dumps({"weight_map": where}))
        return folder

    def language(self, *, pickled: bool = True) -> Path:
        """The language model alone, in its own layout."""
        folder = self.path / "language"
        folder.mkdir()
        config = {**self.text, "architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        state = self.without("vision_tower", "mm_projector")
        if pickled:
            torch.save(state, folder / PICKLE)
        else:
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        testing.byte_tokenizer().save_pretrained(folder)
        return folder

    def projector(self, **settings: Any) -> Path:
        folder = self.folder("stage1", architectures=["LlamaForCausalLM"], **settings)
        (folder / "tokenizer.json").unlink()
        torch.save(self.select("mm_projector"), folder / "mm_projector.bin")
        return folder

    def adapter(self, config: LoraConfig, **settings: Any) -> tuple[Path, torch.nn.Module]:
        """A folder with an adapter of random weights, and peft's own model with it."""
        base = self.language(pickled=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = self.folder("lora", **settings)
        adapted.save_pretrained(folder)
        projector = self.select("mm_projector")
        rest = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
        torch.save(rest, folder / "non_lora_trainables.bin")
        return folder, adapted


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., Workshop]:
    def make(language: testing.Language = "llama", **options: Any) -> Workshop:
        return Workshop(tmp_path, language, **options)

    return make
