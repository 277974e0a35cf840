"""Small tokenizers of each family, built in memory or written as a directory."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from frontend.tokenizer import FastTokenizer
from frontend.tokenizer_config import TokenizerConfig

TINY = Path(__file__).resolve().parents[2] / "scripts" / "demo_models" / "tiny"
WORDS = ["▁", "▁a", "▁the", "he", "llo", "é", "▁wörld", ".", "▁.", ",", "▁n't", "'", "🙂", "▁▁"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_style(decoder: Any = None) -> Tokenizer:
    """As Llama 2: byte fallback, a mark for spaces, one space cut from the start."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghilnorstwé▁", *WORDS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [("▁", "a"), ("h", "e")]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return backend


def word_pieces(decoder: Any = None) -> Tokenizer:
    """As BERT: ``##`` marks continuations."""
    tokens = [
        "[UNK]",
        "[SEP]",
        "play",
        "##ing",
        "##s",
        "the",
        ".",
        "!",
        "n",
        "##'",
        "t",
        "do",
        "not",
    ]
    backend = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoder or decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return backend


def fast(backend: Tokenizer, **settings: Any) -> FastTokenizer:
    """A tokenizer without files."""
    return FastTokenizer(backend, TokenizerConfig(**settings))


def write_directory(directory: Path, backend: Tokenizer, **settings: Any) -> Path:
    """A tokenizer's files, as a checkpoint holds them."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
