"""Colours, fonts and the header of the page; nothing here is fetched from anywhere."""

from html import escape
from typing import Protocol

import gradio as gr

SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace"]

REAL_MODEL = "vlm serve --model llava-hf/llava-1.5-7b-hf"


class Described(Protocol):
    """What the header says of an assistant."""

    @property
    def name(self) -> str:
        """A short name."""

    @property
    def about(self) -> str:
        """One honest line on what it knows."""

    @property
    def device(self) -> object:
        """Where it runs."""

    @property
    def num_parameters(self) -> int:
        """How many weights it has."""


def theme() -> gr.themes.Base:
    """A quiet theme on the fonts that the visitor's machine has."""
    return gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS
    )


# In the page's head, not gradio's `css`: gradio confines rules inside @media to the inner page.
HEAD = """<style>
.gradio-container .fillable { max-width: 980px !important; width: 100%; margin: 0 auto; }
.gradio-container main.contain { width: 100%; }
#header h1 { margin: 0; font-size: 1.35rem; line-height: 1.3; }
#header p { margin: .2rem 0 0; opacity: .8; }
#header .facts { display: flex; flex-wrap: wrap; gap: .3rem .5rem; margin-top: .5rem; }
#header .facts span { border: 1px solid var(--border-color-primary); border-radius: 999px;
  padding: .05rem .6rem; font-size: .8rem; opacity: .8; }
#header code { font-family: var(--font-mono); font-size: .85em; overflow-wrap: anywhere; }

#chat { height: calc(100dvh - 400px) !important; min-height: 340px; }
#chat, .form:has(#box) { border: 1px solid var(--border-color-primary); }
#chat .wrapper > .top-panel { display: none; } /* the button below does the same */
#chat .message-content { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .message-content .md { margin: 0; }
#chat .message img { max-height: 260px; width: auto; border-radius: 6px; }
#chat .message-buttons-right, #chat [aria-label="Share"] { display: none; }
#chat .example { border: 1px solid var(--border-color-primary); }
#chat .example-image-container { width: 112px; height: 112px; }
footer .divider { display: none !important; }
#below { align-items: flex-start; }
#new-chat { max-width: 130px; }

@media (max-width: 640px) {
  .gradio-container .main.fillable.app { padding: .5rem !important; }
  #header h1 { font-size: 1.15rem; }
  #header p { font-size: .85rem; }
  #chat { height: calc(100dvh - 420px) !important; min-height: 280px; }
  #chat .example-image-container { width: 56px; height: 56px; flex-shrink: 0; }
  #chat .example-content { flex-direction: row; align-items: center; gap: .75rem; }
  #chat .example { padding: .4rem; }
}
</style>"""


def header(assistant: Described, *, built_in: bool) -> str:
    """The top of the page as HTML, every value escaped."""
    facts = [f"{count(assistant.num_parameters)} parameters", f"on {assistant.device}"]
    chips = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    hint = f"<p>For a real model: <code>{escape(REAL_MODEL)}</code></p>" if built_in else ""
    return (
        f"<h1>{escape(assistant.name)}</h1><p>{escape(assistant.about)}</p>{hint}"
        f'<div class="facts">{chips}</div>'
    )


def count(number: int) -> str:
    """A large number in three digits or so: 7.06 billion, 4.2 million, 950."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return str(number)
