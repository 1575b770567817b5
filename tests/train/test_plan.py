"""The plan: bytes against real tensors, activations against what autograd keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from train.attention import Tree, packed_rows
from train.optimizer import MuonWithAdamW, build_optimizer, parameter_groups
from train.outline import meta_model
from train.plan import flops_of, plan, plan_recipe
from train.plan_memory import Load, activation_bytes, memory_of
from train.settings import RunConfig
from train.stages import STAGES, apply_stage
from train.trial import enable_packing
from vlm.checkpoint import load_checkpoint
from vlm.errors import ConfigError
from vlm.messages import read_records
from vlm.model import VisionLanguageModel
from vlm.testing import draw_image

LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
TOKENS = 512


def small(hidden: int = 128, layers: int = 4, heads: int = 4) -> LlavaConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": hidden, "intermediate_size": 344, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 1000}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=5,
        dtype=torch.float32,
    )


def config_of(stage: str = "instruct", **values: Any) -> RunConfig:
    model = {"start": "x"} if stage == "instruct" else {"vision": "x", "language": "x"}
    fixed = {"stage": stage, "output": "x", "data": ["x"], "model": model, "learning_rate": 1e-3}
    return RunConfig.model_validate({**fixed, "batch_size": 8, **values})


def kept_by_autograd(config: RunConfig, found: LlavaConfig) -> int:
    """Bytes that the graph of a forward pass holds besides the parameters."""
    model = VisionLanguageModel(found)
    apply_stage(model, STAGES[config.stage], config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    assert enable_packing(model.language_model) is None
    ids = torch.randint(6, 900, (1, TOKENS))
    labels = torch.full((1, TOKENS), -100)
    labels[0, -TOKENS // 8 :] = 7
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    places = torch.arange(TOKENS)[None]
    half = config.precision == "bfloat16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        packed_rows([Tree(0, TOKENS)], labels),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        _ = model(inputs_embeds=embeds, position_ids=places, labels=labels).loss
    return sum(seen.values())


@pytest.mark.parametrize("hidden", [128, 256])
@pytest.mark.parametrize(
    "values",
    [
        {"stage": "align"},
        {"lora": LORA},
        {"lora": {**LORA, "dropout": 0.05}},
        {},
        {"lora": LORA, "precision": "bfloat16"},
        {"precision": "bfloat16"},
    ],
    ids=["align", "lora", "dropout", "full", "lora-bfloat16", "full-bfloat16"],
)
def test_activations_are_those_that_autograd_keeps(values: dict[str, Any], hidden: int) -> None:
    config, found = config_of(**values), small(hidden, layers=8)
    text = found.text_config
    d, f, each = text.hidden_size, text.intermediate_size, 2 if config.precision != "float32" else 4
    logits = TOKENS // 8 * text.vocab_size * 4
    working = TOKENS * (2 * f + 3 * d) * each  # of the backward pass, which has not begun
    predicted = activation_bytes(config, found, TOKENS, TOKENS // 8) - working + logits
    assert predicted == pytest.approx(kept_by_autograd(config, found), rel=0.1)


def test_checkpointing_keeps_an_input_a_layer() -> None:
    found = small(256, layers=12)
    config = config_of(lora=LORA, gradient_checkpointing=True)
    kept = kept_by_autograd(config, found)
    by_layers = TOKENS * 12 * 256 * 4
    assert kept == pytest.approx(by_layers, rel=0.2)
    assert by_layers < activation_bytes(config, found, TOKENS, TOKENS // 8)
    without = activation_bytes(config_of(lora=LORA), found, TOKENS, TOKENS // 8)
    assert activation_bytes(config, found, TOKENS, TOKENS // 8) < without / 3


@pytest.mark.parametrize("values", [{"stage": "align"}, {"lora": LORA}, {}])
@pytest.mark.parametrize("again", [False, True])
def test_operations_are_those_that_torch_counts(values: dict[str, Any], again: bool) -> None:
    """Few tokens: torch does not count a CPU's attention. Nor does it repeat a last product."""
    config, found = config_of(**values, gradient_checkpointing=again), small(256)
    model = VisionLanguageModel(found)
    apply_stage(model, STAGES[config.stage], config.lora)
    if again:
        model.gradient_checkpointing_enable()
    tokens, learnt = 16, 8
    labels = torch.full((1, tokens), -100)
    labels[0, -learnt:] = 7
    embeds = torch.randn(1, tokens, 256, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = model(inputs_embeds=embeds, labels=labels).loss
        assert loss is not None
        loss.backward()
    predicted = flops_of(config, model, Load(tokens, learnt, 0))
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.08 if again else 0.03)


