"""The page in a real Chromium, on a stand-in for the model; nothing may leave the machine.

Without Chromium or playwright these tests are skipped, unless VLM_REQUIRE_BROWSER=1 is set:
then they fail.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from serve.chat_tab import NOT_ASKED

DESKTOP = {"width": 1280, "height": 850}
PHONE = {"width": 390, "height": 800}


def test_a_picture_is_asked_about_and_stays_for_the_next_question(
    visit: Any, picture: Path, standin: Any
) -> None:
    visitor = visit()
    visitor.attach(picture)
    assert visitor.ask("what is it?") == "1 pictures, 1 messages: what is it?"
    shown = visitor.tab.locator("#chat img")
    assert shown.count() == 1
    assert shown.first.evaluate("image => image.naturalWidth") == 40
    assert visitor.textbox.input_value() == ""
    assert visitor.ask("and now?") == "1 pictures, 3 messages: and now?"
    visitor.screenshot("chat")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_are_dropped_or_pasted(visit: Any, picture: Path, way: str) -> None:
    visitor = visit()
    data = base64.b64encode(picture.read_bytes()).decode()
    visitor.tab.evaluate(
        """([data, way]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            for (const name of ["a.png", "b.png"])
                transfer.items.add(new File([bytes], name, {type: "image/png"}));
            const target = document.querySelector("#box textarea");
            const options = {bubbles: true, cancelable: true};
            target.dispatchEvent(way === "drop"
                ? new DragEvent("drop", {...options, dataTransfer: transfer})
                : new ClipboardEvent("paste", {...options, clipboardData: transfer}));
        }""",
        [data, way],
    )
    visitor.tab.locator("#box .thumbnail-item").nth(1).wait_for()
    assert visitor.ask("how many?") == "2 pictures, 1 messages: how many?"


def test_stop_and_a_new_question_at_once(visit: Any, standin: Any) -> None:
    visitor = visit()
    visitor.say("stuck forever")
    visitor.wait_for_reply("tick tick")
    visitor.stop_button.click()
    visitor.say("hello")
    visitor.wait_for_reply(r"messages: hello")
    visitor.wait_until_idle()
    assert standin.ended.wait(5)
    assert visitor.replies.first.inner_text().strip().endswith("tick (stopped)")
    assert visitor.last_reply == "0 pictures, 3 messages: hello"
    assert "STALE" not in visitor.tab.locator("#chat").inner_text()


def test_a_question_during_an_answer_replaces_it(visit: Any, standin: Any) -> None:
    visitor = visit()
    visitor.say("talk forever")
    visitor.wait_for_reply("tick tick")
    visitor.say("wait, first this")
    visitor.wait_for_reply("messages: wait, first this")
    visitor.wait_until_idle()
    assert "tick" not in visitor.last_reply
    assert standin.ended.wait(5)


def test_closing_the_tab_stops_the_model(visit: Any, standin: Any) -> None:
    visitor = visit()
    visitor.say("talk forever")
    visitor.wait_for_reply("tick tick")
    visitor.tab.close()
    assert standin.ended.wait(15)


def test_errors_are_read_in_the_chat_and_it_goes_on(visit: Any, tmp_path: Path) -> None:
    visitor = visit()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture at all")
    visitor.attach(broken)
    reply = visitor.ask("what is it?")
    assert reply.startswith("\u26a0")
    assert "'broken.png'" in reply  # and not where the server keeps it
    assert visitor.ask("are you there?") == "0 pictures, 1 messages: are you there?"


def test_a_full_waiting_room_is_told(visit: Any) -> None:
    visitor = visit()
    full = {"status": 503, "json": {"detail": "Queue is full."}}
    visitor.tab.route("**/queue/join*", lambda route: route.fulfill(**full))
    visitor.say("hello")
    visitor.wait_for_reply(re.escape(NOT_ASKED))
    visitor.tab.unroute("**/queue/join*")
    assert visitor.ask("and now?") == "0 pictures, 1 messages: and now?"
    visitor.complaints.clear()  # the console reports the refused request


def test_sampling_is_what_the_controls_say(visit: Any, standin: Any) -> None:
    visitor = visit()
    visitor.tab.locator("#sampling button").first.click()
    visitor.tab.get_by_label("Seed").wait_for()
    visitor.screenshot("sampling")
    visitor.ask("defaults?")
    numbers = visitor.tab.locator("#sampling input[type=number]")
    for position, value in enumerate(("33", "0.7", "0.9")):
        numbers.nth(position).fill(value)
    visitor.tab.get_by_label("Seed").fill("5")
    visitor.ask("chosen?")
    default, chosen = (tuple(options.values()) for options in standin.options)
    assert default == (256, 0, 1, None)
    assert chosen == (33, 0.7, 0.9, 5)


HOSTILE = (
    '<script>window.hacked = 1</script><img src="http://beacon.example/a.png" '
    'onerror="window.hacked = 1"> ![x](http://beacon.example/b.png) '
    "<image> </s> **bold** $$x^2$$ &amp; <iframe src=//beacon.example></iframe>"
)


def test_what_the_model_says_is_shown_as_text_and_loads_nothing(visit: Any) -> None:
    visitor = visit()
    reply = visitor.ask(HOSTILE)
    assert reply == f"0 pictures, 1 messages: {HOSTILE}"
    assert visitor.tab.locator("#chat [data-testid=user]").inner_text() == HOSTILE
    assert visitor.tab.locator("#chat .message-content :is(img, script, iframe)").count() == 0
    assert visitor.tab.evaluate("window.hacked") is None


def test_the_page_may_not_load_from_elsewhere_even_if_it_is_made_to(visit: Any) -> None:
    visitor = visit()
    refused = visitor.tab.evaluate(
        """() => new Promise(done => {
            const image = new Image();
            image.onload = () => done(false);
            image.onerror = () => done(true);
            image.src = "http://127.0.0.2:1/beacon.png";
        })"""
    )
    assert refused
    assert any("Content Security Policy" in text for text in visitor.complaints)
    visitor.complaints.clear()
    visitor.elsewhere.clear()  # noted on its way, never sent


def test_an_example_is_one_click(visit: Any) -> None:
    visitor = visit()
    example = visitor.tab.locator("#chat .example")
    assert example.count() == 1
    visitor.screenshot("start")
    example.click()
    visitor.wait_for_reply("1 pictures, 1 messages: how red is it")
    visitor.wait_until_idle()


def test_retry_undo_and_new_chat(visit: Any, picture: Path, standin: Any) -> None:
    visitor = visit()
    visitor.attach(picture)
    first = visitor.ask("what is it?")
    visitor.tab.locator("#chat [aria-label=Retry]").click()
    visitor.wait_until(lambda: len(standin.seen) == 2)
    visitor.wait_for_reply(re.escape(first))
    visitor.wait_until_idle()
    assert len(standin.seen) == 2
    assert standin.seen[0] == standin.seen[1]
    visitor.tab.locator("#chat [aria-label=Undo]").click()
    visitor.tab.locator("#chat .example").wait_for()
    visitor.wait_until(lambda: visitor.textbox.input_value() == "what is it?")
    visitor.wait_until(lambda: visitor.tab.locator("#box .thumbnail-item").count() == 1)
    visitor.textbox.press("Enter")
    visitor.wait_for_reply(re.escape(first))
    visitor.wait_until_idle()
    visitor.tab.locator("#new-chat").click()
    visitor.tab.locator("#chat .example").wait_for()
    assert visitor.ask("anything?") == "0 pictures, 1 messages: anything?"


def test_two_people_do_not_meet(visit: Any, picture: Path) -> None:
    anne, bert = visit(), visit()
    anne.attach(picture)
    anne.say("anne's question forever")
    anne.wait_for_reply("tick tick")
    assert bert.ask("bert's question") == "0 pictures, 1 messages: bert's question"
    anne.stop_button.click()
    anne.wait_until_idle()
    assert "bert" not in anne.tab.locator("#chat").inner_text()
    assert "anne" not in bert.tab.locator("#chat").inner_text()
    assert bert.tab.locator("#chat img").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_the_screen(visit: Any, picture: Path, size: dict[str, int]) -> None:
    visitor = visit(viewport=size)
    visitor.attach(picture)
    visitor.ask("one very long question " * 20)
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
    box = visitor.textbox.bounding_box()
    assert box["y"] + box["height"] <= size["height"], "the text box is below the fold"
    visitor.screenshot(f"fits-{size['width']}")


def test_dark_and_light_follow_the_system(visit: Any) -> None:
    def brightness(scheme: str) -> int:
        tab = visit(color_scheme=scheme).tab
        colour = tab.evaluate("getComputedStyle(document.querySelector('#chat')).backgroundColor")
        return sum(int(number) for number in re.findall(r"\d+", colour)[:3])

    assert brightness("dark") < 200 < 600 < brightness("light")


def test_captions_of_many_pictures(visit: Any, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "<b>broken.png"
    broken.write_bytes(b"nothing")
    visitor = visit()
    visitor.tab.get_by_role("tab", name="Caption").click()
    visitor.tab.set_input_files("#pictures input[type=file]", [str(picture), str(broken)])
    visitor.tab.locator("#pictures .file").nth(1).wait_for()
    visitor.tab.locator("#caption-all").click()
    visitor.tab.get_by_text("2 of 2 pictures, 1 could not be used.").wait_for()
    table = visitor.tab.locator("#captions")
    table.get_by_text("a picture of 40").first.wait_for()
    assert "\u26a0" in table.inner_text()
    visitor.screenshot("captions")
    with visitor.tab.expect_download() as download:
        visitor.tab.locator("#caption-download").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"file", "caption"},
        {"file", "error", "code"},
    ]
