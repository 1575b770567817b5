"""The gates before the two stages: does the tower see, does the language model read?

    python benchmarks/gates.py --tower runs/builtin/tower --language runs/builtin/language

*Tower*: a linear probe on the frozen features of the patches under each object, for its name
(emoji and coloured shapes), against the same probe on a tower of random weights.
*Language*: answers about scenes that are told in words, exact match of whole answers when each
token is predicted from the right ones before it; that equals greedy decoding for every answer
counted as right. What the decoder cannot read here it hardly learns to read from pictures.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionModel

from data_recipes.scenes import draw_scene, make_scene
from data_recipes.scenes.dialogues import tell
from data_recipes.scenes.questions import KINDS
from data_recipes.scenes.world import ALL_NOUNS
from train.collate import TextCollator
from vlm.images import load_image
from vlm.language import load_tokenizer
from vlm.messages import parse_record
from vlm.padding import IGNORE_INDEX
from vlm.scoring import percent

SEED = 900_001  # of no training set


def features(
    tower: CLIPVisionModel, folder: Path, layer: int, num: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean feature of the patches in each occupied place (objects, D), and its noun's number."""
    preprocess = CLIPImageProcessorPil.from_pretrained(folder)
    side = tower.config.image_size // tower.config.patch_size
    rows, nouns = [], []
    for start in range(0, num, 64):
        scenes = [make_scene(seed, i)[0] for i in range(start, min(start + 64, num))]
        pictures = [load_image(draw_scene(scene)).pixels for scene in scenes]
        pixels = preprocess(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = tower(pixels, output_hidden_states=True)
        grid = output.hidden_states[layer][:, 1:].unflatten(1, (side, side))
        for scene, patches in zip(scenes, grid, strict=True):
            for item in scene.objects:
                high = (item.row * side // 3, -(-(item.row + 1) * side // 3))
                wide = (item.column * side // 3, -(-(item.column + 1) * side // 3))
                rows.append(patches[slice(*high), slice(*wide)].mean((0, 1)))
                nouns.append(ALL_NOUNS.index(item.noun))
    return torch.stack(rows), torch.tensor(nouns)


def probe(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Accuracy of a linear layer fitted to the first set, on the second."""
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    linear = nn.Linear(train[0].shape[1], len(ALL_NOUNS))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-2, weight_decay=1e-2)
    for _ in range(300):
        loss = nn.functional.cross_entropy(linear((train[0] - mean) / deviation), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (linear((test[0] - mean) / deviation).argmax(-1) == test[1]).sum()
    return percent(int(right), len(test[1]))


def tower_gate(folder: Path, layer: int, num: int) -> Table:
    """Probe the tower, and one of the same shape with random weights."""
    torch.manual_seed(0)
    trained = CLIPVisionModel.from_pretrained(folder).eval()
    random = CLIPVisionModel(trained.config).eval()
    table = Table(title=f"linear probe for the noun at a place, hidden_states[{layer}]")
    table.add_column("tower")
    table.add_column("accuracy", justify="right")
    for name, tower in (("trained", trained), ("random", random)):
        train = features(tower, folder, layer, num, SEED)
        table.add_row(name, probe(train, features(tower, folder, layer, num // 4, SEED + 1)))
    return table


def language_gate(folder: Path, num: int) -> Table:
    """Whole answers right, by question type, about scenes in words."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    collate = TextCollator(load_tokenizer(folder), model.config.max_position_embeddings)
    records, kinds = [], []
    for index in range(num):
        scene, rng = make_scene(SEED, index, split="test")
        for maker in KINDS.values():
            question = maker(scene, rng)
            if question is not None:
                line = json.dumps({"id": "text", "messages": tell(scene, [question], rng)})
                records.append(parse_record(line, Path(), "text"))
                kinds.append(question.kind)
    right: Counter[str] = Counter()
    for start in range(0, len(records), 64):
        batch = collate(records[start : start + 64])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            said = model(**batch).logits[:, :-1].argmax(-1)
        whole = ((said == labels) | (labels == IGNORE_INDEX)).all(1)
        for kind, good in zip(kinds[start : start + 64], whole.tolist(), strict=True):
            right[kind] += good
    table = Table(title="whole answers about scenes in words")
    table.add_column("kind")
    table.add_column("accuracy", justify="right")
    for kind, n in sorted(Counter(kinds).items()):
        table.add_row(kind, percent(right[kind], n))
    table.add_row("overall", percent(sum(right.values()), len(kinds)))
    return table


def main() -> None:
    """Print the tables of the gates that a folder is given for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--language", type=Path)
    parser.add_argument("--num", type=int, default=2000, help="scenes")
    args = parser.parse_args()
    if args.tower is None and args.language is None:
        parser.error("name a folder: --tower DIR, --language DIR, or both")
    console = Console()
    if args.tower is not None:
        console.print(tower_gate(args.tower, args.layer, args.num))
    if args.language is not None:
        console.print(language_gate(args.language, args.num // 4))


if __name__ == "__main__":
    main()
