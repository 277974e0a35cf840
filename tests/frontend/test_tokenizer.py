"""The fast tokenizer gives what Hugging Face's gives, without transformers being loaded."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from frontend.tokenizer import FastTokenizer, clean_up_spaces, load_tokenizer_directory
from ipc.errors import ConfigError, RequestError
from tests.frontend.make_tokenizers import (
    TINY,
    fast,
    sentencepiece_style,
    word_pieces,
    write_directory,
)

TEXTS = [
    "",
    " ",
    "hello world",
    " a  the\n\ttab, the. don't!",
    "Grüße 🙂 你好 \ud7ff",
    "<s>a</s> <|im_end|>b",
    "playing the!",
]


CASES = {
    "tiny": None,
    "sentencepiece style": (sentencepiece_style, {"bos_token": "<s>", "eos_token": "</s>"}),
    "add_eos_token, which the post-processor overrules": (
        sentencepiece_style,
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True},
    ),
    "more special tokens than tokenizer.json has": (
        sentencepiece_style,
        {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "<end>", "special": True},
            "additional_special_tokens": ["<turn>", "the"],
        },
    ),
    "word pieces, cleaned up": (
        word_pieces,
        {"sep_token": "[SEP]", "clean_up_tokenization_spaces": True},
    ),
    "cleaning up is not for BPE": (sentencepiece_style, {"clean_up_tokenization_spaces": True}),
}
Pair = tuple[FastTokenizer, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Each case, loaded by us and by Hugging Face."""
    root, loaded = tmp_path_factory.mktemp("tokenizers"), {}
    for i, (name, case) in enumerate(CASES.items()):
        path = TINY if case is None else write_directory(root / str(i), case[0](), **case[1])
        ours = load_tokenizer_directory(path)
        assert isinstance(ours, FastTokenizer)
        loaded[name] = (ours, PreTrainedTokenizerFast.from_pretrained(str(path)))
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_text_becomes_the_ids_that_hugging_face_gives(name: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs[name]
    for text in TEXTS:
        for add in (True, False):
            assert ours.encode(text, add) == theirs.encode(text, add_special_tokens=add), text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_ids_become_the_text_that_hugging_face_gives(name: str, pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs[name]
    rng = random.Random(name)
    for _ in range(300):
        ids = [rng.randrange(len(ours)) for _ in range(rng.randrange(20))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
            tokens = ours.convert_ids_to_tokens(ids, skip)
            assert tokens == theirs.convert_ids_to_tokens(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_are_those_that_hugging_face_names(
    name: str, pairs: dict[str, Pair]
) -> None:
    ours, theirs = pairs[name]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    for attribute in ("bos_token_id", "eos_token_id", "pad_token_id", "eos_token", "unk_token"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert ours.model_max_length == theirs.model_max_length
    assert ours.chat_template == theirs.chat_template


def test_names_that_users_know_work() -> None:
    tokenizer = load_tokenizer_directory(TINY)
    assert isinstance(tokenizer, FastTokenizer)
    ids = tokenizer.encode("def f(x):")
    assert tokenizer("def f(x):") == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert tokenizer(["a", "b"])["input_ids"] == [tokenizer.encode("a"), tokenizer.encode("b")]
    assert tokenizer.batch_decode([ids, []]) == ["def f(x):", ""]
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("def f(x):")) == "def f(x):"
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("def f(x):")) == ids
    assert tokenizer.convert_tokens_to_ids("no such token") is None
    assert tokenizer.get_added_vocab()["<|pad|>"] == tokenizer.pad_token_id == 3
    assert tokenizer.decode(ids[0]) == "def"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tokenizer.nonsense


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_become_the_prompt_that_hugging_face_makes(
    add_generation_prompt: bool, pairs: dict[str, Pair]
) -> None:
    ours, theirs = pairs["tiny"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = ours.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    ids = ours.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert ids == ours.encode(text, add_special_tokens=False)
    assert ours.apply_chat_template(messages, chat_template="x", tokenize=False) == "x"


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        fast(sentencepiece_style()).apply_chat_template([{"role": "user", "content": "hi"}])


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = load_tokenizer_directory(TINY)
    assert tokenizer.decode([tokenizer.vocab_size, 10**6, -1, 2**40]) == ""
    assert tokenizer.convert_ids_to_tokens([10**6, -1, 2**40]) == ["", "", ""]


def test_half_a_surrogate_pair_is_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="cannot be tokenised"):
        load_tokenizer_directory(TINY).encode("\ud800")


def test_truncation_baked_into_the_file_is_off() -> None:
    backend = sentencepiece_style()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(fast(backend).encode("a " * 50)) > 4
    assert len(fast(backend).encode("a")) < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("do n't ?", "don't?"),
        ("a ' b , c .", "a'b, c."),
        ("it 's we 've they 're I 'm", "it's we've they're I'm"),
        ("plain text", "plain text"),
    ],
)
def test_cleaning_up_removes_spaces_before_punctuation(text: str, expected: str) -> None:
    assert clean_up_spaces(text) == expected


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer_directory(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        load_tokenizer_directory(tmp_path / "nowhere")


def test_loading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from frontend.tokenizer import *;"
        f"print(load_tokenizer_directory(Path({str(TINY)!r})).encode('x'));"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
