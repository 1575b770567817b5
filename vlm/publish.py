"""Put a model or adapter folder into a hub repository: what belongs to it, and nothing else."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path

from vlm.about import read_about
from vlm.card import CARD
from vlm.checkpoint import empty_model
from vlm.errors import CheckpointError, ConfigError
from vlm.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, one_line, read_config, read_json
from vlm.headers import TensorEntry, read_headers
from vlm.history import FILE
from vlm.hub import is_hub_id
from vlm.manifest import read_manifest, verify, weight_files
from vlm.model import VisionLanguageModel
from vlm.processor import Processor
from vlm.projector import PREFIX, projector_type
from vlm.weight_names import WeightNames
from vlm.weights import INDEX

_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
)
_TOLD = (CARD, FILE, "about.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_RUN_CHECKPOINTS = re.compile(r"checkpoints|checkpoint-\d+")
_STATUS = re.compile(r"status client error \((\d{3})\b")  # hf_xet tells it in words alone
# Weights of an earlier upload that was sharded differently, which readers might prefer.
_OUTDATED = ["model*.safetensors", INDEX]


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a model or adapter folder as one repository; what is the same there stays.

    Args:
        folder: as `vlm.checkpoint.save_checkpoint` or `vlm.lora.save_adapter` writes it.
        repo_id: ``org/name``; made if it does not exist.
        private: whether a repository that is made can be seen by its owners only.
        revision: branch to write to, made if it does not exist; by default ``main``.
        token: of the hub; by default that of `hf auth login`.
        endpoint: of the hub; by default ``HF_ENDPOINT``, else huggingface.co.

    Returns:
        Where it can be seen.

    Raises:
        CheckpointError: the folder cannot be opened, holds what must not be published, or
            the hub does not take it; nothing is uploaded before the folder was checked.
        ConfigError: `repo_id` is no name that a repository can have.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name for a repository: {one_line(error)}") from error
    if "/" not in repo_id:
        raise ConfigError(
            f"{repo_id!r} names no owner; give org/name, `hf auth whoami` tells who you are"
        )
    folder = Path(folder)
    check(folder)
    names = files_of(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=None if is_adapter(folder) else list(_OUTDATED),
            revision=revision,
            commit_message="Upload a model folder by vlm",
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{repo_id}: {_reason(error, api.endpoint)}") from error
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def files_of(folder: Path) -> list[str]:
    """The files that `push` uploads, by their names in the folder.

    Raises:
        CheckpointError: weights are missing, or about.json is malformed.
    """
    own = (ADAPTER_CONFIG,) if is_adapter(folder) else _MODEL_FILES
    examples = [picture for picture, _ in read_about(folder, "model").examples]
    names = [
        *(name for name in (*own, *_TOLD) if (folder / name).is_file()),
        *(path.name for path in weight_files(folder)),
        *(
            path.relative_to(folder).as_posix()
            for path in examples
            if path.is_file() and path.suffix.lower() in _PICTURES
        ),
    ]
    return list(dict.fromkeys(names))


def check(folder: Path) -> None:
    """Find out before an upload whether others could open the folder and should have it.

    Configs, tokenizer and names are read as for use; of the weights the headers, and all
    of them only to compare with vlm.json.

    Raises:
        CheckpointError: they could not, or should not; the message names the way out.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _PICKLES:
            raise CheckpointError(
                f"{path}: a pickle can run code where it is opened; remove it, the safetensors "
                "are enough"
            )
        if path.is_dir() and _RUN_CHECKPOINTS.fullmatch(path.name):
            raise CheckpointError(
                f"{path}: checkpoints of a run that has not ended; let the same `vlm train` "
                "command end it, or remove them"
            )
    if is_adapter(folder):
        _check_adapter(folder)
    else:
        _check_model(folder)
    if read_manifest(folder) is not None and (problems := verify(folder)):
        raise CheckpointError(
            f"{folder}: it was changed after {FILE} was written ({'; '.join(problems)}); save the "
            f"model by vlm again, or remove {FILE}"
        )


def _check_adapter(folder: Path) -> None:
    read_headers(folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file())
    weight_files(folder)
    base = str(read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path"))
    if (folder / base).is_dir() or not is_hub_id(base):
        raise CheckpointError(
            f"{folder}: its base model {base!r} is a folder that nobody else has; push that first "
            f"and set base_model_name_or_path in {ADAPTER_CONFIG} to its name on the hub, or push "
            f"what `vlm merge {folder} --out DIR` writes"
        )


def _check_model(folder: Path) -> None:
    config = read_config(folder)
    Processor.from_folder(folder, config)
    entries = read_headers(weight_files(folder))
    if problems := _misfits(empty_model(config, "meta"), entries):
        raise CheckpointError(
            f"{folder}: weights and config.json disagree: {', '.join(problems[:6])}; "
            f"`vlm inspect {folder}` tells more"
        )


def _misfits(model: VisionLanguageModel, entries: Mapping[str, TensorEntry]) -> list[str]:
    """What `vlm.weights.read_model` would object to, by names and shapes alone."""
    names = WeightNames(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {names.in_model(name): entry.shape for name, entry in entries.items()}
    found.pop(None, None)
    if model.config.text_config.tie_word_embeddings:
        found.setdefault(names.head, wanted[names.head])
    if projector_type(model.config) == "linear":
        found = {k: v for k, v in found.items() if not str(k).startswith(PREFIX + "linear_2.")}
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is unexpected" for name in sorted(map(str, found.keys() - wanted.keys()))),
        *(
            f"{name} is {list(found[name])} and not {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ),
    ]


def _reason(error: BaseException, endpoint: str) -> str:
    """Why the hub did not take an upload, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, HfHubHTTPError):
        seen = seen.__cause__
    text = one_line(seen or error) or type(error).__name__
    if isinstance(seen, HfHubHTTPError):
        code = seen.response.status_code
    elif told := _STATUS.search(text):
        code = int(told[1])
    else:
        return (
            f"the hub at {endpoint} cannot be reached, or the upload broke off ({text}); check the "
            "network and run the same again"
        )
    if code == 401:
        return f"{endpoint} knows no such login; run `hf auth login` with a token that may write"
    if code == 403:
        return (
            "this login may not write there; choose a name of your own (`hf auth whoami`), or run "
            "`hf auth login` with a token that may write"
        )
    if code == 404:
        return f"{endpoint} has no such repository or branch for this login; check the name"
    return f"{endpoint} answered {code} ({text}); run the same again later"
