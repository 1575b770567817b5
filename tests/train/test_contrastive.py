"""The dual encoder: its loss, its gradients, its shapes, its folder."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from train.config import VisionSize
from train.contrastive import DualEncoder, new_vision_tower
from vlm.errors import CheckpointError
from vlm.testing import tiny_vision_config

VOCABULARY = 40
WIDTH = 32
SIDE, PATCH = 28, 14


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(CLIPVisionModel(tiny_vision_config()), VOCABULARY)


def batch(side: int = SIDE) -> dict[str, torch.Tensor]:
    """Three pictures and four texts; two pictures share a text, one has two."""
    random = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, side, side, generator=random),
        "text_ids": torch.randint(1, VOCABULARY, (4, 5), generator=random),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1] * 5]),
        "targets": torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]),
    }


def mean_nll(similarity: list[list[float]], targets: list[list[float]]) -> float:
    """Of each row the mean of -log softmax over its right answers; then the mean of rows."""
    rows = []
    for row, wanted in zip(similarity, targets, strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        right = [total - value for value, flag in zip(row, wanted, strict=True) if flag]
        rows.append(sum(right) / len(right))
    return sum(rows) / len(rows)


@torch.no_grad()
def test_the_loss_is_that_of_a_plain_loop(model: DualEncoder) -> None:
    inputs = batch()
    output = model(**inputs)
    patches = model.encode_patches(inputs["pixel_values"]).tolist()
    texts = model.encode_texts(inputs["text_ids"], inputs["text_mask"]).tolist()
    similarity = [
        [
            10 * max(sum(a * b for a, b in zip(p, text, strict=True)) for p in picture)
            for text in texts
        ]
        for picture in patches
    ]
    targets = inputs["targets"]
    columns = [list(column) for column in zip(*similarity, strict=True)]
    expected = (mean_nll(similarity, targets.tolist()) + mean_nll(columns, targets.T.tolist())) / 2
    assert torch.allclose(output["similarity"], torch.tensor(similarity), atol=1e-4)
    assert abs(output["loss"].item() - expected) < 1e-4


@torch.no_grad()
def test_a_better_match_costs_less(model: DualEncoder) -> None:
    inputs = batch()
    best = model(**inputs)["similarity"].argmax(1)
    right = torch.nn.functional.one_hot(best, 4).float()
    right[0] += 1 - right.sum(0).clamp(max=1)  # every text belongs somewhere
    shifted = right.roll(1, dims=0)
    losses = [model(**inputs | {"targets": targets})["loss"] for targets in (right, shifted)]
    assert losses[0] < losses[1]


def test_gradients_reach_every_part(model: DualEncoder) -> None:
    model(**batch())["loss"].backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Only patches meet texts, so nothing asks for CLIP's pooled class token.
    assert all("post_layernorm" in name for name in silent)


@torch.no_grad()
def test_vectors_have_their_shapes_and_length_one(model: DualEncoder) -> None:
    inputs = batch()
    patches = model.encode_patches(inputs["pixel_values"])
    texts = model.encode_texts(inputs["text_ids"], inputs["text_mask"])
    assert patches.shape == (3, (SIDE // PATCH) ** 2, WIDTH) and texts.shape == (4, WIDTH)
    assert model(**inputs)["similarity"].shape == (3, 4)
    for vectors in (patches, texts):
        assert torch.allclose(vectors.norm(dim=-1), torch.tensor(1.0), atol=1e-5)


@torch.no_grad()
def test_padding_changes_no_text(model: DualEncoder) -> None:
    ids, mask = batch()["text_ids"], batch()["text_mask"]
    vectors = model.encode_texts(ids, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model.encode_texts(ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert torch.allclose(alone[0], vectors[row], atol=1e-5)


@torch.no_grad()
def test_patches_are_those_of_the_tower(model: DualEncoder) -> None:
    pixels = batch()["pixel_values"]
    states = model.vision_tower(pixels).last_hidden_state[:, 1:]
    expected = torch.nn.functional.normalize(model.vision_head(states), dim=-1)
    assert torch.allclose(model.encode_patches(pixels), expected, atol=1e-5)


@torch.no_grad()
def test_a_close_up_uses_positions_of_the_full_grid() -> None:
    torch.manual_seed(0)
    wide = DualEncoder(tower(3 * PATCH), VOCABULARY)  # 3 x 3 patches, and close-ups of 2 x 2
    close_up = batch()["pixel_values"][:1]
    table = "vision_tower.embeddings.position_embedding.weight"
    possible = []
    for corner in (0, 1, 3, 4):
        places = [0, *(1 + corner + step for step in (0, 1, 3, 4))]  # the class token, then 2 x 2
        small = DualEncoder(tower(2 * PATCH), VOCABULARY)
        state = wide.state_dict()
        small.load_state_dict(state | {table: state[table][places]})
        possible.append(small.encode_patches(close_up))
    seen = set()
    for _ in range(40):
        vectors = wide.encode_patches(close_up)
        gaps = [float((vectors - other).abs().max()) for other in possible]
        assert min(gaps) < 1e-5
        seen.add(gaps.index(min(gaps)))
    assert seen == {0, 1, 2, 3}


def tower(side: int) -> CLIPVisionModel:
    config = tiny_vision_config()
    config.image_size = side
    return CLIPVisionModel(config)


def test_the_folder_gives_back_the_same(model: DualEncoder, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = DualEncoder.from_folder(tmp_path, VOCABULARY)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    tower = CLIPVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tower[n], t) for n, t in model.vision_tower.state_dict().items())


def test_a_plain_tower_gets_a_new_text_tower(model: DualEncoder, tmp_path: Path) -> None:
    model.vision_tower.save_pretrained(tmp_path)
    again = DualEncoder.from_folder(tmp_path, VOCABULARY + 1)
    assert torch.equal(
        again.vision_tower.embeddings.class_embedding, model.vision_tower.embeddings.class_embedding
    )
    assert again.text_tower.get_input_embeddings().num_embeddings == VOCABULARY + 1


def test_a_rest_that_does_not_fit_is_refused(model: DualEncoder, tmp_path: Path) -> None:
    model.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"dual_encoder\.safetensors does not fit"):
        DualEncoder.from_folder(tmp_path, VOCABULARY + 1)
    rest = load_file(tmp_path / "dual_encoder.safetensors")
    rest["odd"] = rest.pop("log_scale")
    save_file(rest, tmp_path / "dual_encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"missing keys \['log_scale'\].*\['odd'\]"):
        DualEncoder.from_folder(tmp_path, VOCABULARY)


def test_a_new_tower_has_the_wanted_size() -> None:
    size = VisionSize(image_size=32, patch_size=8, hidden_size=16, num_layers=2, num_heads=4)
    tower = new_vision_tower(size)
    assert tower(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 1 + 16, 16)
    assert len(tower.encoder.layers) == 2 and tower.config.num_attention_heads == 4
