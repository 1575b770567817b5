"""What the turns of a record show: lost answers, stray tokens, lengths, scripts."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from data_recipes.doctor.kinds import reading_kind
from data_recipes.tokens import TokenCounter
from vlm.errors import MessageError
from vlm.messages import ImagePart, Record, check_content, check_order

# Of the common templates; those of the model at hand are looked for as well.
KNOWN_TOKENS = (
    "<image>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>",
    "<|system|>", "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip

# C0 without tab and line ends, DEL, C1, marks that turn the direction, what decoding lost
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd]")
_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
    "Kana": "\u3040-\u30ff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff",
}
_PATTERNS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}


class TextCheck:
    """Checks the turns of records, and counts tokens.

    Args:
        processor: of the model that will be trained; without one lengths go unchecked.
        special_tokens: of its tokenizer, looked for in addition to the common ones.
    """

    def __init__(self, processor: TokenCounter | None, special_tokens: Sequence[str] = ()) -> None:
        self._processor = processor
        tokens = sorted(
            {*KNOWN_TOKENS, *(token for token in special_tokens if len(token.strip()) > 1)},
            key=len,
            reverse=True,
        )
        self._tokens = re.compile("|".join(map(re.escape, tokens)))
        self.num_tokens: Counter[int] = Counter()
        self.num_characters: Counter[int] = Counter()
        self.scripts: Counter[str] = Counter()

    def __call__(self, record: Record) -> Iterator[tuple[str, str]]:
        """Code and reason of each fault in the turns."""
        text, places = "\n".join(message.text for message in record.messages), 0
        try:
            if record.messages:
                check_order(record.messages)
            for message in record.messages:
                check_content(message, message.role)
                places += sum(isinstance(part, ImagePart) for part in message.content)
        except MessageError as error:
            yield reading_kind("malformed", str(error)), str(error)
            return
        if record.messages and places != len(record.images):
            yield "image_mismatch", f"{len(record.images)} pictures for {places} image places"
        self.num_characters[len(text).bit_length()] += 1
        self.scripts[script(text)] += 1
        if found := self._tokens.search(text):
            yield "special_token", f"the text holds {found[0]!r}"
        if bad := _CONTROL.search(text):
            yield "control_character", f"the text holds U+{ord(bad[0]):04X}"
        yield from self._lengths(record, places)

    def _lengths(self, record: Record, num_images: int) -> Iterator[tuple[str, str]]:
        if all(message.role != "assistant" for message in record.messages):
            yield "no_supervised", "there is no turn of an assistant"
            return
        if self._processor is None:
            return
        try:
            ids, mask = self._processor.encode_ids(record.messages)
        except MessageError as error:
            yield "malformed", str(error)
            return
        self.num_tokens[len(ids).bit_length()] += 1
        if not any(mask):
            yield "no_supervised", f"none of its {len(ids)} tokens is in the loss"
        each, limit = self._processor.num_visual_tokens, self._processor.context_length
        if len(ids) > limit:
            num_text = len(ids) - num_images * each
            reason = f"{num_images} pictures x {each} visual tokens + {num_text} text tokens"
            yield "too_long", f"{reason} = {len(ids)} positions, but the model has {limit}"


def script(text: str) -> str:
    """The script of most letters; Han with any kana is Japanese writing, so kana."""
    if text.isascii():
        return "Latin" if _PATTERNS["Latin"].search(text) else "none"
    counts = {name: len(pattern.findall(text)) for name, pattern in _PATTERNS.items()}
    if counts["Kana"]:
        return "Kana"
    name = max(counts, key=counts.__getitem__)
    return name if counts[name] else "other" if any(map(str.isalpha, text)) else "none"
