"""From the name of a model to a directory on this machine.

A directory is taken as it is. Anything else is a name on the Hugging Face hub: looked up in its
cache, and fetched by ``huggingface_hub`` (imported at that moment) unless that is offline.
"""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from frontend.tokenizer_config import read_any_json
from ipc.errors import ConfigError

logger = logging.getLogger(__name__)

_CONFIG_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "tokenizer*")
_WEIGHT_PATTERNS = {
    "safetensors": ("*.safetensors",),
    "pt": ("*.bin", "*.pt"),
    "npcache": ("*.bin",),
    "dummy": (),
}
# Large, and no library looks for code in them; every other *.json may name some.
_FILES_WITHOUT_CODE = ("tokenizer.json", "vocab.json", "added_tokens.json")
_INDEX_SUFFIX = ".index.json"


def bundled_model() -> Path:
    """The demonstration model of the repository, which our own commands serve by default.

    Raises:
        ConfigError: this installation came without it.
    """
    path = Path(__file__).resolve().parent.parent / "scripts" / "demo_models" / "tiny"
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"--model was not given, and the demonstration model is not at {path}: it comes with "
            f"the repository, not with the installed package. Name a model"
        )
    return path


def choose_model(args: argparse.Namespace) -> None:
    """Settle ``args.model``: the flag, else the positional, else the demonstration model.

    Raises:
        ConfigError: two models, or none and no demonstration model.
    """
    tag = getattr(args, "model_tag", None)
    if tag is not None and args.model not in (None, tag):
        raise ConfigError(f"--model {args.model!r} and MODEL {tag!r} differ")
    args.model = args.model or tag
    if args.model is None:
        args.model = str(bundled_model())
        args.served_model_name = args.served_model_name or ["tiny", args.model]


def find_directory(
    name: str,
    *,
    flag: str = "--model",
    revision: str | None = None,
    download_dir: str | None = None,
    load_format: str | None = None,
) -> Path:
    """The directory that holds a model or a tokenizer.

    Args:
        name: a directory, or a name on the hub.
        flag: what to call it in errors.
        revision: branch, tag or commit on the hub; a directory has none.
        load_format: which weights to fetch as well; None: none.

    Raises:
        ConfigError: it is neither here nor to be had; the message says what was looked for.
    """
    if not name or "\0" in name:
        raise ConfigError(f"{flag} must name a directory or a model of the hub, got {name!r}")
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, no error for names too long or forbidden
        return path.resolve()
    if os.path.exists(path):
        raise ConfigError(f"{flag} {name}: must be a directory, not a file")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{flag} {name}: there is no such directory")
    return _from_hub(name, flag, revision, download_dir, load_format)


def check_custom_code(directory: Path, *, trust_remote_code: bool) -> None:
    """Refuse a checkpoint that brings its own code, whichever of its settings files says so.

    All are looked at, nested settings too: which file a library reads for what changes over time.

    Raises:
        ConfigError: it does, and ``--trust-remote-code`` was not given.
    """
    if trust_remote_code:
        return
    for path in sorted(directory.glob("*.json")):
        if path.name in _FILES_WITHOUT_CODE or path.name.endswith(_INDEX_SUFFIX):
            continue
        try:
            settings = read_any_json(path)
        except ConfigError:
            continue  # not JSON for anybody; files that are needed are read, and refused, elsewhere
        if _names_code(settings):
            raise ConfigError(
                f"{path} asks for code of its own (auto_map); pass "
                f"--trust-remote-code if you trust its authors"
            )


def _names_code(settings: Any) -> bool:
    """Whether ``auto_map`` stands anywhere in parsed JSON. No recursion: files may be hostile."""
    unseen = [settings]
    while unseen:
        value = unseen.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                return True
            unseen.extend(value.values())
        elif isinstance(value, list):
            unseen.extend(value)
    return False


def check_weights(directory: Path, load_format: str) -> None:
    """Refuse a directory without weights of the wanted form.

    Raises:
        ConfigError: there are none; names ``--load-format``.
    """
    forms = ("safetensors", "pt") if load_format == "auto" else (load_format,)
    patterns = [pattern for form in forms for pattern in _WEIGHT_PATTERNS[form]]
    if patterns and not any(any(directory.glob(pattern)) for pattern in patterns):
        raise ConfigError(
            f"--load-format {load_format}: {directory} holds no {' or '.join(patterns)}; "
            f"--load-format dummy runs with random weights"
        )


def _from_hub(
    name: str, flag: str, revision: str | None, download_dir: str | None, load_format: str | None
) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
        constants = importlib.import_module("huggingface_hub.constants")
    except ImportError as err:
        raise ConfigError(
            f"{flag} {name}: no such directory, and huggingface_hub, which would look for it on "
            f"the hub, is not installed"
        ) from err

    def look(patterns: tuple[str, ...], *, is_offline: bool) -> Path:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=[*_CONFIG_PATTERNS, *patterns],
                local_files_only=is_offline,
            )
        )

    def fetch(patterns: tuple[str, ...]) -> Path:
        try:
            return look(patterns, is_offline=constants.HF_HUB_OFFLINE)
        except _network_errors() as err:
            logger.warning(
                "%s %s: the hub cannot be reached (%s): looking in the cache", flag, name, err
            )
            return look(patterns, is_offline=True)

    try:
        if load_format != "auto":
            return fetch(_WEIGHT_PATTERNS.get(load_format or "", ()))
        directory = fetch(_WEIGHT_PATTERNS["safetensors"])
        if not any(directory.glob("*.safetensors")):
            directory = fetch(_WEIGHT_PATTERNS["pt"])
        return directory
    except (OSError, ValueError) as err:  # the hub's other errors are one of these
        where = download_dir or constants.HF_HUB_CACHE
        at = f" at revision {revision}" if revision else ""
        offline = "; the hub is off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
        reason = str(err).strip().splitlines() or [type(err).__name__]
        raise ConfigError(
            f"{flag} {name}: no directory of this name in {os.getcwd()}, and no model{at} "
            f"in the cache {where}{offline}: {reason[0]}"
        ) from err


def _network_errors() -> tuple[type[Exception], ...]:
    """What is raised when the hub cannot be reached; httpx, if it is used, has its own kind."""
    httpx = sys.modules.get("httpx")
    ours = (ConnectionError, TimeoutError)
    return ours if httpx is None else (*ours, httpx.TransportError)
