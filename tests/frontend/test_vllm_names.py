"""Small things that programs written for vLLM import."""

import argparse
import logging

import pytest

from frontend.engine_args import EngineArgs
from frontend.vllm_names import (
    Counter,
    FlexibleArgumentParser,
    TextPrompt,
    TokensPrompt,
    get_tokenizer,
    init_logger,
    random_uuid,
)
from ipc.errors import ConfigError
from tests.frontend.make_tokenizers import TINY


def test_flags_may_be_written_with_underscores() -> None:
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    args = parser.parse_args(["--max_model_len", "5", "--served_model_name=a_b", "--seed", "3"])
    assert (args.max_model_len, args.served_model_name, args.seed) == (5, ["a_b"], 3)
    assert isinstance(parser, argparse.ArgumentParser)


def test_counters_count_and_begin_again() -> None:
    counter = Counter(3)
    assert [next(counter), next(counter)] == [3, 4]
    counter.reset()
    assert next(counter) == 0


def test_request_ids_do_not_repeat() -> None:
    assert len({random_uuid() for _ in range(100)}) == 100


def test_prompts_are_plain_dictionaries() -> None:
    assert TextPrompt(prompt="x") == {"prompt": "x"}
    assert TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}


def test_loggers_are_the_standard_librarys() -> None:
    assert init_logger("a.b") is logging.getLogger("a.b")


def test_tokenizers_are_loaded_by_directory() -> None:
    assert get_tokenizer(str(TINY), tokenizer_mode="auto").decode([]) == ""
    with pytest.raises(ConfigError, match="--tokenizer"):
        get_tokenizer("/nowhere")
