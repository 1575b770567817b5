"""`vlm ask`, `vlm chat` and `vlm serve`: talking to a model."""

import sys
from typing import Annotated, Any

import typer

from serve.options import (
    Compile,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    Quantize,
    Temperature,
    open_model,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the `vlm` command."""
    for command in (ask, chat, serve):
        app.command()(command)


def ask(
    image: Annotated[str, typer.Argument(help="Path of a picture.")],
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    compile: Compile = False,
    look: Annotated[
        str | None, typer.Option(help="Write a .png of where it looked, word by word.")
    ] = None,
) -> None:
    """Answer one question about one picture."""
    from vlm.images import load_image
    from vlm.messages import parse_messages, user

    if question == "-":
        question = sys.stdin.read().strip()
    load_image(image)  # a wrong path is told now, and not after seconds of loading a model
    parse_messages([user(question, image)])
    assistant = open_model(model, device, dtype, quantize, compile)
    from serve.terminal import printable

    answer = ""
    for piece in assistant.stream(
        [user(question, image)], max_new_tokens=max_new_tokens, temperature=temperature
    ):
        answer += piece
        print(printable(piece), end="", flush=True)
    print()
    if look is not None:
        _write_look(look, assistant, image, question, answer)


def _write_look(path: str, assistant: Any, image: str, question: str, answer: str) -> None:
    from vlm.look_sheet import write_sheet
    from vlm.looking import look
    from vlm.messages import user

    write_sheet(
        path, assistant.processor, [image], look(assistant, [user(question, image)], answer)
    )
    print(path)


def chat(
    image: Annotated[str | None, typer.Argument(help="Path of a picture to start with.")] = None,
    model: Model = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Chat in the terminal."""
    from serve.session import Sampling
    from serve.terminal import TerminalChat
    from vlm.images import load_image

    if image is not None:
        load_image(image)
    assistant = open_model(model, device, dtype, quantize, compile)
    print(f"{assistant.name}: {assistant.about}")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    TerminalChat(assistant, sampling, [image] if image is not None else []).run()


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 opens the server to the network; needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLM_API_KEY", help="Asked for on every address but /health; or in VLM_API_KEY."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who can reach --host.")
    ] = False,
    allow_remote_images: Annotated[
        bool,
        typer.Option(help="Let clients of the API name pictures by URL; public hosts alone."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Chat in the browser, and the OpenAI API at /v1 beside it."""
    from serve.access import access_for

    access = access_for(host, api_key, no_auth=no_auth)
    assistant = open_model(model, device, dtype, quantize, compile)
    from functools import partial

    from serve.api.limits import Limits
    from serve.app import launch
    from vlm.remote import fetch_picture

    limits = Limits()
    fetch = partial(fetch_picture, limits=limits.images) if allow_remote_images else None
    launch(assistant, host, port, access=access, limits=limits, fetch=fetch)
