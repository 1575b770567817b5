"""Opening other families: everything is read, nothing of a folder is run, all else is told."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import logging

from vlm import testing
from vlm.assistant import load
from vlm.errors import CheckpointError, MissingExtraError
from vlm.messages import user

PICTURE = testing.draw_image((40, 30), seed=1)
WEIGHTS = "model.safetensors"

Copy = Callable[[str], Path]


@pytest.fixture
def copy(relatives: Callable[[str], Any], tmp_path: Path) -> Copy:
    """A folder of one's own to spoil."""
    return lambda name: shutil.copytree(relatives(name).folder, tmp_path / name)


def edit(path: Path, **values: Any) -> None:
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**raw, **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as told:
        load(folder)
    text = str(told.value)
    assert "\n" not in text and len(text) < 600 and folder.name in text
    return text


@pytest.mark.parametrize("kind", ["bert", "nonesuch", None, ["llava"]])
def test_what_is_no_vision_language_model_is_told(copy: Copy, kind: Any) -> None:
    folder = copy("llava_next")
    edit(folder / "config.json", model_type=kind)
    text = refusal(folder)
    assert repr(kind) in text and "known: llava" in text and "qwen2_vl" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.image_newline", None) or state.popitem(), "1 missing"),
        (lambda state: state.update({"more.weight": torch.zeros(2)}), "1 unexpected.*more.weight"),
        (
            lambda state: state.update({name: torch.zeros(3, 3) for name in [max(state)]}),
            "1 mismatched",
        ),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_weights_and_config_must_agree(
    copy: Copy, change: Any, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy("llava_next")
    change_weights(folder, change)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=words):
        load(folder)
    assert capfd.readouterr().err == ""  # no table besides


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_may_be_absent(copy: Copy, tied: bool) -> None:
    folder = copy("llava_next")
    edit(folder / "config.json", tie_word_embeddings=tied)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text, "tie_word_embeddings": tied})
    change_weights(folder, lambda state: state.pop(next(n for n in state if "lm_head" in n)))
    if tied:
        assert load(folder).ask(PICTURE, "a?", max_new_tokens=2) is not None
    else:
        assert "lm_head" in refusal(folder)


def test_pickled_truncated_and_quantised_weights_are_refused(copy: Copy) -> None:
    folder = copy("llava_next")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:5000])
    refusal(folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "pickled" in refusal(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    assert "quantised" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "qformer_tokenizer/tokenizer_config.json",
    ],
)
def test_a_folder_that_names_code_is_refused(copy: Copy, name: str) -> None:
    folder = copy("instructblip")
    edit(folder / name, auto_map={"AutoModel": "evil.Model"})
    assert "auto_map" in refusal(folder)


def test_a_folder_chooses_no_kernels(copy: Copy) -> None:
    folder = copy("llava_next")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    nested = {**text, "attn_implementation": "evil/kernel"}
    edit(folder / "config.json", text_config=nested)
    assert "'evil/kernel' would fetch code to run" in refusal(folder)
    eager = {**text, "attn_implementation": "eager"}
    edit(folder / "config.json", attn_implementation="eager", text_config=eager)
    config = load(folder).engine.model.config
    assert config._attn_implementation == config.text_config._attn_implementation == "sdpa"


def test_a_folder_chooses_no_other_class(copy: Copy) -> None:
    folder = copy("qwen2_vl")
    edit(folder / "preprocessor_config.json", image_processor_type="BertModel")
    assert "'BertModel'" in refusal(folder)
    folder = copy("llava_next")
    edit(folder / "processor_config.json", audio_tokenizer={"audio_tokenizer_class": "BertModel"})
    assert load(folder).ask(PICTURE, "a?", max_new_tokens=2) is not None


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("llava_next", "chat_template.jinja", "chat_template.jinja.*blip-2"),
        ("llava_next", "processor_config.json", "preprocessor_config.json"),
        ("qwen2_vl", "preprocessor_config.json", "preprocessor_config.json"),
        ("blip2_opt", "tokenizer.json", "tokenizer.json"),
        ("instructblip", "qformer_tokenizer/tokenizer.json", "tokenizer.json"),
        ("paligemma", WEIGHTS, WEIGHTS),
    ],
)
def test_an_absent_file_is_named(copy: Copy, name: str, file: str, words: str) -> None:
    folder = copy(name)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "template"),
        ("{{ raise_exception('not\nso') }}", "not so"),
        ("{{ messages[0]['content'][1]['text'] }}", "<image>"),
    ],
)
def test_a_template_that_cannot_show_a_picture_is_told(
    copy: Copy, template: str, words: str
) -> None:
    folder = copy("llava_next")
    (folder / "chat_template.jinja").write_text(template)
    assert words in refusal(folder)


