"""Pieces of text: whole characters only, and nothing lost."""

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models

from vlm.engine.stream import Detokenizer
from vlm.testing import byte_tokenizer

TEXTS = [
    "plain words",
    "naïve café — 12 €",
    "👩‍👩‍👧 and 🇨🇭",
    "日本語と العربية",
    "  spaces  at both ends  ",
    "a genuine \ufffd inside",
    "ends in \ufffd",
    "",
]


def decode_bytes(ids: Sequence[int]) -> str:
    return byte_tokenizer().decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def pieces_of(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.add(number) for number in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    ids = byte_tokenizer().encode(text, add_special_tokens=False)
    assert len(ids) >= len(text) // 2  # the tokenizer does split characters into bytes
    pieces = pieces_of(Detokenizer(decode_bytes), ids)
    assert "".join(pieces) == text
    genuine = text.count("\ufffd")
    assert sum(piece.count("\ufffd") for piece in pieces) == genuine


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_cut_after_any_token_joins_to_its_decode(text: str) -> None:
    ids = byte_tokenizer().encode(text, add_special_tokens=False)
    for end in range(len(ids)):
        assert "".join(pieces_of(Detokenizer(decode_bytes), ids[:end])) == decode_bytes(ids[:end])


def test_a_character_comes_with_its_last_byte() -> None:
    ids = byte_tokenizer().encode("x€y", add_special_tokens=False)
    assert pieces_of(Detokenizer(decode_bytes), ids) == ["x", "", "", "€", "y", ""]


def test_bytes_that_are_no_utf8_are_shown_and_not_dropped() -> None:
    lone, x = byte_tokenizer().convert_tokens_to_ids(["ÿ", "x"])  # Ġ alphabet: ÿ is byte 0xFF
    ids = [lone, x, lone, lone]
    assert "".join(pieces_of(Detokenizer(decode_bytes), ids)) == decode_bytes(ids)


def test_special_tokens_give_no_text() -> None:
    end = byte_tokenizer().eos_token_id
    ids = [*byte_tokenizer().encode("ab", add_special_tokens=False), end]
    assert "".join(pieces_of(Detokenizer(decode_bytes), ids)) == "ab"


def byte_fallback() -> Tokenizer:
    """Llama's decoder, which shows a run of bytes as U+FFFD while its end is incomplete."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def test_byte_fallback_takes_back_nothing() -> None:
    decode = byte_fallback().decode
    ids = [256, *"你好".encode(), 256]
    assert decode(ids[:5]) == " a\ufffd\ufffd\ufffd\ufffd"  # 你 is gone while 好 is incomplete
    pieces = pieces_of(Detokenizer(decode), ids)
    assert pieces == [" a", "", "", "你", "", "", "好", " a", ""]


def test_byte_fallback_cut_inside_a_character_keeps_what_was_whole() -> None:
    ids = [256, *"你好".encode()[:5]]
    text = "".join(pieces_of(Detokenizer(byte_fallback().decode), ids))
    assert text == " a你\ufffd\ufffd"
