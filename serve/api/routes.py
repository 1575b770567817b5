"""The addresses of the API: /v1/models, /v1/chat/completions, /health and /metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.api.metrics import CONTENT_TYPE
from serve.api.openapi import describe
from serve.api.problems import ApiError, problem_of
from serve.api.replies import DONE, Envelope, ending, event, usage_of
from serve.api.service import Order, Service
from serve.api.told import Told
from vlm.answers import to_answer

CLOSED_REQUEST = 499  # nginx's word for a client that went away
NO_STORE = {"Cache-Control": "no-store"}


def add_api(app: FastAPI, service: Service) -> None:
    """Put all addresses into an application, before anything that is mounted at its root."""
    app.add_api_route("/health", partial(_health, service), include_in_schema=False)
    app.add_api_route("/metrics", partial(_metrics, service), include_in_schema=False)
    app.mount("/v1", build_api(service))


def build_api(service: Service) -> FastAPI:
    """What lies below /v1, with its description at /v1/openapi.json."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return ApiError(error.status_code, code, str(error.detail)).response()

    api.add_exception_handler(HTTPException, told)
    description = describe(service.model_id)

    @api.get("/openapi.json")
    async def openapi() -> JSONResponse:
        return JSONResponse(description)

    @api.get("/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @api.get("/models/{model:path}")
    async def model(model: str) -> JSONResponse:
        if model != service.model_id:
            text = f"there is no model {model[:100]!r} here; use {service.model_id!r}"
            return ApiError(404, "model_not_found", text, "model").response()
        return JSONResponse(_model(service))

    @api.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        response = await _complete(service, request)
        if not isinstance(response, Streamed):
            service.metrics.requests.labels(str(response.status_code)).inc()
        return response

    return api


class Streamed(StreamingResponse):
    """A stream that is closed whatever happens, even before its first chunk.

    Args:
        chunks: what is sent.
        close: called once, in the end.
    """

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {**NO_STORE, "X-Accel-Buffering": "no"}
        super().__init__(chunks, 200, headers, "text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _complete(service: Service, request: Request) -> Response:
    with ExitStack() as stack:
        try:
            stack.enter_context(service.place())
            order = await service.order(request)
            stack.callback(service.leave, order)
            if order.asked.stream:
                return Streamed(_chunks(service, order), stack.pop_all().close)
            return JSONResponse(await _whole(service, order, request), headers=NO_STORE)
        except ClientDisconnect:
            return Response(status_code=CLOSED_REQUEST)
        except Exception as error:
            return problem_of(error).response()


async def _whole(service: Service, order: Order, request: Request) -> dict[str, Any]:
    gone = asyncio.ensure_future(_gone(request))
    try:
        while not order.ended:
            news = asyncio.ensure_future(order.news.wait())
            await asyncio.wait({gone, news}, return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            if gone.done():
                raise ClientDisconnect
            order.news.clear()
    finally:
        gone.cancel()
    return await service.in_thread(_reply, service, order)


def _reply(service: Service, order: Order) -> dict[str, Any]:
    processor = service.model.processor
    completions = [job.result() for job in order.jobs]
    if any(each.finish_reason == "cancelled" for each in completions):
        raise _stopping()
    usage = _usage(service, order, sum(len(each.ids) for each in completions))
    answers = [to_answer(each, processor) for each in completions]
    return Envelope(service.model_id).whole(answers, usage)


async def _gone(request: Request) -> None:
    """Return once the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(service: Service, order: Order) -> AsyncIterator[bytes]:
    envelope = Envelope(service.model_id)
    answers = [Told(job, service.model.processor, bool(order.asked.logprobs)) for job in order.jobs]
    for index in range(len(answers)):
        yield envelope.chunk(index, {"role": "assistant", "content": ""})
    status = 200
    try:
        while not all(each.finished for each in answers):
            await order.news.wait()
            order.news.clear()
            for index, each in enumerate(answers):
                if not each.finished:
                    for chunk in _news(envelope, index, each):
                        yield chunk
        options = order.asked.stream_options
        if options is not None and options.include_usage:
            number = sum(len(each.job.result().ids) for each in answers)
            yield envelope.usage_chunk(_usage(service, order, number))
        yield DONE
    except (asyncio.CancelledError, GeneratorExit):
        status = CLOSED_REQUEST
        raise
    except Exception as error:
        problem = problem_of(error)
        status = problem.status
        yield event(problem.body)
    finally:
        service.metrics.requests.labels(str(status)).inc()


def _news(envelope: Envelope, index: int, told: Told) -> list[bytes]:
    text, tokens = told.news()
    chunks = []
    if text or tokens:
        logprobs = None if tokens is None else {"content": tokens, "refusal": None}
        chunks.append(envelope.chunk(index, {"content": text}, logprobs=logprobs))
    if told.finished:
        reason = told.job.result().finish_reason
        if reason == "cancelled":
            raise _stopping()
        chunks.append(envelope.chunk(index, {}, **ending(reason)))
    return chunks


def _stopping() -> ApiError:
    return ApiError(503, "draining", "the server ends before the answer does", retry=2)


def _usage(service: Service, order: Order, num_new_tokens: int) -> dict[str, Any]:
    request = order.jobs[0].request
    return usage_of(request, service.model.processor.image_token_id, num_new_tokens)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.started,
        "owned_by": "vlm",
        "max_model_len": service.model.processor.context_length,
    }


async def _health(service: Service) -> Response:
    status = service.status
    body = {"status": status, "model": service.model_id}
    return JSONResponse(body, 200 if status == "ok" else 503, NO_STORE)


async def _metrics(service: Service) -> Response:
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})