def test_what_is_stored_in_half_precision_is_kept_so_only_where_it_is_frozen() -> None:
    found = small()
    sizes = {}
    for dtype in (torch.float16, torch.float32):
        found.dtype = dtype
        for precision in ("bfloat16", "float32"):
            config = config_of(lora=LORA, precision=precision)
            model = meta_model(config, found)[0]
            parts = memory_of(config, model, Load(300, 100), 1, 1)
            sizes[dtype, precision] = parts["frozen weights"]
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert parts["trained weights"] == parts["gradients"] == 4 * trained
    single = sizes[torch.float32, "float32"]
    assert sizes[torch.float16, "float32"] == sizes[torch.float32, "bfloat16"] == single
    assert sizes[torch.float16, "bfloat16"] == single / 2


def test_muon_keeps_one_number_a_weight_of_its_matrices() -> None:
    config, found = config_of(optimizer="muon"), small()
    model = VisionLanguageModel(found)
    apply_stage(model, STAGES[config.stage], None)
    groups = parameter_groups(
        model, learning_rate=1e-3, weight_decay=0, projector_learning_rate=None, muon=True
    )
    optimizer = build_optimizer(groups, muon=True)
    assert isinstance(optimizer, MuonWithAdamW)
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    kept = [
        tensor.nbytes
        for inner in optimizer.state_dict()["inner"]
        for state in inner["state"].values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.ndim
    ]
    assert memory_of(config, model, Load(300, 100), 1, 1)["optimiser"] == sum(kept)


@pytest.mark.parametrize("values", [{"stage": "align"}, {"lora": LORA}, {}])
def test_weights_gradients_and_states_are_those_of_real_tensors(values: dict[str, Any]) -> None:
    config, found = config_of(**values), small()
    model = VisionLanguageModel(found)
    apply_stage(model, STAGES[config.stage], config.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()  # type: ignore[union-attr]
    optimizer.step()
    states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    parts = memory_of(config, meta_model(config, found)[0], Load(300, 100), 1, 1)
    gradients = [p.grad for p in trained if p.grad is not None]
    for name, tensors in (
        ("frozen weights", frozen),
        ("trained weights", trained),
        ("gradients", gradients),
        ("optimiser", states),
    ):
        assert parts[name] == sum(t.nbytes for t in tensors), name


def test_sharding_divides_what_it_says() -> None:
    model = meta_model(config_of(), small())[0]
    sizes = {
        kind: memory_of(config_of(sharding=kind), model, Load(300, 100), 1, 4)
        for kind in ("none", "zero2", "fsdp2")
    }
    whole = sizes["none"]
    assert sizes["zero2"]["optimiser"] == whole["optimiser"] / 4
    assert sizes["zero2"]["trained weights"] == whole["trained weights"]
    assert sizes["fsdp2"]["trained weights"] == whole["trained weights"] / 4
    assert whole["reduction"] == whole["gradients"] and "reduction" not in sizes["fsdp2"]
    # Two decoder layers, and what is in no layer, are whole for a while.
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n and "lang" in n)
    loose = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    assert sizes["fsdp2"]["gathered"] == 4 * (2 * layer + loose)


