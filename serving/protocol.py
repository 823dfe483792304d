"""The bodies of the OpenAI API: what each parameter is, and which are refused.

Every parameter that OpenAI documents is a field here, which acts, or a row of ``REFUSED``: it may
then be given only with a value that changes nothing. Anything else is a 400 that names it. The
extensions have vLLM's names.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmzoo_jax.errors import InputError
from serving.beam_search import BeamOptions
from serving.requests import Sampling

MAX_CHOICES = 128  # of a prompt; OpenAI's own limit
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(InputError):
    """An answer that is an error. ``param`` names the parameter that is wrong."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": TYPES.get(self.status, kind)}
        return {"error": error | {"param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# --- what the endpoints take --------------------------------------------------------------------


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """Keys with null are left out first: clients send back what they got."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(
            part.text for part in self.content
        )  # fmt: skip


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(_Body):
    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None  # the schema always holds, so either value is kept


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Body):
    """What the answer must be; one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, as llguidance reads it


Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Count = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Generation(_Body):
    """What chat and completions share. None: not given."""

    model: str
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    use_beam_search: bool | None = None  # with ``best_of`` beams, else ``n``
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    repetition_stop: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None  # seconds
    user: str | None = None  # goes into the log

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None  # the newer name of user


class CompletionRequest(_Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class EmbeddingRequest(_Body):
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeRequest(_Body):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[int]


class LoadAdapterRequest(_Body):
    """vLLM's: ``lora_path`` is a PEFT folder in the server's ``--adapters_dir``."""

    model: None = None
    lora_name: str
    lora_path: str


class UnloadAdapterRequest(_Body):
    model: None = None
    lora_name: str


@dataclass(frozen=True)
class Refused:
    """A parameter that can't act: the values that ask for nothing, and why it is refused."""

    off: tuple[Any, ...]
    why: str

    def is_off(self, value: Any) -> bool:
        return any(value == off and type(value) is type(off) for off in self.off)


_TOOLS = "the chat formats here have no tool calls"
_TEXT = "only text comes in and goes out"
_STORE = "nothing is stored here"
_CACHE = "prefixes are always kept and reused"
REFUSED: Mapping[type[_Body], Mapping[str, Refused]] = {
    ChatRequest: {
        "tools": Refused((None, []), _TOOLS),
        "tool_choice": Refused((None, "none", "auto"), _TOOLS),
        "parallel_tool_calls": Refused((None, True), _TOOLS),
        "functions": Refused((None, []), _TOOLS),
        "function_call": Refused((None, "none", "auto"), _TOOLS),
        "audio": Refused((None,), _TEXT),
        "modalities": Refused((None, ["text"]), _TEXT),
        "prediction": Refused((None,), "predicted output is not used"),
        "reasoning_effort": Refused((None, "none"), "the models here don't reason apart"),
        "verbosity": Refused((None, "medium"), "the models here are not trained for it"),
        "web_search_options": Refused((None,), "there is no search"),
        "moderation": Refused((None,), "there is no moderation"),
        "store": Refused((None, False), _STORE),
        "metadata": Refused((None, {}), _STORE),
        "service_tier": Refused((None, "auto", "default"), "there is one tier"),
        "prompt_cache_key": Refused((None,), _CACHE),
        "prompt_cache_options": Refused((None,), _CACHE),
        "prompt_cache_retention": Refused((None,), _CACHE),
    },
    CompletionRequest: {
        "suffix": Refused((None, ""), "the models here don't fill in the middle"),
    },
    EmbeddingRequest: {
        "dimensions": Refused((None,), "the models are not trained for shorter embeddings"),
    },
}

_DRAWN = "the likeliest answers are searched for, none is drawn"
_RULED = "answers are scored by the model's own probabilities"
BESIDE_BEAMS: Mapping[str, Refused] = {  # what can't act with ``use_beam_search``
    "temperature": Refused((None, 0.0), _DRAWN),
    "top_k": Refused((None, 0, -1), _DRAWN),
    "top_p": Refused((None, 1.0), _DRAWN),
    "min_p": Refused((None, 0.0), _DRAWN),
    "repetition_penalty": Refused((None, 1.0), _RULED),
    "presence_penalty": Refused((None, 0.0), _RULED),
    "frequency_penalty": Refused((None, 0.0), _RULED),
    "logit_bias": Refused((None, {}), _RULED),
    "min_tokens": Refused((None, 0), _RULED),
    "structured_outputs": Refused((None,), _RULED),
    "response_format": Refused((None, ResponseFormat(type="text")), _RULED),
    "stop": Refused((None, []), "beams end at tokens alone; use stop_token_ids"),
    "repetition_stop": Refused((None, 0), "beams end at tokens alone"),
    "logprobs": Refused((None, False), "they are used for the search"),
    "top_logprobs": Refused((None,), "they are used for the search"),
    "prompt_logprobs": Refused((None,), "they are used for the search"),
    "stream": Refused((None, False), "the best answer is known last"),
}

Request = TypeVar("Request", bound=_Body)


def parse(kind: type[Request], data: bytes) -> Request:
    """The body of a request; ApiError that names the first parameter that is wrong."""
    try:
        body = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    refused = REFUSED.get(kind, {})
    for name in refused.keys() & body.keys():
        value = body.pop(name)
        if not refused[name].is_off(value):
            raise ApiError(
                f"{name} is not supported: {refused[name].why}",
                param=name,
                code="unsupported_parameter",
            )
    if unknown := sorted(body.keys() - kind.model_fields.keys()):
        near = difflib.get_close_matches(unknown[0], kind.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ApiError(
            f"unknown parameter {unknown[0]!r}{hint}", param=unknown[0], code="unknown_parameter"
        )
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(
            f"{where}: {first['msg']}", param=str(first["loc"][0]), code="invalid_value"
        ) from error
    if isinstance(request, _Generation):
        _check_choices(request)
    return request


def _check_choices(request: _Generation) -> None:
    """How many there are, and how they are found."""
    more = request.best_of is not None and request.best_of > (request.n or 1)
    if request.best_of is not None and request.best_of < (request.n or 1):
        raise ApiError("best_of is less than n", param="best_of")
    if request.use_beam_search:
        for name, refused in BESIDE_BEAMS.items():
            if not refused.is_off(getattr(request, name, None)):
                raise ApiError(
                    f"{name} can't be used with use_beam_search: {refused.why}",
                    param=name,
                    code="unsupported_parameter",
                )
        return
    for name in ("length_penalty", "early_stopping"):
        if getattr(request, name) is not None:
            raise ApiError(f"{name} needs use_beam_search=true", param=name)
    if request.stream and more:
        raise ApiError("best_of can't be streamed: the best is known last", param="best_of")


# --- what the engine is asked -------------------------------------------------------------------

_AS_GIVEN = (
    "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "ignore_eos", "repetition_stop", "prompt_logprobs",
)  # fmt: skip


def sampling(request: _Generation, *, room: int, seed: int) -> Sampling:
    """How the tokens of the first choice are chosen. ``room``: the tokens that an answer can have
    at most; ``seed``: where the request has none."""
    values = {name: getattr(request, name) for name in _AS_GIVEN}
    values["max_tokens"] = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError("top_logprobs needs logprobs=true", param="top_logprobs")
        values["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
        if request.max_completion_tokens is not None:
            values["max_tokens"] = request.max_completion_tokens
        elif values["max_tokens"] is None:
            values["max_tokens"] = max(1, room)
    else:
        values["logprobs"] = request.logprobs
        if request.max_tokens is None:
            values["max_tokens"] = DEFAULT_COMPLETION_TOKENS
        if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
            values["prompt_logprobs"] = request.logprobs
    if (request.best_of or 1) > (request.n or 1) and values["logprobs"] is None:
        values["logprobs"] = 0  # they say which are the best
    if request.top_k is not None:
        values["top_k"] = 0 if request.top_k == -1 else request.top_k  # vLLM's two ways of off
    if request.logit_bias:
        values["logit_bias"] = dict(itertools.starmap(_bias, request.logit_bias.items()))
    values["stop_token_ids"] = tuple(request.stop_token_ids or ())
    values["seed"] = (seed if request.seed is None else request.seed) % 2**32
    with _naming_the_parameter():
        return Sampling(**{name: v for name, v in values.items() if v is not None})


@contextlib.contextmanager
def _naming_the_parameter() -> Iterator[None]:
    """An InputError that begins with "NAME=" is the ApiError of that parameter."""
    try:
        yield
    except InputError as error:
        raise ApiError(
            str(error), param=str(error).partition("=")[0], code="invalid_value"
        ) from error


def beams(request: _Generation) -> BeamOptions | None:
    """None: no beam search."""
    if not request.use_beam_search:
        return None
    given = {name: getattr(request, name) for name in ("length_penalty", "early_stopping")}
    given = {name: value for name, value in given.items() if value is not None}
    with _naming_the_parameter():
        return BeamOptions(beams=request.best_of or request.n or 1, **given)


def _bias(token: str, bias: float) -> tuple[int, float]:
    if not (token.isascii() and token.isdigit() and -100 <= bias <= 100):
        raise ApiError(
            f"logit_bias: {token!r}: {bias} is no token id with a bias of -100 to 100",
            param="logit_bias",
            code="invalid_value",
        )
    return int(token), bias
