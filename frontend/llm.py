"""LLM: offline batches. Prompts in, finished outputs out, in the order of the prompts.

The engine core runs in a process tree of its own. All names and arguments are the public contract
of 2024 and its successors.
"""

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from frontend.engine_args import EngineArgs
from frontend.inputs import PromptTooLongError
from frontend.llm_engine import LLMEngine
from frontend.lora_request import LoRARequest
from frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from frontend.prompts import Prompt, parse_prompt
from frontend.tokenizer import Tokenizer
from frontend.usage_context import UsageContext
from ipc.errors import EngineGenerateError, RequestError, UnsupportedError
from ipc.messages import SchedulerStats
from ipc.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from tqdm import tqdm

ChatMessages = Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)


class LLM:
    """A model for offline use. ``llm_engine`` is the engine underneath."""

    _PUBLIC_CONTRACT = True  # the names are given, and so is their number

    def __init__(  # noqa: PLR0913
        self,
        model: str,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        swap_space: float = 4,
        enforce_eager: bool = False,
        max_context_len_to_capture: int | None = None,
        max_seq_len_to_capture: int = 8192,
        disable_custom_all_reduce: bool = False,
        **kwargs: Any,
    ) -> None:
        """Start an engine and wait until it is ready.

        Args:
            kwargs: further arguments of ``EngineArgs``; unknown ones are a TypeError.

        Raises:
            ConfigError: a value cannot work; nothing was started.
            EngineStartError: a process could not start; carries the stage and the real cause.
        """
        engine_args = EngineArgs(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space=swap_space,
            enforce_eager=enforce_eager,
            max_context_len_to_capture=max_context_len_to_capture,
            max_seq_len_to_capture=max_seq_len_to_capture,
            disable_custom_all_reduce=disable_custom_all_reduce,
            **({"disable_log_stats": True} | kwargs),
        )
        self.llm_engine = LLMEngine.from_engine_args(
            engine_args, UsageContext.LLM_CLASS, enable_multiprocessing=True
        )
        self.request_counter = itertools.count()

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """An LLM on an engine that runs already, with or without processes of its own."""
        llm = cls.__new__(cls)
        llm.llm_engine = engine
        llm.request_counter = itertools.count()
        return llm

    # ------------------------------------------------------------ generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | Sequence[int] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest] | None = None,
        multi_modal_data: Any = None,
        *,
        allow_long_prompts: bool = False,
    ) -> list[RequestOutput]:
        """Generate for every prompt; the outputs are in the order of the prompts.

        Args:
            prompts: one prompt or several: texts, lists of ids, or mappings.
            sampling_params: one for all, or one per prompt; None: the defaults.
            prompt_token_ids: ids in place of texts, or, besides ``prompts``, their tokens.
            use_tqdm: show progress on stderr.
            allow_long_prompts: a prompt that leaves no room for output ends with an empty text
                and finish_reason "length", as in 2024, where it would raise otherwise.

        Raises:
            RequestError, UnsupportedError: a request cannot be served; none of them was.
            EngineGenerateError: a request failed inside the engine; the others were ended.
            EngineDeadError: the engine stopped.
        """
        if multi_modal_data is not None:
            raise UnsupportedError(
                "prompts with images, video or audio are not available in this version",
                "multi_modal_data",
            )
        inputs = pair_prompts(prompts, prompt_token_ids)
        params = _one_for_each("sampling_params", sampling_params or SamplingParams(), len(inputs))
        params = _final_only(params)
        loras = _one_for_each("lora_request", lora_request, len(inputs))
        batch = _Batch(self.llm_engine, self.request_counter, len(inputs))
        try:
            for each in zip(inputs, params, loras, strict=True):
                batch.add(*each, allow_long_prompts=allow_long_prompts)
            return batch.run(use_tqdm=use_tqdm)
        except BaseException:  # Ctrl-C included: nothing of this call stays behind
            batch.abort()
            raise

    def chat(
        self,
        messages: ChatMessages | Sequence[ChatMessages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation, or of each of several.

        Args:
            messages: OpenAI style: ``{"role": …, "content": …}``.
            chat_template: Jinja text in place of the model's own template.
            options: ``add_generation_prompt`` (True), ``continue_final_message`` (False),
                ``tools``, ``documents``, and ``chat_template_kwargs`` for the template.

        Raises:
            RequestError: the messages do not fit the template; and as ``generate``.
        """
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        prompts = self.preprocess_chat(conversations, chat_template, **options)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def preprocess_chat(
        self,
        conversations: Sequence[ChatMessages],
        chat_template: str | None = None,
        *,
        chat_template_content_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Prompt]:
        """The prompts that ``chat`` generates for: conversations by template, tokenised."""
        from frontend.chat_template import render, template_of_tokenizer

        if chat_template_content_format not in ("auto", "string"):
            raise UnsupportedError(
                f"chat_template_content_format {chat_template_content_format!r} is not available: "
                f"templates get each message's content as one text",
                "chat_template_content_format",
            )
        tokenizer = self.get_tokenizer()
        template = chat_template or template_of_tokenizer(tokenizer.chat_template)
        if template is None:
            raise RequestError(
                "the model has no chat template: pass one as chat_template", "chat_template"
            )
        prompts: list[Prompt] = []
        for messages in conversations:
            text = render(
                template,
                messages,
                special_tokens=tokenizer.special_tokens_map,
                **options,
                **(chat_template_kwargs or {}),
            )
            # The template writes the special tokens itself.
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation config recommends; our defaults where it is silent."""
        recommended = self.llm_engine.get_model_config().generation_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        fields = {name: recommended.get(name) for name in names}
        return SamplingParams.from_optional(**fields, max_tokens=recommended.get("max_new_tokens"))

    # ------------------------------------------------------------ the engine's own

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Tokenizer:
        """The tokenizer. ValueError with ``skip_tokenizer_init``."""
        return self.llm_engine.get_tokenizer(lora_request)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Tokenise and detokenise from now on with another tokenizer, ours or Hugging Face's."""
        self.llm_engine.set_tokenizer(tokenizer)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes; False when blocks are still held. There is no connector."""
        return self.llm_engine.reset_prefix_cache(reset_running_requests, reset_connector)

    def reset_mm_cache(self) -> bool:
        """True at once: images, which this cache would hold, are not served."""
        return self.llm_engine.reset_mm_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free device memory: level 1 keeps the weights on the host, level 2 drops them."""
        self.llm_engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo ``sleep``."""
        self.llm_engine.wake_up(tags)

    def start_profile(self, directory: str | None = None) -> None:
        """Start the workers' profiler; traces go to ``directory``, or to ./profile."""
        self.llm_engine.start_profile(directory)

    def stop_profile(self) -> list[str]:
        """Stop the profiler; the names of the trace files."""
        return self.llm_engine.stop_profile()

    def get_metrics(self) -> SchedulerStats:
        """The engine's counters and gauges now."""
        return self.llm_engine.get_stats()

    # ------------------------------------------------------------ not in this version

    def encode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: pooling is not available in this version."""
        raise UnsupportedError("pooling and embeddings are not available in this version")

    embed = classify = reward = score = encode

    def beam_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: beam search is not available in this version."""
        raise UnsupportedError("beam search is not available in this version")

    def collective_rpc(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no code travels between our processes."""
        self.llm_engine.collective_rpc()

    def apply_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no code travels between our processes."""
        self.llm_engine.apply_model()


class _Batch:
    """The requests of one ``generate`` call, numbered in the order of its prompts."""

    def __init__(self, engine: LLMEngine, counter: "itertools.count[int]", size: int) -> None:
        self._engine = engine
        self._counter = counter
        self._outputs: list[RequestOutput | None] = [None] * size
        self._places: dict[str, int] = {}  # request id -> index of its prompt
        self._num_added = 0

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        lora_request: LoRARequest | None,
        *,
        allow_long_prompts: bool,
    ) -> None:
        """Add the next prompt's request."""
        place, request_id = self._num_added, str(next(self._counter))
        self._num_added += 1
        try:
            self._engine.add_request(request_id, prompt, params, lora_request=lora_request)
        except PromptTooLongError as err:
            if not allow_long_prompts:
                raise
            logger.warning("prompt %d: %s; its output is empty", place, err)
            self._outputs[place] = _empty_output(request_id, prompt, params, err.prompt_token_ids)
        else:
            self._places[request_id] = place

    def run(self, *, use_tqdm: bool) -> list[RequestOutput]:
        """Step until every request has ended."""
        num_ended = len(self._outputs) - len(self._places)
        bar = _progress_bar(len(self._outputs), num_ended) if use_tqdm else None
        try:
            while self._places:
                for output in self._engine.step():
                    if output.finished and output.request_id in self._places:
                        self._note_finished(output)
                        if bar is not None:
                            _advance(bar, output)
        finally:
            if bar is not None:
                bar.close()
        outputs = [output for output in self._outputs if output is not None]
        assert len(outputs) == len(self._outputs), "a request ended without an output"
        return outputs

    def abort(self) -> None:
        """End what is open still."""
        self._engine.abort_request(self._places)
        self._places.clear()

    def _note_finished(self, output: RequestOutput) -> None:
        place = self._places.pop(output.request_id)
        if output.error is not None:
            raise EngineGenerateError(f"prompt {place}: {output.error}")
        self._outputs[place] = output


def pair_prompts(prompts: Any, prompt_token_ids: Any) -> list[Prompt]:
    """One prompt per request, from the ways of passing one or many, as texts, ids or both.

    Raises:
        ValueError: neither was given, or their numbers differ.
    """
    if prompts is None and prompt_token_ids is None:
        raise ValueError("either prompts or prompt_token_ids must be given")
    if prompt_token_ids is None:
        return list(prompts) if _is_batch(prompts) else [prompts]
    ids = list(prompt_token_ids)
    if ids and isinstance(ids[0], int):
        ids = [ids]
    if prompts is None:
        return [{"prompt_token_ids": each} for each in ids]
    texts = list(prompts) if _is_batch(prompts) else [prompts]
    if len(texts) != len(ids):
        raise ValueError(
            f"prompts and prompt_token_ids must be of one length, got {len(texts)} and {len(ids)}"
        )
    return [
        {"prompt": parse_prompt(text).text, "prompt_token_ids": each}
        for text, each in zip(texts, ids, strict=True)
    ]


def _is_batch(prompts: Any) -> bool:
    """Whether this is several prompts: a list, but not one of token ids."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        return False
    return not (prompts and isinstance(prompts[0], int))


def _one_for_each(name: str, given: Any, count: int) -> list[Any]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} must be one or as many as prompts ({count}), got {len(given)}")
    return list(given)


def _final_only(params: list[SamplingParams]) -> list[SamplingParams]:
    """Copies that ask for one output at the end: nobody sees the ones before it."""
    copies: dict[int, SamplingParams] = {}
    for each in params:
        if id(each) not in copies:
            copies[id(each)] = each.clone()
            copies[id(each)].output_kind = RequestOutputKind.FINAL_ONLY
    return [copies[id(each)] for each in params]


def _empty_output(
    request_id: str, prompt: Prompt, params: SamplingParams, prompt_token_ids: list[int]
) -> RequestOutput:
    """What a prompt that leaves no room for output gives, when that is no error."""
    now_s = time.time()
    return RequestOutput(
        request_id=request_id,
        prompt=parse_prompt(prompt).text,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=None,
        outputs=[CompletionOutput(index, "", [], 0.0, None, "length") for index in range(params.n)],
        finished=True,
        metrics=RequestMetrics(arrival_time=now_s, last_token_time=now_s, finished_time=now_s),
    )


def _progress_bar(total: int, initial: int) -> "tqdm[NoReturn]":
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc="Processed prompts", dynamic_ncols=True)


def _advance(bar: "tqdm[NoReturn]", output: RequestOutput) -> None:
    """One more request is done; show how many tokens a second that makes."""
    num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    bar.num_tokens = getattr(bar, "num_tokens", 0) + num_tokens
    elapsed_s = max(bar.format_dict["elapsed"], 1e-9)
    bar.set_postfix_str(f"{bar.num_tokens / elapsed_s:.1f} tokens/s", refresh=False)
    bar.update(1)
