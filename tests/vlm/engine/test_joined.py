"""Weights that are rearranged where they lie: the same values for everyone who reads them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.engine.packed import Joined, unpack_linears
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.messages import user


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("joined"), "qwen2", 5)


def ask(engine: Engine, number: int, length: int = 12) -> Request:
    pictures = [testing.draw_image(seed=seed) for seed in range(number % 3)]
    prompt = engine.processor.encode(
        [user(f"what {number}", *pictures)], add_generation_prompt=True
    )
    return Request(prompt, Sampling(max_new_tokens=length, stop_loops=False))


def ids(completions: Iterable[object]) -> list[tuple[int, ...]]:
    return [completion.ids for completion in completions]  # type: ignore[attr-defined]


@pytest.mark.parametrize("biased", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_layers_are_those_of_each(
    biased: tuple[bool, bool], packed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Linear(48, size, bias=bias).to(dtype)
        for size, bias in zip((64, 33), biased, strict=True)
    ]
    before = [layer.weight.detach().clone() for layer in layers]
    joined = Joined(layers)
    if packed and not joined.pack():
        assert dtype == torch.bfloat16, "this CPU has no packed products; the test needs them"
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    for rows in (1, 2, 7):
        features = torch.randn(rows, 48).to(dtype)
        with torch.inference_mode():
            plain = [
                F.linear(features, w, layer.bias) for w, layer in zip(before, layers, strict=True)
            ]
            expected = torch.cat(plain, dim=1)
            torch.testing.assert_close(joined(features), expected, atol=allowed, rtol=allowed)
    assert all(torch.equal(w, layer.weight) for w, layer in zip(before, layers, strict=True))


def test_joining_takes_no_memory_and_can_be_undone() -> None:
    layers = [nn.Linear(48, size) for size in (64, 33)]
    before = [layer.weight.detach().clone() for layer in layers]
    parameters = [layer.weight for layer in layers]
    Joined(layers)
    Joined(layers)  # as by another engine of the same model
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1
    assert layers[0].weight.untyped_storage().nbytes() == 48 * (64 + 33) * 4
    assert all(a is layer.weight for a, layer in zip(parameters, layers, strict=True))
    with torch.inference_mode():
        joined = Joined(layers)
    layers[0](torch.randn(2, 48)).sum().backward()  # they can still learn
    assert layers[0].weight.grad is not None
    with torch.no_grad():
        layers[1].weight.add_(1.0)  # and are one with the product
    ones = torch.ones(1, 48)
    expected = torch.cat([layer(ones) for layer in layers], dim=1)
    torch.testing.assert_close(joined(ones), expected)
    unpack_linears(nn.ModuleList(layers))
    assert all(layer.weight.is_contiguous() for layer in layers)
    assert torch.equal(layers[0].weight, before[0])


def test_a_layer_that_is_joined_is_not_packed_once_more(folder: Path) -> None:
    engine = Engine(*load_checkpoint(folder))
    engine.optimize()
    layer = engine.model.language_model.get_decoder().layers[0]
    assert "forward" not in vars(layer.self_attn.q_proj)
    assert "forward" in vars(engine.model.vision_tower.encoder.layers[0].mlp.fc1)


@pytest.mark.parametrize("copies", [False, True])
def test_a_rearranged_model_answers_and_is_saved_as_before(tmp_path: Path, copies: bool) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", "qwen2")
    model, processor = compose(vision, text)
    save_checkpoint(model, processor, tmp_path / "before")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, engine = Engine(model, processor), Engine(model, processor)
    requests = [ask(engine, number) for number in range(5)]
    expected = [plain.generate([request])[0].ids for request in requests]
    engine.optimize(copies)
    assert [engine.generate([request])[0].ids for request in requests] == expected
    assert ids(engine.generate(requests)) == expected == ids(plain.generate(requests))
    assert not model.get_output_embeddings().weight.is_contiguous()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    save_checkpoint(model, processor, tmp_path / "after")
    files = [tmp_path / name / "model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_kept_stream_rearranges_weights_without_copies(folder: Path) -> None:
    engine = Engine(*load_checkpoint(folder))
    size = sum(p.untyped_storage().nbytes() for p in engine.model.parameters())
    list(engine.stream(replace(ask(engine, 1, 3), keep=True)))
    layer = engine.model.language_model.get_decoder().layers[0]
    assert layer.self_attn.q_proj.weight.stride(0) == 1
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in engine.model.parameters()
    }
    assert sum(storages.values()) == size


def test_a_head_that_is_the_embeddings_stays_as_it_is(folder: Path) -> None:
    """Looking tokens up would gather them number by number."""
    model, processor = load_checkpoint(folder)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    engine = Engine(model, processor)
    engine.optimize()
    assert model.get_input_embeddings().weight.is_contiguous()
    assert not model.language_model.get_decoder().layers[0].mlp.up_proj.weight.is_contiguous()
