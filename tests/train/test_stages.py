"""Which part learns in which stage: in the report, and in the weights of real runs."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from train.config import LoraConfig
from train.run import run
from train.stages import STAGES, apply_stage, stage_table
from vlm.assistant import load
from vlm.checkpoint import compose, load_checkpoint
from vlm.errors import ConfigError
from vlm.testing import draw_image

TOWER, PROJECTOR, LLM = "vision_tower", "multi_modal_projector", "language_model"
# Inputs and outputs of the seven linear layers of a tiny decoder block.
LINEARS = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
NUM_BLOCKS = 2
RANK, ALPHA = 4, 12
NUM_STEPS, RATE = 3, 0.01


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a part, by their names inside it."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names and bits are the same."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("lora", [None, LoraConfig(r=RANK)])
def test_the_report_says_roles_and_counts(llava: str, lora: LoraConfig | None) -> None:
    saved = weights(Path(llava))
    sizes = {
        name: sum(t.numel() for t in part(saved, name).values()) for name in (TOWER, PROJECTOR)
    }
    sizes[LLM] = sum(t.numel() for k, t in saved.items() if k.startswith(LLM))
    model, _ = load_checkpoint(llava)
    added = NUM_BLOCKS * sum(RANK * (n + m) for n, m in LINEARS) if lora else 0
    report = apply_stage(model, STAGES["instruct"], lora)
    assert [(p.part, p.role, p.num_parameters, p.num_trainable) for p in report] == [
        (TOWER, "FROZEN", sizes[TOWER], 0),
        (PROJECTOR, "TRAINABLE", sizes[PROJECTOR], sizes[PROJECTOR]),
        (LLM, "LORA" if lora else "TRAINABLE", sizes[LLM] + added, added or sizes[LLM]),
    ]
    assert sum(p.num_trainable for p in report) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    table = printed(stage_table("instruct", report))
    assert "stage instruct" in table and f"{sizes[LLM] + added:,}" in table
    assert [line.split()[1] for line in table.splitlines() if "_" in line] == [
        p.part for p in report
    ]


def printed(table: object) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_align_opens_the_projector_alone_and_instruct_the_language_model_too(llava: str) -> None:
    model, _ = load_checkpoint(llava)
    open_parts = {}
    for stage in ("align", "instruct", "align"):  # and the way back
        apply_stage(model, STAGES[stage], None)
        open_parts[stage] = {
            n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad
        }
    assert open_parts == {"align": {PROJECTOR}, "instruct": {PROJECTOR, LLM}}
    assert model.training and not model.vision_tower.training


def test_lora_where_the_language_model_is_frozen_is_refused(llava: str) -> None:
    model, _ = load_checkpoint(llava)
    with pytest.raises(ConfigError, match="align does not train the language model"):
        apply_stage(model, STAGES["align"], LoraConfig())


@pytest.fixture(scope="module")
def chain(
    tmp_path_factory: pytest.TempPathFactory,
    scenes: Callable[..., str],
    recipe: Callable[..., str],
) -> dict[str, Path]:
    """The folders of all four stages, each run from the ones before."""
    root = tmp_path_factory.mktemp("chain")
    done: dict[str, Path] = {}
    steps = {"max_steps": NUM_STEPS, "learning_rate": RATE}

    def train(stage: str, task: str, **values: Any) -> None:
        path = recipe(root / stage, stage=stage, data=[scenes(task)], **steps, **values)
        done[stage] = run(path)

    vision = {"image_size": 32, "patch_size": 8, "num_layers": 2, "text_vocab_size": 300}
    language = {"vocab_size": 400, "num_layers": 2, "context_length": 512}
    width = {"hidden_size": 32, "num_heads": 2}
    train("contrastive", "phrases", model={"new_vision": vision | width}, optimizer="muon")
    train("language", "language", model={"new_language": language | width}, optimizer="muon")
    towers = {"vision": str(done["contrastive"]), "language": str(done["language"])}
    train("align", "align", model=towers)
    lora = {"r": RANK, "alpha": ALPHA, "dropout": 0.1}
    train("instruct", "instruct", model={"start": str(done["align"])}, lora=lora)
    return done


def test_the_vision_tower_is_never_touched(chain: dict[str, Path]) -> None:
    made = weights(chain["contrastive"])
    for stage in ("align", "instruct"):
        assert same(part(weights(chain[stage]), f"{TOWER}.vision_model"), made)


def test_align_leaves_the_language_model_bit_for_bit(chain: dict[str, Path]) -> None:
    assert same(part(weights(chain["align"]), LLM), weights(chain["language"]))


def test_the_projector_learns_in_both(chain: dict[str, Path]) -> None:
    set_seed(0)  # the recipe's: this is the projector that align started from
    fresh, _ = compose(chain["contrastive"], chain["language"])
    states = [fresh.multi_modal_projector.state_dict()]
    states += [part(weights(chain[stage]), PROJECTOR) for stage in ("align", "instruct")]
    for before, after in itertools.pairwise(states):
        assert before.keys() == after.keys()
        for name in before:
            moved = (after[name] - before[name]).abs().max()
            assert 0 < moved <= NUM_STEPS * RATE * 1.01, name


def test_instruct_adds_the_adapter_and_nothing_else(chain: dict[str, Path]) -> None:
    aligned, tuned = weights(chain["align"]), weights(chain["instruct"])
    adapter = load_file(chain["instruct"] / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(LINEARS) * NUM_BLOCKS
    deltas = {}
    for name, down in adapter.items():
        if name.endswith(".lora_A.weight"):
            up = adapter[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            deltas[key] = ALPHA / RANK * (up @ down)
    assert tuned.keys() == aligned.keys() and len(deltas) == len(LINEARS) * NUM_BLOCKS
    assert deltas.keys() <= aligned.keys()
    for name, tensor in tuned.items():
        if name in deltas:
            assert deltas[name].abs().max() > 1e-4
            assert torch.allclose(tensor - deltas[name], aligned[name], rtol=0, atol=1e-6), name
        elif not name.startswith(PROJECTOR):
            assert torch.equal(tensor, aligned[name]), name


def test_the_projector_beside_the_adapter_is_the_merged_one(chain: dict[str, Path]) -> None:
    beside = load_file(chain["instruct"] / "adapter" / "projector.safetensors")
    assert same(part(beside, PROJECTOR), part(weights(chain["instruct"]), PROJECTOR))


def test_both_results_answer(chain: dict[str, Path]) -> None:
    for stage in ("align", "instruct"):
        answer = load(chain[stage]).ask(draw_image(), "what is it?", max_new_tokens=4)
        assert isinstance(answer, str)