def test_the_micro_batch_fits_and_keeps_the_global_batch() -> None:
    config, found = config_of(batch_size=16, gradient_accumulation=2), small()
    model = meta_model(config, found)[0]
    load = Load(2000, 100)
    needed = {n: sum(memory_of(config, model, load, n, 1).values()) for n in (1, 2, 4, 8, 16, 32)}
    for most in (2, 8, 32):
        made = plan(config, model, load, records=3200, memory=needed[most] * 1.01 / 0.95 / 1e9)
        assert (made.micro_batch, made.micro_batch * made.accumulation) == (most, 32)
        assert made.tokens == 3200 * 2000
    with pytest.raises(ConfigError, match=r"one record a card needs .* try train LoRA"):
        plan(config, model, load, records=1, memory=0.5)


@pytest.fixture
def seven_b(tmp_path: Path) -> tuple[str, str]:
    """CLIP ViT-L/14 at 336 and Llama 7B, by their configs alone."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    CLIPVisionConfig(**vision).save_pretrained(tmp_path / "clip")
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "clip"), str(tmp_path / "llama")


def test_llava_1_5_is_planned_from_configs_alone(seven_b: tuple[str, str]) -> None:
    asked: dict[str, Any] = {"records": 665_298, "tokens": 800, "parts": seven_b, "gpus": 8}
    lora = plan_recipe("llava-1.5-7b-instruct-lora", [], memory=80.0, **asked)
    assert lora.parameters["language_model"] == pytest.approx(6.74e9, rel=0.01)
    # of rank 128 on four products of 4096 x 4096 and three of 4096 x 11008, in 32 layers
    assert lora.parameters["adapter"] == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert lora.micro_batch * lora.accumulation == 16
    assert lora.memory["frozen weights"] == pytest.approx(2 * (6.74e9 + 0.3e9), rel=0.02)
    # 6 operations a weight and token without weight gradients' 2, with the pass that is repeated
    assert lora.flops == pytest.approx(665_298 * 800 * 6 * 6.6e9, rel=0.15)
    small = plan_recipe("llava-1.5-7b-instruct-qlora", [], memory=24.0, **asked)
    assert small.memory["frozen weights"] < 0.35 * lora.memory["frozen weights"]
    with pytest.raises(ConfigError, match="one record a card needs"):
        plan_recipe("llava-1.5-7b-instruct-full", ["sharding=none"], memory=80.0, **asked)
    whole = plan_recipe("llava-1.5-7b-instruct-full", [], memory=80.0, **asked)
    assert whole.hours > lora.hours


def test_the_command_prints_and_refuses(
    seven_b: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.cli import main

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["vlm", "plan", *words])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    name, given = "llava-1.5-7b-instruct-lora", ("--records", "1000", "--parts", *seven_b)
    assert run(name, *given, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == sum(told["memory"].values()) and told["micro_batch"] >= 1
    assert run(name, *given) == 0 and "activations" in capsys.readouterr().out
    assert run(name, *given, "--memory", "8") == 2
    assert "model.quantize=4bit" in capsys.readouterr().err
    assert run("builtin-tower", *given) == 2
    assert "plan align or instruct" in capsys.readouterr().err


def test_tokens_are_those_of_the_data(
    tmp_path: Path, recipe: Callable[..., str], write_records: Callable[..., str], llava: str
) -> None:
    draw_image().save(tmp_path / "a.png")
    # Sixty short records, then sixty long ones: the beginning alone would tell too little.
    rows = [(["a.png"] if n % 2 else [], "what?", "a dog " * (1 + n // 60 * 9)) for n in range(120)]
    data = write_records(tmp_path, rows)
    path = recipe(tmp_path / "out", stage="instruct", data=[data], model={"start": llava})
    found = plan_recipe(path, [], records=None, tokens=None, parts=None, gpus=1)
    processor = load_checkpoint(llava)[1]
    encoded = [processor.encode_ids(record.messages) for record in read_records(data)]
    assert found.load.tokens == int(sum(len(ids) for ids, _ in encoded) / len(encoded))
    assert found.load.pictures == 0.5
    said = plan_recipe(path, [], records=None, tokens=77, parts=None, gpus=1)
    assert said.load.tokens == 77
