"""Caption a million pictures: any source into one ledger, by one process or by many.

vlm.caption_images("holiday/", "captions.jsonl")
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.caption_items import Item
from vlm.caption_pipeline import results
from vlm.caption_prompts import CaptionPrompts, literal
from vlm.caption_ranks import (
    MERGE_SECONDS,
    check_parts,
    check_ranks,
    device_of_rank,
    is_mine,
    marking,
    merge_if_complete,
    part_path,
    ranks_of_environment,
)
from vlm.caption_sources import Items, Source
from vlm.captioning import CaptionResult, check_batch_size
from vlm.errors import ConfigError, ErrorLimitError
from vlm.ledger import Ledger, Summary
from vlm.ledger_rows import name_key

if TYPE_CHECKING:
    import torch

    from vlm.assistant import Assistant

FilePath = str | os.PathLike[str]
Engine = Callable[..., Generator[CaptionResult]]


def caption_images(
    source: Source,
    out: FilePath,
    *,
    model: "Assistant | FilePath | None" = None,
    device: "str | torch.device" = "auto",
    column: str | None = None,
    prompt: str | Mapping[str, str] | None = None,
    prefix: str = "",
    suffix: str = "",
    include: Sequence[str] = (),
    discourage: Sequence[str] = (),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    retry_errors: bool = False,
    max_errors: int | None = None,
    sidecar: "Literal['beside'] | FilePath | None" = None,
    csv: FilePath | None = None,
    parquet: FilePath | None = None,
    overwrite: bool = False,
    ranks: tuple[int, int] | None = None,
    engine: Engine = results,
    on_result: Callable[[CaptionResult], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Summary:
    """Caption every picture of a source into a ledger; pictures with a row are skipped.

    A rerun of the same call goes on where the last one ended, however it ended. Pictures of
    the same bytes are captioned once and copied. A picture that cannot be used gets a row
    with an error and never stops the rest.

    Args:
        source: what `vlm.caption_sources` reads: a folder, a glob pattern, a list, a .txt,
            .jsonl, .csv, .parquet or .tar file, or a Hugging Face dataset.
        out: the ledger, JSON lines; made if absent, continued if present.
        model: an open assistant, or what `vlm.load` opens.
        device: of a model that is opened here; each rank takes its own GPU by default.
        column: with the picture, in tables and datasets; found by itself by default.
        prompt: in place of the model's own; with ``{name}``, ``{directory}`` and text
            columns of the source. Several, by keys, give several captions of a picture,
            which is read and encoded once.
        prefix: written before each caption.
        suffix: written after it.
        include: words that captions should hold; rows list those that are missing.
        discourage: words that the model is kept from by a logit bias; rows list those that
            came up all the same.
        batch_size: pictures that run together, one that ends making room for the next; also
            those that are read ahead, and rows between two syncs to disk.
        max_new_tokens: the most tokens of a caption.
        retry_errors: try pictures again whose row is an error.
        max_errors: end the run when more pictures than this have failed in it.
        sidecar: ``"beside"`` for a .txt beside each picture, or a folder that mirrors them;
            see `vlm.caption_export`, as for the next two.
        csv: a table to write from the ledger at the end.
        parquet: the same as Parquet.
        overwrite: let `sidecar` replace text files that hold another text.
        ranks: this process's rank and their number; by default RANK and WORLD_SIZE of the
            environment. Each rank writes a part, and the last to end merges them.
        engine: makes the captions; `vlm.caption_ray.RayEngine` does it in other processes.
        on_result: called with each new row once it is written.
        on_progress: called with the pictures done so far, skipped ones included, and the
            failed ones; one call at a time, for skipped ones from the thread that walks the
            source.
        sampling: temperature, seed and so on, see `vlm.engine.sampling.Sampling`.

    Raises:
        ConfigError: a bad option, a ledger of another model, prompt or option, or one that
            another process writes.
        RecordError: the source has a malformed line, or `out` is no ledger or cannot be
            written.
        MessageError: an empty prompt. ContextLengthError: the prompt is too long.
        ErrorLimitError: more than `max_errors` pictures failed.
        CheckpointError: the model cannot be opened.
    """
    check_batch_size(batch_size)
    if max_errors is not None and (type(max_errors) is not int or max_errors < 0):
        raise ConfigError(f"max_errors is {max_errors!r}; it must be a whole number from 0")
    rank, world = ranks_of_environment() if ranks is None else check_ranks(*ranks)
    path = Path(out)
    check_parts(path, world)
    items = Items(source, column)
    assistant = _open(model, device, world)
    prompts = CaptionPrompts(
        literal(assistant.caption_prompt) if prompt is None else prompt,
        prefix=prefix,
        suffix=suffix,
        include=include,
        discourage=discourage,
    )
    from vlm.engine.sampling import Sampling

    options = {"max_new_tokens": max_new_tokens, **prompts.steered(sampling)}
    Sampling(**options)  # a wrong value is told here, and not once for each picture
    asked = assistant.caption_prompt if prompt is None else prompt
    run = _run_facts(assistant, asked, max_new_tokens, prompts, sampling)
    part = part_path(path, rank, world)
    before = [path] if world > 1 else []
    counts = {"captioned": 0, "failed": 0, "skipped": 0, "copied": 0}
    names = hashlib.blake2b(run["run"].encode(), digest_size=16)
    left = threading.Event()
    telling = threading.Lock()

    def told() -> None:
        if on_progress is None:
            return
        with telling:
            done = counts["captioned"] + counts["failed"] + counts["skipped"]
            on_progress(done, counts["failed"])

    with (
        Ledger(part, run, prompts, before, MERGE_SECONDS if world > 1 else 0) as ledger,
        marking(part, world) as done,
        ExitStack() as leaving,
    ):
        places: dict[str, int] = {}
        covered = True  # every picture of every rank has its row already

        def lacking() -> Iterator[Item]:
            nonlocal covered
            seen: set[bytes] = set()
            for number, item in enumerate(items):
                if left.is_set():
                    return
                key = name_key(item.name)
                if key in seen:
                    continue
                if not seen:
                    prompts.questions(item.meta)  # a wrong variable ends the run at once
                seen.add(key)
                names.update(key)
                if not is_mine(item.name, rank, world):
                    covered = covered and ledger.has_item(item, retry_errors)
                    continue
                if ledger.has_item(item, retry_errors):
                    counts["skipped"] += 1
                    told()
                else:
                    places[item.name] = number
                    yield item

        made = engine(assistant, lacking(), prompts, batch_size, options, ledger.find)
        leaving.enter_context(closing(made))
        leaving.callback(left.set)  # first: the thread may be among pictures that are skipped
        for number, result in enumerate(made, 1):
            place = places.pop(result.path)
            ledger.append(result, place if world > 1 else None)
            counts["failed" if result.status == "failed" else "captioned"] += 1
            counts["copied"] += result.status == "copied"
            if number % batch_size == 0:
                ledger.sync()
            if on_result is not None:
                on_result(result)
            told()
            if max_errors is not None and counts["failed"] > max_errors:
                raise ErrorLimitError(
                    f"{counts['failed']} pictures failed, the last with: {result.error}; that is "
                    f"more than max_errors {max_errors}; see {part}, then run again with "
                    "--retry-errors"
                )
        # The others may have merged before this rank began anew, and not come back.
        merged = world > 1 and covered and ledger.is_empty
        if merged:
            part.unlink()
        else:
            done(names.hexdigest())
    complete = world == 1 or merged or merge_if_complete(path, world, names.hexdigest())
    exported = None
    if complete and not (sidecar is None and csv is None and parquet is None):
        from vlm.caption_export import export_captions

        exported = export_captions(
            path, sidecar=sidecar, csv=csv, parquet=parquet, overwrite=overwrite
        )
    return Summary(**counts, complete=complete, exported=exported)


def _open(model: Any, device: Any, world: int) -> "Assistant":
    if model is not None and not isinstance(model, str | os.PathLike):
        opened: Assistant = model
        return opened
    from vlm.assistant import load

    return load(model, device=device_of_rank(device, world))


def _run_facts(
    assistant: "Assistant",
    asked: Any,
    max_new_tokens: int | None,
    prompts: CaptionPrompts,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """What all rows of a ledger have in common, and a short id of it."""
    from vlm.pixels import DEFAULT_PREPROCESSING

    given = {**prompts.options, **sampling}
    way = getattr(assistant.processor, "preprocessing", DEFAULT_PREPROCESSING)
    if way != DEFAULT_PREPROCESSING:
        given["preprocessing"] = way
    options = json.loads(json.dumps(given, default=str))
    facts = {
        "model": assistant.name,
        "model_id": assistant.identity,
        "prompt": asked if isinstance(asked, str) else dict(asked),
        "max_new_tokens": max_new_tokens,
        "options": options,
    }
    text = json.dumps({**facts, "model": ""}, sort_keys=True)
    return {**facts, "run": hashlib.sha256(text.encode()).hexdigest()[:12]}
