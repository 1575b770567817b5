"""A tokenizer.json made of the files that tokenizers had before it.

Folders of the original LLaVA repository, and of Vicuna under it, have SentencePiece's
tokenizer.model alone.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from vlm.errors import CheckpointError, MissingExtraError
from vlm.folder import one_line, read_json
from vlm.language import load_tokenizer


def read_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.json, or one made of its tokenizer.model or vocab.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        MissingExtraError: sentencepiece or protobuf is needed and not installed.
    """
    sources = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if (folder / "tokenizer.json").is_file() or not sources:
        return load_tokenizer(folder)
    if (folder / "tokenizer_config.json").is_file():
        read_json(folder, "tokenizer_config.json")  # refuses what would choose code to run
    installed = is_sentencepiece_available() and is_protobuf_available()
    if sources[0] == "tokenizer.model" and not installed:
        raise MissingExtraError(
            f"{folder}: to convert tokenizer.model, run `pip install sentencepiece protobuf`"
        )
    try:
        made = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its parsers raise whatever a broken file makes them raise
        raise CheckpointError(
            f"{folder / sources[0]}: cannot be made a tokenizer.json ({one_line(error)}); is the "
            "download complete?"
        ) from error
    with TemporaryDirectory() as place:
        made.save_pretrained(place)
        return load_tokenizer(Path(place))
