"""The command line of the server: its own flags, and from them its options.

Everything that can be refused without an engine is refused here, before one is started.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from frontend.chat_template import load_template
from frontend.engine_args import AsyncEngineArgs
from frontend.openai.api_server import CorsOptions
from frontend.openai.connections import DEFAULT_MAX_CONNECTIONS
from frontend.openai.server import ListenOptions
from frontend.openai.state import ServerOptions
from frontend.openai.user_middleware import load_middleware
from ipc.errors import ConfigError
from ipc.processes import KEY_VARIABLE

logger = logging.getLogger(__name__)

MIN_KEY_WEIGHT, MAX_KEY_WEIGHT = 0.001, 1000.0
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "trace")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the HTTP server."""
    _add_process_flags(parser)
    _add_key_flags(parser)
    _add_limit_flags(parser)
    _add_answer_flags(parser)
    _add_cors_flags(parser)
    _add_ssl_flags(parser)


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", help="address to listen on; unset: all")
    add(
        "--port",
        type=int,
        default=8000,
        help="port to listen on, taken before the model loads; default %(default)s",
    )
    add("--uds", metavar="PATH", help="listen on a Unix socket instead of a port")
    add("--root-path", default="", help="path prefix behind a proxy")
    add(
        "--middleware",
        action="append",
        default=[],
        metavar="MODULE.NAME",
        help="ASGI middleware class, or HTTP middleware coroutine function; repeatable",
    )
    add(
        "--uvicorn-log-level",
        choices=LOG_LEVELS,
        default="info",
        help="least severe log lines that are written; default %(default)s",
    )
    add("--disable-access-log", action="store_true", help="write no line per HTTP request")
    add(
        "--attach",
        metavar="ADDRESS",
        help="use the engine that runs at this ipc:// or tcp:// address (python -m engine_core) "
        "instead of starting one; the engine flags are then its own",
    )
    add("--attach-keys", metavar="DIR", help="directory of heliograph keys, for a tcp:// engine")
    add(
        "--api-server-count",
        type=int,
        default=1,
        metavar="N",
        help="processes that answer HTTP on the port, all for one engine; default %(default)s",
    )
    # What an API process among several is told by the one that started it.
    add("--death-fd", type=int, help=argparse.SUPPRESS)
    add("--arguments-fd", type=int, help=argparse.SUPPRESS)
    add("--shared-metrics", type=Path, metavar="DIR", help=argparse.SUPPRESS)


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add(
        "--api-key-weights",
        nargs="+",
        type=float,
        metavar="WEIGHT",
        help="share of the engine that the requests of each --api-key get while others wait, in "
        "the order of the keys; unset: all the same",
    )
    add(
        "--max-request-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long a request may take; clients ask for less with the header "
        "X-Request-Timeout; unset: no limit",
    )
    add(
        "--max-connections",
        type=int,
        default=DEFAULT_MAX_CONNECTIONS,
        metavar="N",
        help="connections held open by each API process; beyond, those that wait for a request "
        "are closed, oldest first; default %(default)s",
    )
    add(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long open requests may go on after a signal to stop; default %(default)s",
    )


def _add_key_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("who may ask").add_argument
    add(
        "--api-key",
        action="append",
        metavar="KEY",
        help="key that requests must bear; may be given several times; the environment variable "
        f"{KEY_VARIABLE} gives one too",
    )
    add(
        "--api-key-file",
        action="append",
        metavar="FILE",
        help="file with one key per line, which process listings do not show; # starts a comment; "
        "may be given several times",
    )
    add(
        "--share-cached-prefixes",
        action="store_true",
        help="let requests of one API key use prefixes that those of another left in the cache; "
        "without, response times tell nobody what others asked",
    )


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests and answers").add_argument
    add("--strict-fields", action="store_true", help="refuse unknown request fields")
    add("--chat-template", metavar="TEMPLATE", help="Jinja file, or the template itself")
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="let requests bring chat templates; each renders in a process of its own",
    )
    add(
        "--response-role",
        default="assistant",
        help="role of generated messages; default %(default)s",
    )
    add(
        "--generation-config",
        choices=("auto", "vllm"),
        default="auto",
        help="where absent sampling fields of chats come from: the checkpoint's "
        "generation_config.json, or the API's defaults alone",
    )
    add("--lora-modules", nargs="+", metavar="NAME=PATH", help="adapters (not in this version)")


def _add_cors_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("other origins").add_argument
    add("--allow-credentials", action="store_true", help="CORS: allow credentials")
    for name in ("origins", "methods", "headers"):
        add(
            f"--allowed-{name}",
            type=_json_strings,
            default=("*",),
            metavar="JSON",
            help=f"CORS: allowed {name}, a JSON list",
        )


