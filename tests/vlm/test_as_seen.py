"""Tokens shown one by one, and pictures as the tower gets them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm import builtin, testing
from vlm.as_seen import AsSeen, Piece
from vlm.images import load_image
from vlm.messages import Message, TextPart, assistant, user
from vlm.pixels import pad_to_square
from vlm.processor import Processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = testing.tiny_llava_folder(tmp_path_factory.mktemp("as_seen") / "model")
    return Processor.from_folder(folder)


TALKS = [
    [user("what is it?", "a.png"), assistant("a cat"), user("sure?"), assistant("yes\n")],
    [user("both?", "a.png", "b.png"), assistant("Zwölf Äpfel 🍎 红色 👩‍👩‍👧, rot")],
    [Message("system", (TextPart("be short"),)), user("</s> <image>"), assistant("<image> </s>")],
    [user("\ufffd lost"), assistant("\ufffd\ufffd")],
]


def spread(pieces: Sequence[Piece]) -> list[bool]:
    return [piece.learnt for piece in pieces for _ in range(piece.num_ids)]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("plain", [False, True])
def test_pieces_are_the_ids_and_the_mask(
    processor: Processor, talk: list[Message], plain: bool
) -> None:
    """Together they are the whole decode, and each has the flag of its ids."""
    chosen = processor.plain() if plain else processor
    seen = AsSeen(chosen)
    ids, mask = seen.encode_ids(talk)
    assert (ids, mask) == chosen.encode_ids(talk)
    pieces = seen.pieces(ids, mask)
    assert spread(pieces) == mask
    for learnt in (True, False):
        shown = [
            piece.text * (piece.num_ids if piece.kind == "picture" else 1)
            for piece in pieces
            if piece.learnt == learnt
        ]
        wanted = [number for number, flag in zip(ids, mask, strict=True) if flag == learnt]
        assert "".join(shown) == processor.tokenizer.decode(wanted, skip_special_tokens=False)
    pictures = [piece for piece in pieces if piece.kind == "picture"]
    assert len(pictures) == sum(len(message.images) for message in talk)
    assert {piece.num_ids for piece in pictures} <= {processor.num_visual_tokens}


def test_a_character_of_several_tokens_is_one_piece(processor: Processor) -> None:
    seen = AsSeen(processor)
    ids = processor.tokenizer.encode("aö🍎b", add_special_tokens=False)
    pieces = seen.pieces(ids, [True] * len(ids))
    assert [(piece.text, piece.num_ids) for piece in pieces] == [
        *(("a", 1), ("ö", 2), ("🍎", 4), ("b", 1))
    ]
    half = seen.pieces(ids[:4], [True, True, False, True])  # a mask that cuts a character
    assert [piece.text for piece in half] == ["a", "\ufffd", "\ufffd", "\ufffd"]
    assert [piece.learnt for piece in half] == [True, True, False, True]


def test_special_tokens_are_told_from_text_that_looks_like_them(processor: Processor) -> None:
    seen = AsSeen(processor)
    pieces = seen.pieces(*seen.encode_ids([user("</s>"), assistant("x")]))
    special = [piece.text for piece in pieces if piece.kind == "special"]
    assert special == ["</s>"]  # the typed one is text
    assert "".join(piece.text for piece in pieces).count("</s>") == 2


def test_a_piece_keeps_its_leading_space() -> None:
    """Where a decoder strips the space of what comes first, as SentencePiece's does."""
    words = {"<unk>": 0, "▁a": 1, "▁cat": 2, "s": 3, "<image>": 4, "a": 5}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert tokenizer.decode([2]) == "cat"

    class Stub:
        num_visual_tokens, context_length, image_token_id, image_token = 1, 10, 4, "<image>"

    Stub.tokenizer = tokenizer  # type: ignore[attr-defined]
    pieces = AsSeen(Stub()).pieces([2, 3, 1], [False] * 3)  # type: ignore[arg-type]
    assert [piece.text for piece in pieces] == [" cat", "s", " a"]


def test_a_picture_is_what_the_tower_gets(processor: Processor, tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 30), "navy")
    wide.paste("red", (0, 0, 20, 30))
    wide.paste("yellow", (70, 0, 90, 30))
    wide.save(tmp_path / "wide.png")
    side = processor.image_size
    assert AsSeen(processor).picture(str(tmp_path / "wide.png")).getcolors() == [
        (side * side, (0, 0, 128))
    ]  # the sides are cut off
    padded = processor.with_image_processor(pad_to_square(processor.image_processor))
    seen = np.asarray(AsSeen(padded).picture((tmp_path / "wide.png").read_bytes()), dtype=int)
    mean = [round(255 * value) for value in padded.image_processor.image_mean]
    assert abs(seen[0, side // 2] - mean).max() <= 1
    middle = seen[side // 2]
    assert (middle[2] == (255, 0, 0)).all() and (middle[-3] == (255, 255, 0)).all()


def test_levels_are_those_before_normalising() -> None:
    processor = Processor.from_folder(builtin.path())
    side = processor.image_size
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    assert (np.asarray(AsSeen(processor).picture(noise)) == np.asarray(noise)).all()
    assert load_image(noise).size == (side, side)
