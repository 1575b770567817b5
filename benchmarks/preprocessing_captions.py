"""Whether a way of preprocessing changes what the built-in model says of a photo.

    python benchmarks/preprocessing_captions.py

Draws scenes as JPEG files of 1920x1080 and 1080x1920 in turn, every other pair with the noise
of a camera, and captions each from the pixels of transformers' PIL processor and from those of
each way of this package: ``exact`` decodes and resizes in full, ``box`` resizes only what the
crop keeps, ``draft`` does so after a JPEG decode at a half, a quarter or an eighth. Equal
pixels are captioned once. A way whose captions change is no default.
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_recipes.scenes import draw_scene, make_scene
from vlm import Assistant, load
from vlm.images import CleanImage, load_image
from vlm.pixels import Preprocessing, fit
from vlm.processor import Processor

SIDE, LONG_SIDE, DRAWN, NOISE = 1080, 1920, 360, 8.0
BATCH = 50


def draw(path: Path, index: int, seed: int) -> None:
    """A scene enlarged to the middle of a photo, on its own background."""
    scene, _ = make_scene(seed, index, split="test")
    square = draw_scene(scene, DRAWN).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    margin = (LONG_SIDE - SIDE) // 2
    turned = index % 2 == 1
    sides = ((margin, margin), (0, 0)) if turned else ((0, 0), (margin, margin))
    samples = np.pad(np.asarray(square, dtype=np.float32), (*sides, (0, 0)), mode="edge")
    if index // 2 % 2:
        noise = np.random.default_rng(index).standard_normal(samples.shape, dtype=np.float32)
        samples = samples + NOISE * noise
    Image.fromarray(samples.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def theirs(processor: Processor, path: Path) -> np.ndarray:
    """Samples (H, W, 3) of the PIL processor before they are normalised."""
    picture = Image.open(path).convert("RGB")
    out = processor.image_processor(
        picture, do_rescale=False, do_normalize=False, return_tensors="np"
    )
    return np.asarray(out["pixel_values"][0]).astype(np.uint8).transpose(1, 2, 0)


def ours(processor: Processor, path: Path, way: Preprocessing) -> np.ndarray:
    """The same by one of this package's ways."""
    draft_to = 2 * processor.image_size if way == "draft" else None
    picture = load_image(path, draft_to=draft_to).pixels
    fitted = fit(processor.image_processor, picture, exact=way == "exact")
    assert fitted is not None, "larger than the crop"
    return np.asarray(fitted)


def caption(assistant: Assistant, pictures: list[np.ndarray]) -> list[str]:
    """Captions of pictures of the model's own size, which no preprocessing changes."""
    clean = [CleanImage(Image.fromarray(each), "PIL", each.shape[1::-1]) for each in pictures]
    pairs = ((each, assistant.caption_prompt) for each in clean)
    return list(assistant.ask_many(pairs, batch_size=32))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    assistant = load()
    processor = assistant.processor
    assert isinstance(processor, Processor), "the built-in model is a LLaVA folder"
    ways: tuple[Preprocessing, ...] = get_args(Preprocessing)
    same_pixels, same_captions, worst = (dict.fromkeys(ways, 0) for _ in range(3))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "photo.jpg"
        for start in range(0, options.num, BATCH):
            rows: list[dict[str, np.ndarray]] = []
            for index in range(start, min(start + BATCH, options.num)):
                draw(path, index, options.seed)
                found = {"": theirs(processor, path)}
                rows.append(found | {way: ours(processor, path, way) for way in ways})
            distinct = {each.tobytes(): each for row in rows for each in row.values()}
            said = dict(zip(distinct, caption(assistant, list(distinct.values())), strict=True))
            for row in rows:
                for way in ways:
                    error = np.abs(row[way].astype(int) - row[""].astype(int)).max()
                    worst[way] = max(worst[way], int(error))
                    same_pixels[way] += int(error) == 0
                    same_captions[way] += said[row[way].tobytes()] == said[row[""].tobytes()]
    table = Table(title=f"{options.num} photos of 1920x1080, to {processor.image_size} pixels")
    table.add_column("way")
    for column in ("same captions", "same pixels", "largest error"):
        table.add_column(column, justify="right")
    for way in ways:
        table.add_row(way, str(same_captions[way]), str(same_pixels[way]), str(worst[way]))
    Console().print(table)


if __name__ == "__main__":
    main()
