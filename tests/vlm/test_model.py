"""The composed model: scattering, the loss, batches, gradients."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaConfig, Trainer, TrainingArguments

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.messages import Message, assistant, user
from vlm.model import VisionLanguageModel
from vlm.processor import Processor

Parts = tuple[VisionLanguageModel, Processor]
ROWS: list[list[Message]] = [
    [user("what is it?", testing.draw_image(seed=1)), assistant("a small cat")],
    [user("two?", testing.draw_image(seed=2), testing.draw_image(seed=3)), assistant("yes")],
    [user("no picture at all, only a longer question"), assistant("fine")],
]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return load_checkpoint(testing.tiny_llava_folder(tmp_path))


@torch.no_grad()
def test_batch_equals_one_by_one(parts: Parts) -> None:
    model, processor = parts
    rows = [processor.encode(messages) for messages in ROWS]
    together = model(**processor.collate(rows)).logits
    for i, row in enumerate(rows):
        alone = model(**processor.collate([row])).logits[0]
        torch.testing.assert_close(together[i, -len(row.input_ids) :], alone, atol=2e-5, rtol=0)


def test_loss_is_the_plain_cross_entropy(parts: Parts) -> None:
    """Against full logits, shifted by hand."""
    model, processor = parts
    batch = processor.collate([processor.encode(m) for m in ROWS], labels=True)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].reshape(-1, model.config.text_config.vocab_size)
    targets = labels[:, 1:].reshape(-1)
    mean = F.cross_entropy(logits, targets, ignore_index=-100)
    total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    out = model(**batch, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, mean)
    for count in (7, torch.tensor(7)):
        torch.testing.assert_close(
            model(**batch, labels=labels, num_items_in_batch=count).loss, total / 7
        )


def test_logits_are_computed_at_supervised_positions_only(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(m) for m in ROWS], labels=True)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: rows.append(output.shape[:-1].numel())
    )
    model(**batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]


def test_a_batch_without_targets_has_zero_loss_and_gradients(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(ROWS[0])], labels=True)
    batch["labels"][:] = -100
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0.0


def test_text_only_batch_ties_the_projector_in_training(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(ROWS[2])], labels=True)
    evaluated = model(**batch).loss
    model.train()
    trained = model(**batch).loss
    assert torch.equal(trained, evaluated)
    trained.backward()
    for parameter in model.multi_modal_projector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_gradients_reach_projector_and_words_but_not_a_frozen_tower(parts: Parts) -> None:
    model, processor = parts
    model.vision_tower.requires_grad_(False)
    model.train()
    assert not model.vision_tower.training and model.language_model.training
    model(**processor.collate([processor.encode(ROWS[0])], labels=True)).loss.backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(
        p.grad is not None and p.grad.any() for p in model.multi_modal_projector.parameters()
    )
    assert model.get_input_embeddings().weight.grad.any()
    model.vision_tower.requires_grad_(True)
    assert model.train().vision_tower.training


def test_checkpointed_gradients_are_the_same(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(m) for m in ROWS], labels=True)
    model.train()
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.language_model.get_decoder().layers[0].gradient_checkpointing
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_scatter_puts_features_in_order(parts: Parts) -> None:
    model, _ = parts
    image = model.config.image_token_index
    ids = torch.tensor([[5, image, image, 6], [image, 7, image, 8]])
    features = torch.arange(4.0)[:, None].expand(4, 32).reshape(2, 2, 32)
    embeds = model.embed(ids, features)
    assert embeds[ids == image][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    words = model.get_input_embeddings()(ids)
    assert torch.equal(embeds[ids != image], words[ids != image])


@pytest.mark.parametrize("given", [None, 1, 3])
def test_a_mismatch_names_both_counts(parts: Parts, given: int | None) -> None:
    model, _ = parts
    ids = torch.tensor([[model.config.image_token_index] * 8])
    features = None if given is None else torch.zeros(given, 4, 32)
    with pytest.raises(ValueError, match=rf"8 image positions .* {4 * (given or 0)} visual tokens"):
        model.embed(ids, features)


@torch.no_grad()
def test_decoding_with_a_cache_equals_recomputing(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(m) for m in ROWS])
    full = model(**batch).logits
    cut = batch["input_ids"].shape[1] - 3
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = model(ids[:, :cut], mask[:, :cut], batch["pixel_values"], use_cache=True)
    cache = first.past_key_values
    assert cache is not None
    for step in range(cut, cut + 3):
        out = model(ids[:, step : step + 1], mask[:, : step + 1], past_key_values=cache)
        torch.testing.assert_close(out.logits[:, -1], full[:, step], atol=2e-5, rtol=0)
        cache = out.past_key_values
    assert model(**batch).past_key_values is None


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(ROWS[0])])
    full = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, full[:, -2:])


@torch.no_grad()
def test_parts_that_share_their_config_keep_their_attention(parts: Parts) -> None:
    model, processor = parts
    tower, words = model.vision_tower, model.language_model
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=words.config,
        image_token_index=model.config.image_token_index,
    )
    assert words.config._attn_implementation is None  # what transformers does to shared configs
    joined = VisionLanguageModel(config, tower, words).eval()
    joined.multi_modal_projector = model.multi_modal_projector
    batch = processor.collate([processor.encode(m) for m in ROWS])
    reopened = VisionLanguageModel(config).eval()
    reopened.load_state_dict(model.state_dict())
    assert torch.equal(joined(**batch).logits, reopened(**batch).logits)


@torch.no_grad()
def test_image_features_replace_pixels(parts: Parts) -> None:
    model, processor = parts
    batch = processor.collate([processor.encode(m) for m in ROWS])
    expected = model(**batch).logits
    features = model.encode_images(batch.pop("pixel_values"))
    assert features.shape == (3, testing.NUM_VISUAL_TOKENS, 32)
    assert torch.equal(model(**batch, image_features=features).logits, expected)


def test_trains_under_trainer_and_its_checkpoint_opens(parts: Parts, tmp_path: Path) -> None:
    model, processor = parts
    rows = [processor.encode(m) for m in ROWS]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_steps=3,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda batch: processor.collate(batch, labels=True),
    )
    assert trainer.model_accepts_loss_kwargs
    result = trainer.train()
    assert 0 < result.training_loss < 20
    saved = tmp_path / "run" / "checkpoint-3"
    processor.save(saved)
    reopened, _ = load_checkpoint(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(reopened.state_dict()[name], tensor), name
