"""What a request of the OpenAI API may say. Anything else is an error and never ignored.

The names are OpenAI's (https://platform.openai.com/docs/api-reference/chat/create); `top_k`,
`min_p` and `repetition_penalty` are `vlm.engine.sampling.Sampling`'s, as other servers have
them too.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from serve.api.problems import ApiError
from vlm.engine.checks import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from vlm.messages import nearest

MAX_TEMPERATURE = 2
MAX_SEED = 2**63 - 1


class Strict(BaseModel):
    """No unknown field, no conversion; numbers have bounds, which NaN is never within."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A stretch of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where a picture is: a ``data:`` URI."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(content: Any) -> str:
    return "plain" if isinstance(content, str) else "parts"


_UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
UserContent = Annotated[
    Annotated[str, Tag("plain")] | Annotated[list[_UserPart], Tag("parts")], Discriminator(_kind)
]
TextContent = Annotated[
    Annotated[str, Tag("plain")] | Annotated[list[TextPart], Tag("parts")], Discriminator(_kind)
]


class SystemMessage(Strict):
    """Instructions; the first message, if there are any."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(Strict):
    """A question, with pictures or without."""

    role: Literal["user"]
    content: UserContent


class AssistantMessage(Strict):
    """An earlier answer, as it was given: what this server never says may stand there as null."""

    role: Literal["assistant"]
    content: TextContent
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False


class PlainFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObject(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema, and what the client calls it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchema(Strict):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | JsonObject | JsonSchema, Field(discriminator="type")]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ChatRequest(Strict):
    """The body of a chat completion request. Null means the default everywhere."""

    model: str
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


def parse_request(body: bytes) -> ChatRequest:
    """A request from its JSON text.

    Raises:
        ApiError: 400 for what is no JSON, 422 for what is no request.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _problem(error) from None
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise _wrong("max_tokens", "max_tokens and max_completion_tokens exclude each other")
    if request.top_logprobs is not None and not request.logprobs:
        raise _wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    if request.stream_options is not None and not request.stream:
        raise _wrong("stream_options", "stream_options needs stream to be true")
    return request


def sampling_of(request: ChatRequest) -> dict[str, Any]:
    """The request as arguments of `vlm.assistant.Assistant.prepare`; temperature 0 by default.

    Raises:
        ApiError: a token of logit_bias is no number.
    """
    options: dict[str, Any] = {
        name: getattr(request, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        if getattr(request, name) is not None
    }
    options["max_new_tokens"] = request.max_completion_tokens or request.max_tokens
    if request.stop:
        options["stop_strings"] = request.stop
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    if request.logit_bias:
        if not all(key.isascii() and key.isdigit() for key in request.logit_bias):
            raise _wrong("logit_bias", "logit_bias names tokens by their ids, such as {'42': -1}")
        options["logit_bias"] = {int(key): value for key, value in request.logit_bias.items()}
    if isinstance(request.response_format, JsonObject):
        options["json_schema"] = {"type": "object"}
    elif isinstance(request.response_format, JsonSchema):
        options["json_schema"] = request.response_format.json_schema.schema_
    return options


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(422, "invalid_value", message, param)


_TAGS = {"system", "developer", "user", "assistant", "text", "image_url"}


def _problem(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is no JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        name, inside = str(first["loc"][-1])[:100], len(first["loc"]) > 1
        guess = "" if inside else nearest(name, ChatRequest.model_fields)
        place = f" in {param.rpartition('.')[0]}" if inside else ""
        hint = guess if "did you mean" in guess else ""
        return ApiError(422, "unknown_field", f"unknown field {name!r}{place}{hint}", param)
    return ApiError(422, "invalid_value", f"{param}: {first['msg']}", param or None)


def _path(loc: tuple[int | str, ...]) -> str:
    """Where in the request, without the names that pydantic gives to the cases of a union."""
    kept: list[str] = []
    before: int | str = ""
    for item in loc:
        is_case = isinstance(before, int) and item in _TAGS
        if not is_case and not (before == "content" and item in ("plain", "parts")):
            kept.append(str(item))
        before = item
    return ".".join(kept)[:200]
