"""A byte-level BPE tokenizer made from the texts of the training records."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from train.dataset import RecordDataset

PAD, END, IMAGE = "<|pad|>", "<|end|>", "<image>"
_SPECIAL = [PAD, "<|system|>", "<|user|>", "<|assistant|>", END, IMAGE]

# One special token opens a turn and one closes it. Contents may be strings or lists of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding (Sennrich et al. 2016) over lower-cased text; every byte has a token.

    Any text can be encoded, and upper and lower case mean the same.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # A text begins without the space that its first word has inside.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[t for t in _SPECIAL if t not in (PAD, END)],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def texts_of(records: RecordDataset, num: int) -> Iterator[str]:
    """The texts, turn by turn, of ``num`` records or some more, spread evenly over all of them.

    Spread, because several data files stand one behind the other: the first records
    alone would know nothing of the words of the second file.
    """
    step = max(len(records) // num, 1)
    for index in range(0, len(records), step):
        yield from (message.text for message in records[index].messages)
