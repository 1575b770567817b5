"""Other families behind `Assistant`: each answers as transformers alone does, by every method."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from vlm import testing
from vlm.errors import GenerationError, ImageError, MessageError
from vlm.messages import Message, TextPart, user
from vlm.messages import assistant as answered

WIDE = testing.draw_image((40, 30), seed=1)
TALL = testing.draw_image((28, 60), seed=2)
LENGTH = 16
# How the papers and cards of those without a chat template ask.
PLAIN = {
    "blip-2": "Question: {} Answer:",
    "instructblip": "{}",
    "paligemma": "<image>answer en {}",
}


def theirs(relative: Any, question: str, *pictures: Image.Image) -> str:
    """The greedy answer by the documented call; nothing of ours in it."""
    processor, kind = standard_processor(relative.folder), relative.type
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": LENGTH}
    if relative.chats:
        parts = [{"type": "image", "image": picture} for picture in pictures]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    elif kind == "idefics":
        prompt = ["User: " + question, *pictures, "<end_of_utterance>\nAssistant:"]
        inputs = processor(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")
        ends = ["</s>", "<end_of_utterance>"]
        no_text = ["<image>", "<fake_token_around_image>"]
        options["eos_token_id"] = processor.tokenizer.convert_tokens_to_ids(ends)
        options["suppress_tokens"] = processor.tokenizer.convert_tokens_to_ids(no_text)
    else:
        prompt = PLAIN[kind].format(question)
        inputs = processor(images=list(pictures), text=prompt, return_tensors="pt")
    model = hf.AutoModelForImageTextToText.from_pretrained(relative.folder).eval()
    ids = model.generate(**inputs, **options)[0]
    if not model.config.get_text_config().is_encoder_decoder:
        ids = ids[inputs["input_ids"].shape[1] :]
    text = str(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return text if relative.chats else text.lstrip(" ")


def standard_processor(folder: Path) -> Any:
    """AutoProcessor's, or the same without its video part where that needs torchvision."""
    family = hf.PROCESSOR_MAPPING[type(hf.AutoConfig.from_pretrained(folder))]
    if "video_processor" not in family.get_attributes():
        return hf.AutoProcessor.from_pretrained(folder, backend="pil")
    settings = folder / "processor_config.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: object)
        return family(
            hf.AutoImageProcessor.from_pretrained(folder, backend="pil"),
            hf.AutoTokenizer.from_pretrained(folder),
            SimpleNamespace(num_frames=None, fps=None, model_input_names=[]),
            chat_template=(folder / "chat_template.jinja").read_text(),
            **(json.loads(settings.read_text()) if settings.is_file() else {}),
        )


# The same answers


def test_answers_are_those_of_transformers(relative: Any) -> None:
    found = []
    for picture in (WIDE, TALL):
        for question in ("what is it?", "and how many of them are there?"):
            answer = relative.assistant.ask(picture, question, max_new_tokens=LENGTH)
            assert answer == theirs(relative, question, picture)
            found.append(answer)
    assert len(set(found)) == 4  # the model looks, and reads


def test_several_pictures_and_none(relative: Any) -> None:
    for pictures in ((WIDE, TALL), (TALL, WIDE), ()):
        if relative.takes_many:
            answer = relative.assistant.ask(list(pictures), "which?", max_new_tokens=LENGTH)
            assert answer == theirs(relative, "which?", *pictures)
        else:
            with pytest.raises(MessageError, match="exactly one picture"):
                relative.assistant.ask(list(pictures), "which?")


def test_every_way_to_ask_gives_the_same_answer(relative: Any) -> None:
    model, message = relative.assistant, user("what is it?", WIDE)
    text = model.ask(WIDE, "what is it?", max_new_tokens=LENGTH)
    assert "".join(model.stream([message], max_new_tokens=LENGTH)) == text
    [whole] = model.generate([[message]], max_new_tokens=LENGTH)
    assert whole.text == text
    assert whole.finish_reason == ("length" if whole.num_new_tokens == LENGTH else "stop")
    [short] = model.generate([[message]], max_new_tokens=1)
    assert (short.finish_reason, short.num_new_tokens) == ("length", 1)
    assert short.num_prompt_tokens == whole.num_prompt_tokens > 10
    assert model.caption(WIDE, prompt="what is it?", max_new_tokens=LENGTH) == text


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_gives_what_one_by_one_gives(relative: Any, batch_size: int) -> None:
    pairs = [
        (testing.draw_image((28 + 9 * n, 60 - 9 * n), n), "what? " * (n + 1)) for n in range(5)
    ]
    expected = [relative.assistant.ask(*pair, max_new_tokens=8) for pair in pairs]
    assert list(relative.assistant.ask_many(pairs, batch_size, max_new_tokens=8)) == expected
    assert len(set(expected)) > 2


def test_captions_of_many_files_never_stop(relative: Any, album: Path) -> None:
    model = relative.assistant
    found = list(model.caption_many([album], batch_size=5, max_new_tokens=8))
    assert [result.code for result in found] == [None] * 3 + ["undecodable"] + [None] * 8
    for result in found:
        if result.code is None:
            assert result.caption == model.caption(result.path, max_new_tokens=8)


