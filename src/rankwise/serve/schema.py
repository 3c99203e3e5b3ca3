"""Requests in OpenAI's form. What would change an answer and is not done here is refused, never passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rankwise.files import is_text

# Fields that change nothing of an answer.
_PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of OpenAI's and vLLM's that are not done here, each with the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
}

Stop = Annotated[str, Field(min_length=1, max_length=200)]
TokenIds = list[int]


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """A field that is null is as good as absent; halves of characters, which JSON can spell, are none."""
        if not isinstance(fields, dict):
            return fields
        if not is_text(fields):
            raise ValueError("expected text, found a NUL character or half of a surrogate pair in it: leave it out")
        return {name: value for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _asks_for_what_is_done(self) -> _Form:
        for name, value in (self.model_extra or {}).items():
            if name in _PASSED_OVER or value in _NOT_DONE.get(name, ()):
                continue
            what = "is not done here" if name in _NOT_DONE else "is not known"
            raise ValueError(f"{name} {what}: leave it out")
        return self


class StreamOptions(_Form):
    """What a stream brings along."""

    include_usage: bool = False


class _Request(_Form):
    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def answer_limit(self) -> int | None:
        """The longest answer that is asked for, in tokens; None: as long as may be."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many tokens to report at each place; None: report nothing."""
        raise NotImplementedError


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[TokenIds]:
        """One or several, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        single = self.prompt and isinstance(self.prompt[0], int)
        return [self.prompt] if single else self.prompt  # type: ignore[return-value]

    @property
    def answer_limit(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(_Form):
    """A part of a message that is given in parts."""

    type: Literal["text"]
    text: str


class ChatMessage(_Form):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class LoadRequest(_Form):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str


class UnloadRequest(_Form):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