def test_templates_of_older_folders_are_found(copy: Copy, relatives: Callable[[str], Any]) -> None:
    folder = copy("llava_next")
    template = folder / "chat_template.jinja"
    edit(folder / "chat_template.json", chat_template=template.read_text())
    template.unlink()
    text = load(folder).ask(PICTURE, "a?", max_new_tokens=8)
    assert text == relatives("llava_next").assistant.ask(PICTURE, "a?", max_new_tokens=8)


@pytest.mark.parametrize("first", ["", "{{ bos_token }}"])
def test_the_first_token_is_written_once(copy: Copy, first: str) -> None:
    folder = copy("llava_next")
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    template = folder / "chat_template.jinja"
    template.write_text(first + template.read_text())
    ids = load(folder).prepare([user("a?", PICTURE)]).prompt.input_ids
    assert ids[0] == 1 and ids.count(1) == 1


def test_a_processor_that_forgets_the_picture_is_told(copy: Copy) -> None:
    folder = copy("blip2_opt")
    edit(folder / "processor_config.json", num_query_tokens=None)
    assert "num_query_tokens" in refusal(folder)


# Packages that are not there


def test_smolvlm_without_num2words(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("smolvlm")  # made before the package is gone
    absent(monkeypatch, "num2words")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    assert "pip install num2words" in refusal(folder, MissingExtraError)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("\nPixtralProcessor requires the Torchvision library\nbut", "pip install torchvision"),
        ("TimmBackbone requires the timm library", "pip install timm"),
        ("this processor needs\n`pip install nonesuch`", "pip install nonesuch"),
    ],
)
def test_a_family_that_needs_a_package(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, message: str, words: str
) -> None:
    absent(monkeypatch, words.split()[-1])

    def dummy(*_: object) -> None:
        raise ImportError(message)

    monkeypatch.setattr(hf.LlavaNextProcessor, "__init__", dummy)
    assert words in refusal(copy("llava_next"), MissingExtraError)


def test_a_tokenizer_that_needs_sentencepiece(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "sentencepiece")
    folder = copy("llava_next")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "pip install sentencepiece" in refusal(folder, MissingExtraError)


def absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name)
    )


# What a caller may choose, and what stays as it was


def test_the_image_processor_is_pils(relative: Any) -> None:
    assert relative.assistant.processor.standard.image_processor.backend == "pil"


@pytest.mark.parametrize("name", ["llava_next", "blip2_opt", "idefics", "qwen2_vl", "paligemma"])
def test_precision_is_float32_on_the_cpu_unless_asked(copy: Copy, name: str) -> None:
    folder = copy(name)
    assert load(folder).engine.model.dtype == torch.float32
    half = load(folder, dtype="bfloat16")
    assert half.engine.model.dtype == torch.bfloat16
    assert half.ask(PICTURE, "a?", max_new_tokens=2) is not None


def test_sampling_is_ours_and_not_the_folders(
    copy: Copy, relatives: Callable[[str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy("qwen2_vl")
    options = {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5, "num_beams": 3}
    options |= {"num_return_sequences": 2, "use_cache": False}
    edit(folder / "generation_config.json", **options)
    expected = relatives("qwen2_vl").assistant.ask(PICTURE, "a?", max_new_tokens=12)
    capfd.readouterr()
    assert load(folder).ask(PICTURE, "a?", max_new_tokens=12) == expected
    assert capfd.readouterr().err == ""


def test_about_json_speaks_for_the_model(copy: Copy) -> None:
    folder = copy("blip2_opt")
    assert load(folder).caption_prompt == "a photo of"
    (folder / "about.json").write_text('{"name": "B", "caption_prompt": "a drawing of"}')
    model = load(folder)
    assert (model.name, model.caption_prompt) == ("B", "a drawing of")


def test_opening_leaves_global_state_alone(copy: Copy) -> None:
    torch.manual_seed(0)
    before = (torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled())
    load(copy("llava_next"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before[1:]