def test_a_picture_that_a_model_cannot_take_is_a_row(
    relatives: Callable[[str], Any], pictures: Path
) -> None:
    model = relatives("qwen2_vl").assistant
    testing.draw_image((3000, 2)).save(pictures / "3.png")
    found = list(model.caption_many([pictures], batch_size=3, max_new_tokens=4))
    assert [result.code for result in found] == [None] * 3 + ["too_thin"] + [None] * 3
    assert "side more than 200" in str(found[3].error) and "\n" not in str(found[3].error)
    with pytest.raises(ImageError, match="200 times the other"):
        model.ask(pictures / "3.png", "what?")


def test_a_conversation_goes_on(relative: Any) -> None:
    model = relative.assistant
    chat = [user("a?", WIDE), answered("yes"), user("b?")]
    if relative.name in ("instructblip", "paligemma"):
        with pytest.raises(MessageError, match="single questions"):
            model.generate([chat])
        return
    turns = [chat, [user("a?", WIDE), answered("no"), user("b?")], [user("b?", WIDE)]]
    answers = [answer.text for answer in model.generate(turns, max_new_tokens=LENGTH)]
    assert len(set(answers)) > 1
    assert "".join(model.stream(chat, max_new_tokens=LENGTH)) == answers[0]


def test_system_messages_are_taken_or_refused(relative: Any) -> None:
    chat = [Message("system", (TextPart("be short"),)), user("a?", WIDE)]
    if relative.chats:
        [found] = relative.assistant.generate([chat], max_new_tokens=LENGTH)
        assert found.text != relative.assistant.ask(WIDE, "a?", max_new_tokens=LENGTH)
    else:
        with pytest.raises(MessageError, match="no system message"):
            relative.assistant.generate([chat])


# Sampling, stopping, threads


def test_sampling_is_repeatable_through_every_door(relative: Any) -> None:
    model = relative.assistant
    hot: Any = {"temperature": 1.2, "top_p": 0.95, "seed": 3, "max_new_tokens": LENGTH}
    before = torch.get_rng_state()
    text = model.ask(WIDE, "what?", **hot)
    assert "".join(model.stream([user("what?", WIDE)], **hot)) == text
    assert list(model.ask_many([(TALL, "and now what?"), (WIDE, "what?")], **hot))[1] == text
    assert model.ask(WIDE, "what?", **{**hot, "seed": 4}) != text
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_ends_an_answer(relatives: Callable[[str], Any]) -> None:
    model, stop = relatives("llava_next").assistant, threading.Event()
    pieces = model.stream([user("a?", WIDE)], stop=stop, max_new_tokens=400)
    first = next(pieces)
    stop.set()
    assert len((first + "".join(pieces)).encode()) < 100
    [cancelled] = model.generate([[user("a?", WIDE)]], stop=stop)
    assert (cancelled.finish_reason, cancelled.text) == ("cancelled", "")


def test_a_stream_that_nobody_reads_on_frees_the_model(relatives: Callable[[str], Any]) -> None:
    model = relatives("llava_next").assistant
    steps = model.engine.stream(model.prepare([user("a?", WIDE)], max_new_tokens=400))
    row = next(steps)
    steps.close()
    assert len(row.ids) < 100
    assert not [t for t in threading.enumerate() if t.name == "vlm-generate"]
    assert model.ask(WIDE, "a?", max_new_tokens=4)


def test_streams_at_once_do_not_mix(
    relatives: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = relatives("qwen2_vl").assistant  # keeps positions of its last prompt
    generate, inside = model.engine.model.generate, threading.Lock()

    def alone(**inputs: Any) -> Any:
        assert inside.acquire(blocking=False), "two at once"
        try:
            return generate(**inputs)
        finally:
            inside.release()

    monkeypatch.setattr(model.engine.model, "generate", alone)
    sizes = {1: (28, 28), 2: (56, 56), 3: (56, 28)}
    chats = {n: [user(f"{n}?", testing.draw_image(size, n))] for n, size in sizes.items()}
    expected = {n: model.generate([chat], max_new_tokens=30)[0].text for n, chat in chats.items()}
    found: dict[int, str] = {}

    def run(n: int) -> None:
        found[n] = "".join(model.stream(chats[n], max_new_tokens=30))

    threads = [threading.Thread(target=run, args=(n,)) for n in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected and len(set(found.values())) == 3


def test_idefics_never_writes_a_picture(
    relatives: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = relatives("idefics").assistant
    names = ["<image>", "<fake_token_around_image>"]
    wanted = torch.tensor(model.processor.tokenizer.convert_tokens_to_ids(names))
    expected = model.ask(WIDE, "a?", max_new_tokens=LENGTH)
    head = model.engine.model.get_output_embeddings()
    logits = head.forward
    monkeypatch.setattr(head, "forward", lambda x: logits(x).index_fill(-1, wanted, 1e4))
    assert model.ask(WIDE, "a?", max_new_tokens=LENGTH) == expected


def test_nan_is_told_by_every_method(
    relatives: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = relatives("idefics3").assistant
    head = model.engine.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda states: states.new_full((1, 1, 320), torch.nan))
    with pytest.raises(GenerationError, match="NaN"):
        model.ask(WIDE, "a?")
    with pytest.raises(GenerationError, match="NaN"):
        list(model.stream([user("a?", WIDE)]))


def test_facts(relative: Any) -> None:
    model = relative.assistant
    assert model.name == relative.name and not model.built_in and "trained on" in model.about
    assert len(model.identity) == 16 and str(model.device) == "cpu"
    plain = hf.AutoModelForImageTextToText.from_pretrained(relative.folder)
    assert model.num_parameters == sum(p.numel() for p in plain.parameters())
