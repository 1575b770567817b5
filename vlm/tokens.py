"""Skeleton and texts to ids and loss mask, in one tokenisation of the whole string.

A control token (an image or role token, an end of sequence) may come from the template
only. If one turns up inside a text, that text was typed to look like one: the text is
then encoded by a copy of the tokenizer that knows no added tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm.template import Literal, Skeleton, Slot


@dataclass(frozen=True)
class _Stretch:
    """Characters [start, end) of the rendered string and what they are."""

    start: int
    end: int
    is_text: bool
    is_learnt: bool


class TextEncoder:
    """Encodes rendered conversations with one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        template_text: the template's source; added tokens in it are control tokens too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_text: str) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._plain: Tokenizer | None = None
        self._bos, self._bos_id = tokenizer.bos_token, tokenizer.bos_token_id
        self._control = frozenset(
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in template_text)
        )

    def encode(self, skeleton: Skeleton, texts: Sequence[str]) -> tuple[list[int], list[bool]]:
        """Ids and loss mask: True on answers and their end-of-turn tokens.

        The ids are those that transformers' processor gives for the rendered string,
        before the image token is multiplied.
        """
        whole, stretches = _fill(skeleton, texts)
        # As in transformers: a template that writes the first token itself gets no second.
        add_first = not (self._bos and whole.startswith(self._bos))
        encoding = self._backend.encode(whole, add_special_tokens=add_first)
        ids, spans = encoding.ids, _gapless(encoding.offsets)
        forged = self._forged(ids, spans, stretches)
        if forged:
            return self._encode_apart(whole, stretches, forged, add_first)
        return ids, _mask(spans, [s for s in stretches if s.is_learnt])

    def _forged(
        self, ids: list[int], spans: list[tuple[int, int]], stretches: list[_Stretch]
    ) -> frozenset[int]:
        """Numbers of the stretches whose text became a control token."""
        hits = [span for number, span in zip(ids, spans, strict=True) if number in self._control]
        return frozenset(
            i
            for i, stretch in enumerate(stretches)
            if stretch.is_text
            and any(start < stretch.end and stretch.start < end for start, end in hits)
        )

    def _encode_apart(
        self, whole: str, stretches: list[_Stretch], forged: frozenset[int], add_first: bool
    ) -> tuple[list[int], list[bool]]:
        """Encode the forged texts as plain text and everything between them as usual."""
        ids = [n for n in self._backend.encode("").ids[:1] if add_first and n == self._bos_id]
        mask = [False] * len(ids)
        for group in _group(stretches, forged):
            start, end = group[0][1].start, group[-1][1].end
            if group[0][0] in forged:
                new = self._encode_plain(whole[start:end])
                ids += new
                mask += [group[0][1].is_learnt] * len(new)
                continue
            encoding = self._backend.encode(whole[start:end], add_special_tokens=False)
            shifted = [(a + start, b + start) for a, b in _gapless(encoding.offsets)]
            ids += encoding.ids
            mask += _mask(shifted, [s for _, s in group if s.is_learnt])
        return ids, mask

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of `text` with no control token among them."""
        if self._plain is None:
            raw = json.loads(self._backend.to_str())
            raw["added_tokens"] = []
            raw["post_processor"] = None
            self._plain = Tokenizer.from_str(json.dumps(raw))
        encoding = self._plain.encode(text, add_special_tokens=False)
        # Some vocabularies hold control tokens as ordinary entries: cut those in two.
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self._control and end - start > 1:
                middle = start + 1
                return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])
        return list(encoding.ids)


def _fill(skeleton: Skeleton, texts: Sequence[str]) -> tuple[str, list[_Stretch]]:
    """The rendered string with its texts, and which characters are what."""
    strings: list[str] = []
    stretches: list[_Stretch] = []
    position = 0

    def add(text: str, is_text: bool, is_learnt: bool) -> None:
        nonlocal position
        if text:
            strings.append(text)
            stretches.append(_Stretch(position, position + len(text), is_text, is_learnt))
            position += len(text)

    for piece in skeleton.pieces:
        if isinstance(piece, Slot):
            add(texts[piece.index], True, piece.is_answer)
        else:
            assert isinstance(piece, Literal)
            add(piece.text[: piece.num_learnt], False, True)
            add(piece.text[piece.num_learnt :], False, False)
    return "".join(strings), stretches


def _gapless(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets that leave no gap: tokenizers that trim spaces report tokens too short."""
    spans: list[tuple[int, int]] = []
    before = 0
    for start, end in offsets:
        spans.append((min(start, before), end))
        before = max(before, end)
    return spans


def _mask(spans: list[tuple[int, int]], learnt: list[_Stretch]) -> list[bool]:
    """Which tokens overlap a learnt stretch; both lists are in order."""
    mask = [False] * len(spans)
    ranges = iter(learnt)
    current = next(ranges, None)
    for i, (start, end) in enumerate(spans):
        while current is not None and start >= current.end:
            current = next(ranges, None)
        if current is None:
            break
        mask[i] = end > current.start
    return mask


def _group(stretches: list[_Stretch], forged: frozenset[int]) -> list[list[tuple[int, _Stretch]]]:
    """Neighbours together, each forged stretch alone."""
    groups: list[list[tuple[int, _Stretch]]] = []
    for i, stretch in enumerate(stretches):
        alone = i in forged or i - 1 in forged
        if not groups or alone:
            groups.append([])
        groups[-1].append((i, stretch))
    return groups
