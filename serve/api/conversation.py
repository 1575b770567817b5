"""Messages of a request to `vlm.messages`, their pictures opened."""

from collections.abc import Callable

from serve.api.limits import Limits
from serve.api.problems import ApiError, problem_of
from serve.api.schema import AnyMessage, ImagePart
from vlm import messages as own
from vlm.errors import ImageError
from vlm.image_bytes import read_path
from vlm.images import CleanImage, load_image
from vlm.messages import Message

Fetch = Callable[[str], bytes]


def conversation(
    messages: list[AnyMessage], limits: Limits, draft_to: int | None, fetch: Fetch | None = None
) -> list[Message]:
    """The conversation with clean pictures.

    Args:
        messages: of the request.
        limits: on number and size.
        draft_to: as for `vlm.images.load_image`.
        fetch: gets a picture from an http(s) address; without one these are refused.

    Raises:
        ApiError: a picture cannot be used, or there are too many.
    """
    if len(messages) > limits.num_messages:
        raise ApiError(
            422,
            "too_many_messages",
            f"{len(messages)} messages; at most {limits.num_messages}",
            "messages",
        )
    parts = [part for message in messages for part in message.content]
    number = sum(isinstance(part, ImagePart) for part in parts)
    if number > limits.num_images:
        raise ApiError(
            422,
            "too_many_images",
            f"{number} pictures in one request; at most {limits.num_images}",
            "messages",
        )
    return [_message(message, i, limits, draft_to, fetch) for i, message in enumerate(messages)]


def _message(
    message: AnyMessage, index: int, limits: Limits, draft_to: int | None, fetch: Fetch | None
) -> Message:
    role: own.Role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, (own.TextPart(message.content),))
    parts: list[own.Part] = []
    for j, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            param = f"messages.{index}.content.{j}"
            parts.append(own.ImagePart(_open(part.image_url.url, param, limits, draft_to, fetch)))
        else:
            parts.append(own.TextPart(part.text))
    return Message(role, tuple(parts))


def _open(
    url: str, param: str, limits: Limits, draft_to: int | None, fetch: Fetch | None
) -> CleanImage:
    name = f"the picture at {param}"
    try:
        data = _bytes(url, name, limits, fetch)
        return load_image(data, limits=limits.images, draft_to=draft_to, name=name)
    except ImageError as error:
        raise problem_of(error, param) from None


def _bytes(url: str, name: str, limits: Limits, fetch: Fetch | None) -> bytes:
    """What a URL stands for. Never a file: a client names none of this machine's."""
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return read_path(url, limits.images.max_bytes)
    if not scheme.startswith(("http://", "https://")):
        raise ImageError(
            f"{name} is no data: URI; send it as data:image/png;base64,...", "bad_image_url"
        )
    if fetch is None:
        raise ImageError(
            f"{name} is an address, and this server fetches none; send it as "
            "data:image/png;base64,...",
            "remote_url",
        )
    return fetch(url)