def _add_ssl_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("TLS").add_argument
    add("--ssl-keyfile", metavar="FILE", help="private key")
    add("--ssl-certfile", metavar="FILE", help="certificate")
    add("--ssl-ca-certs", metavar="FILE", help="authorities that client certificates come from")
    add(
        "--ssl-cert-reqs",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="client certificates: 0 none, 1 optional, 2 required",
    )


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the whole server: engine flags and server flags."""
    parser = argparse.ArgumentParser(prog=prog, description="Serve a model over HTTP.")
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    add_server_flags(parser)
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None)
    return parser


def server_options(args: argparse.Namespace, environment: Mapping[str, str]) -> ServerOptions:
    """How the server answers.

    Raises:
        ConfigError: a chat template or a file of keys that cannot be used, or a feature this
            version lacks.
    """
    if args.lora_modules:
        raise ConfigError("--lora-modules: LoRA adapters are not supported by this version")
    root_path = args.root_path or ""
    if root_path and not root_path.startswith("/"):
        raise ConfigError(f"--root-path must begin with a slash, got {root_path!r}")
    keys = [*(args.api_key or ()), *_keys_of_files(args), environment.get(KEY_VARIABLE, "")]
    api_keys = tuple(dict.fromkeys(key for key in keys if key))
    weights = tuple(args.api_key_weights or ())
    if weights:
        check_weights(weights, len(api_keys))
    if args.max_request_timeout == 0:
        raise ConfigError("--max-request-timeout must be above 0; leave it away for no limit")
    template = args.chat_template
    return ServerOptions(
        response_role=args.response_role,
        chat_template=None if template is None else load_template(template),
        trust_request_chat_template=args.trust_request_chat_template,
        generation_config=args.generation_config,
        strict_fields=args.strict_fields,
        api_keys=api_keys,
        api_key_weights=weights,
        max_request_timeout=args.max_request_timeout,
        share_cached_prefixes=args.share_cached_prefixes,
        root_path=root_path.rstrip("/"),
    )


def check_weights(weights: Sequence[float], num_keys: int) -> None:
    """Refuse weights that do not belong to the keys.

    Raises:
        ConfigError: too many or too few, or out of range.
    """
    if len(weights) != num_keys:
        raise ConfigError(
            f"--api-key-weights needs one weight for each key: {num_keys} keys (VLLM_API_KEY is "
            f"one, the last), got {len(weights)} weights"
        )
    for weight in weights:
        if not MIN_KEY_WEIGHT <= weight <= MAX_KEY_WEIGHT:
            raise ConfigError(
                f"--api-key-weights must be between {MIN_KEY_WEIGHT} and {MAX_KEY_WEIGHT:.0f}, "
                f"got {weight}"
            )


def listen_options(args: argparse.Namespace) -> ListenOptions:
    """Where and how the server listens.

    Raises:
        ConfigError: a port that is none, or a middleware that cannot be imported.
    """
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {args.port}")
    if args.max_connections < 1:
        raise ConfigError(f"--max-connections must be at least 1, got {args.max_connections}")
    if args.api_server_count < 1:
        raise ConfigError(f"--api-server-count must be at least 1, got {args.api_server_count}")
    if args.api_server_count > 1 and args.uds is not None:
        raise ConfigError(
            "--api-server-count above 1 needs a port: a --uds socket has one listener"
        )
    cors = CorsOptions(
        args.allow_credentials, args.allowed_origins, args.allowed_methods, args.allowed_headers
    )
    return ListenOptions(
        host=args.host,
        port=args.port,
        shares_port=args.death_fd is not None,
        uds=args.uds,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        uvicorn_log_level=args.uvicorn_log_level,
        access_log=not args.disable_access_log,
        shutdown_timeout=args.shutdown_timeout,
        max_connections=args.max_connections,
        cors=cors,
        middleware=tuple(load_middleware(path) for path in args.middleware),
    )


def _keys_of_files(args: argparse.Namespace) -> list[str]:
    """The keys in the files that ``--api-key-file`` names.

    Raises:
        ConfigError: a file cannot be read, or holds no key.
    """
    keys: list[str] = []
    for name in args.api_key_file or ():
        path = Path(name)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            is_private = not path.stat().st_mode & 0o077
        except (OSError, ValueError) as err:
            raise ConfigError(f"--api-key-file {name}: cannot be read: {err}") from err
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {name}: holds no key")
        if not is_private:
            logger.warning("--api-key-file %s: others can read it; run chmod 600 on it", name)
        keys += found
    return keys


def _json_strings(text: str) -> tuple[str, ...]:
    try:
        values = json.loads(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r}") from err
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise argparse.ArgumentTypeError(f"not a JSON list of strings: {text!r}")
    return tuple(values)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from err
    if not 0.0 <= seconds <= 86400.0:
        raise argparse.ArgumentTypeError(f"not between 0 and 86400: {text!r}")
    return seconds
