"""Packed rows: loss and gradients of the records one by one, whatever they share."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from train.attention import PACKED, Tree, packed_rows
from train.collate import DialogueCollator
from train.dialogues import Dialogues
from train.packing import Row, pack, trees_of
from train.settings import BatchConfig
from train.trial import enable_packing
from vlm import testing
from vlm.checkpoint import compose, load_checkpoint
from vlm.messages import Record, assistant, user
from vlm.model import VisionLanguageModel

IMAGE = 9  # of hand-made rows


def row(text: str, pictures: Sequence[str] = (), learnt: int = 1) -> Row:
    """Letters as tokens; ``@`` is a picture of two visual tokens."""
    ids = [n for c in text for n in ([IMAGE] * 2 if c == "@" else [ord(c)])]
    return Row(ids, [at >= len(ids) - learnt for at in range(len(ids))], tuple(pictures))


def test_records_of_one_picture_share_their_beginning() -> None:
    packed = pack([row("b@xyA", "p"), row("text"), row("b@xzzB", "p")], IMAGE, share=True)
    assert packed.trees == [Tree(0, 4, (2, 3)), Tree(9, 4)]
    letters = [ord(c) for c in "yAzzBtext"]
    assert packed.input_ids == [ord("b"), IMAGE, IMAGE, ord("x"), *letters]
    assert packed.position_ids == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 3]
    learnt = [n if n != -100 else 0 for n in packed.labels]
    assert learnt == [0, 0, 0, 0, 0, ord("A"), 0, 0, ord("B"), 0, 0, 0, ord("t")]
    assert packed.pictures == ["p"]


@pytest.mark.parametrize(
    ("rows", "trees"),
    [
        ([row("b@xA", "p"), row("b@xA", "q")], [Tree(0, 5), Tree(5, 5)]),  # other pictures
        ([row("bx@A", "p"), row("by@A", "p")], [Tree(0, 5), Tree(5, 5)]),  # words come first
        ([row("b@xA", "p"), row("b@xB", "p")], [Tree(0, 3, (2, 2))]),  # what A follows is its own
        ([row("b@xAB", "p", 2), row("b@xAC", "p", 2)], [Tree(0, 3, (3, 3))]),
        ([row("b@A", "p"), row("b@B", "p")], [Tree(0, 4), Tree(4, 4)]),  # it would cut the picture
        ([row("b@x@yA", "pq"), row("b@x@zB", "pq")], [Tree(0, 6, (2, 2))]),
        ([row("b@x@yA", "pq"), row("b@xx@B", "pq")], [Tree(0, 4, (4, 4))]),
        ([row("same"), row("same")], [Tree(0, 4), Tree(4, 4)]),
    ],
)
def test_what_is_shared(rows: list[Row], trees: list[Tree]) -> None:
    packed = pack(rows, IMAGE, share=True)
    assert packed.trees == trees
    assert trees_of(packed.tensors()["trees"]) == trees
    assert len(packed.pictures) * 2 == packed.input_ids.count(IMAGE)
    apart = pack(rows, IMAGE, share=False)
    assert [tree.branches for tree in apart.trees] == [(), ()]
    assert len(apart.pictures) * 2 == apart.input_ids.count(IMAGE)


def test_pictures_keep_the_order_of_their_tokens() -> None:
    rows = [row("b@x@yA", "pq"), row("@B", "r"), row("b@xx@B", "pq")]
    assert pack(rows, IMAGE, share=True).pictures == ["p", "q", "q", "r"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Three questions about one picture, two about another, two pictures at once, one none."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"{i}.png") for i in range(3)]
    for seed, path in enumerate(paths):
        testing.draw_image(seed=seed).save(path)
    one, two, three = paths
    turns = [
        ("what is it?", "a fish", (one,)),
        ("what colour?", "red and blue and green", (one,)),
        ("no picture?", "none at all", ()),
        ("where?", "left", (two,)),
        ("what else is here?", "nothing", (one,)),
        ("where is that?", "up", (two,)),
        ("which is which?", "the first", (two, three)),
    ]
    made = []
    for number, (question, answer, pictures) in enumerate(turns):
        dialogue = (user(question, *pictures), assistant(answer))
        made.append(Record(str(number), pictures, dialogue))
    return made


def learn(
    model: VisionLanguageModel, batches: Sequence[dict[str, Tensor]], dialogues: Dialogues | None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all batches together, as one global batch."""
    model.zero_grad()
    count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        if dialogues is None:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
        else:
            with dialogues.around(batch) as inputs:
                loss = model(**inputs, num_items_in_batch=count).loss
                loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(
    got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert got[1].keys() == expected[1].keys()
    whole = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():  # some are zero but for rounding: keys' biases
        off = (got[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * whole)
        assert off <= 1e-5, f"{name}: {off}"


@pytest.mark.parametrize("language", get_args(testing.Language))
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_are_those_of_single_records(
    tmp_path: Path, language: testing.Language, share: bool, records: list[Record]
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    model, processor = compose(vision, testing.tiny_language_folder(tmp_path / "l", language))
    model.requires_grad_(True).eval()
    alone = [DialogueCollator(processor)([record]) for record in records]
    expected = learn(model, alone, None)
    dialogues = Dialogues(model, processor, BatchConfig(share_pictures=share))
    assert dialogues.padded_because is None
    batch = dialogues.collate(records)
    assert batch["input_ids"].shape[0] == 1
    assert len(batch["pixel_values"]) == (4 if share else 7)
    check_same(learn(model, [batch], dialogues), expected)


def test_the_last_layer_ends_where_something_is_learnt(llava: str, records: list[Record]) -> None:
    model, processor = load_checkpoint(llava)
    dialogues = Dialogues(model, processor, BatchConfig())
    mlps = [layer.mlp for layer in model.language_model.get_decoder().layers]
    seen: dict[int, int] = {}
    for number, mlp in enumerate(mlps):
        mlp.down_proj.register_forward_hook(
            lambda m, a, out, n=number: seen.update({n: out.shape[1]})
        )
    batch = dialogues.collate(records)
    with dialogues.around(batch) as inputs:
        model(**inputs)
    learnt = int((batch["labels"] != -100).sum())
    assert list(seen.values()) == [batch["labels"].shape[1]] * (len(mlps) - 1) + [learnt]


@pytest.mark.parametrize("language", ["llama", "mistral"])
def test_with_gradient_checkpointing(
    tmp_path: Path, language: testing.Language, records: list[Record]
) -> None:
    """Layers run again in backward, by the same blocks."""
    vision = testing.tiny_vision_folder(tmp_path / "v")
    model, processor = compose(vision, testing.tiny_language_folder(tmp_path / "l", language))
    model.requires_grad_(True).train()
    expected = learn(model, [DialogueCollator(processor)([r]) for r in records], None)
    dialogues = Dialogues(model, processor, BatchConfig())
    model.gradient_checkpointing_enable()
    check_same(learn(model, [dialogues.collate(records)], dialogues), expected)


def test_any_records_in_any_order(llava: str, records: list[Record]) -> None:
    model, processor = load_checkpoint(llava)
    model.requires_grad_(True).eval()
    dialogues = Dialogues(model, processor, BatchConfig())
    draw = random.Random(0)
    for _ in range(5):
        some = draw.sample(records, draw.randint(1, len(records)))
        alone = [DialogueCollator(processor)([record]) for record in some]
        packed = learn(model, [dialogues.collate(some)], dialogues)
        check_same(packed, learn(model, alone, None))


def test_a_padded_batch_still_goes_through_transformers_attention(
    llava: str, records: list[Record]
) -> None:
    model, processor = load_checkpoint(llava)
    batch = DialogueCollator(processor)(records)
    with torch.no_grad():
        expected = model(**batch).loss
        assert enable_packing(model.language_model) is None
        assert model.language_model.config._attn_implementation == PACKED
        torch.testing.assert_close(model(**batch).loss, expected)


def test_a_window_is_as_far_back_as_in_transformers(tmp_path: Path) -> None:
    folder = testing.tiny_language_folder(tmp_path / "l", "mistral")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.sliding_window = 3
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        records = [ids[:, :9], torch.cat([ids[:, :5], ids[:, 9:16]], dim=1), ids[:, 16:]]
        expected = torch.cat([model(each).logits[0] for each in records])
        assert enable_packing(model) is None
        places = torch.tensor([[*range(9), *range(5, 12), *range(4)]])
        with packed_rows([Tree(0, 5, (4, 7)), Tree(16, 4)]):
            got = model(ids, position_ids=places).logits[0]
    again = torch.cat([got[:9], got[:5], got[9:]])
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


class Lonely(nn.Module):
    """Attention that asks nobody."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(1), None


def test_a_decoder_with_an_attention_of_its_own_is_padded(
    llava: str, records: list[Record]
) -> None:
    model, processor = load_checkpoint(llava)
    decoder: Any = model.language_model.get_decoder()
    decoder.layers[0].self_attn = Lonely()
    before = model.language_model.config._attn_implementation
    dialogues = Dialogues(model, processor, BatchConfig())
    assert dialogues.padded_because is not None and "interface" in dialogues.padded_because
    assert model.language_model.config._attn_implementation == before
    assert "attention_mask" in dialogues.collate(records)


def test_attention_dropout_is_not_lost(llava: str) -> None:
    model, processor = load_checkpoint(llava)
    model.language_model.config.attention_dropout = 0.1
    dialogues = Dialogues(model, processor, BatchConfig())
    assert dialogues.padded_because == "its attention has a dropout of 0.1"
