"""What all handlers of one server share: the engine, the names it answers to, and its defaults."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from frontend.chat_template import template_of_tokenizer
from frontend.openai.errors import DrainingError, NotFoundError
from frontend.openai.lingerers import Lingerers
from ipc.config import ModelConfig
from ipc.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from frontend.async_llm import AsyncLLM
    from frontend.tokenizer import Tokenizer

MAX_TEMPLATE_PROCESSES = 4
CHAT_TEMPERATURE = 0.7  # where the checkpoint's generation config sets none
CHAT_DEFAULTS = {
    "temperature": CHAT_TEMPERATURE,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
COMPLETION_DEFAULTS = {**CHAT_DEFAULTS, "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How this server answers; each field is a flag of the same name."""

    response_role: str = "assistant"
    chat_template: str | None = None  # the template's text; None: the tokenizer's
    trust_request_chat_template: bool = False
    generation_config: str = "auto"  # "auto": the checkpoint's; "vllm": the API's own defaults
    strict_fields: bool = False
    api_keys: tuple[str, ...] = ()
    root_path: str = ""


@dataclass(slots=True)
class ServerState:
    """One server's shared state. Only the server's event loop touches it.

    ``is_draining`` turns true once, at the first signal to stop: from then on nothing is admitted.
    """

    engine: "AsyncLLM"
    model_config: ModelConfig
    tokenizer: "Tokenizer | None"
    options: ServerOptions
    metrics: "CollectorRegistry"
    created: int  # unix time of the start, shown by /v1/models
    max_prompts_at_once: int = 256  # of one body; the engine refuses more than it can queue
    chat_template: str | None = None
    chat_defaults: dict[str, Any] = field(default_factory=lambda: dict(CHAT_DEFAULTS))
    is_draining: bool = False
    num_open: int = 0  # HTTP requests being answered
    open_req_ids: set[str] = field(default_factory=set)  # what the engine works on for them
    lingerers: Lingerers = field(default_factory=Lingerers)  # streams that lost their readers
    template_slots: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(MAX_TEMPLATE_PROCESSES)
    )

    @property
    def model_name(self) -> str:
        """The first served name: it labels answers."""
        return self.model_config.served_names[0]

    def check_model(self, name: str | None) -> None:
        """Refuse names that are not served; no name means the one model there is.

        Raises:
            NotFoundError: no such model here.
        """
        if name is not None and name not in self.model_config.served_names:
            raise NotFoundError(f"the model {name[:200]!r} does not exist", param="model")

    def check_admission(self) -> None:
        """Refuse new work while the server stops, or once its engine is dead.

        Raises:
            DrainingError: the server is stopping.
            EngineDeadError: the engine was given up.
        """
        if self.is_draining:
            raise DrainingError("the server is shutting down", retry_after_s=5.0)
        if self.engine.errored:
            raise self.engine.dead_error

    def need_tokenizer(self) -> "Tokenizer":
        """The tokenizer.

        Raises:
            RequestError: the server runs with ``--skip-tokenizer-init``.
        """
        if self.tokenizer is None:
            raise RequestError("this server has no tokenizer: send token ids, ask for token ids")
        return self.tokenizer


def make_state(
    engine: "AsyncLLM", options: ServerOptions, metrics: "CollectorRegistry", *, created: int
) -> ServerState:
    """The state of a server on a ready engine. ``metrics`` is what the engine's loggers fill."""
    config = engine.vllm_config
    model_config = config.model_config
    tokenizer = None if model_config.skip_tokenizer_init else engine.tokenizer
    template = options.chat_template
    if template is None and tokenizer is not None:
        template = template_of_tokenizer(tokenizer.chat_template)
    return ServerState(
        engine=engine,
        model_config=model_config,
        tokenizer=tokenizer,
        options=options,
        metrics=metrics,
        created=created,
        max_prompts_at_once=config.scheduler_config.max_num_seqs,
        chat_template=template,
        chat_defaults=chat_defaults(model_config.generation_config, options.generation_config),
    )


def chat_defaults(generation_config: dict[str, Any], source: str) -> dict[str, Any]:
    """What absent sampling fields of a chat mean.

    A value that the checkpoint's ``generation_config.json`` sets is taken. ``do_sample`` is not a
    value: a checkpoint that says ``"do_sample": false`` without a temperature chats at 0.7, as
    one that says nothing. Completions do not look at the checkpoint: their defaults are the API's.

    Raises:
        ConfigError: ``source`` is neither "auto" nor "vllm".
    """
    if source not in ("auto", "vllm"):
        raise ConfigError(f"--generation-config must be auto or vllm, got {source!r}")
    defaults = dict(CHAT_DEFAULTS)
    if source == "auto":
        for name in defaults:
            value = generation_config.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                defaults[name] = value
    return defaults
