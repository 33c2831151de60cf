"""`serve DIR...`"""

import argparse
import contextlib
import logging
import os
import sys

from megatron_embed.cli.common import path, positive_int
from megatron_embed.errors import ConfigError
from megatron_embed.platform import stop_signal as stop

logger = logging.getLogger(__name__)

HELP = "Answer requests for vectors and scores over HTTP, as OpenAI, Cohere, Jina and TEI do"
EXAMPLES = ("megatron-embed serve runs/embedder/best runs/reranker/best --port 8000",
            "megatron-embed serve exported --engine onnx --host 0.0.0.0 --api-key-file keys.txt")
PAGE = "docs/serve.md"
KEY_VARIABLE = "MEGATRON_EMBED_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="DIR", type=path,
                        help="Model directories or checkpoints: embedding models, rerankers, or both")
    parser.add_argument("--corpus", metavar="FILE|FOLDER", type=path,
                        help='Texts that the page searches at first: rows {"text": ...}, or a folder of .txt and .md '
                             "files (default: an example)")
    parser.add_argument("--engine", choices=("torch", "onnx", "openvino"), default="torch",
                        help="What computes: this package's model, or the graph in the directory (default: torch)")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at (default: 127.0.0.1, this machine "
                                                            "alone; 0.0.0.0: every address of it)")
    parser.add_argument("--port", type=port, default=8000, help="Port to listen at; 0: any free one (default: 8000)")
    parser.add_argument("--api-key-file", metavar="FILE", type=path,
                        help=f"Accepted API keys, one per line (default: the one in {KEY_VARIABLE}, else none)")
    parser.add_argument("--api-key", type=no_key, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"),
                        help="Computation dtype of --engine torch (default: the model's own setting, else float32)")
    parser.add_argument("--max-length", type=positive_int, metavar="TOKENS",
                        help="Maximum number of tokens per text or pair (default: the model's own setting)")
    parser.add_argument("--max-texts", type=positive_int, default=2048, metavar="N",
                        help="Texts of one request; more are answered 413 (default: 2048)")
    parser.add_argument("--max-mib", type=positive_int, default=32, metavar="MIB",
                        help="Size of one request's body; a larger one is answered 413 (default: 32)")
    parser.add_argument("--max-waiting-texts", type=positive_int, default=16384, metavar="N",
                        help="Texts accepted and not yet answered; a request beyond them is answered 429 (default: "
                             "16384)")
    parser.add_argument("--timeout", type=positive_int, default=300, metavar="SECONDS",
                        help="Time for a request to be computed; then it is answered 504 (default: 300)")
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, metavar="TOKENS",
                        help="Largest number of tokens computed at once (default: 8192)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, which end in 0 once what was accepted is answered."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.stopping_by(lambda: os._exit(0)))  # nothing is accepted before the models are open
        from megatron_embed.export.engines.base import require

        for package in PACKAGES:
            require(package, "serve", "serve")
        keys = api_keys(args.api_key_file)
        from megatron_embed.serving.page_corpus import read_page_corpus

        corpus = None if args.corpus is None else read_page_corpus(args.corpus)
        from megatron_embed.serving.app import create_app
        from megatron_embed.serving.guard import ServerState
        from megatron_embed.serving.models import Limits
        from megatron_embed.serving.opening import Opening, open_models
        from megatron_embed.serving.server import Stopper, bind, serve

        limits = Limits(max_texts=args.max_texts, max_bytes=args.max_mib << 20, timeout_seconds=args.timeout,
                        max_waiting_texts=args.max_waiting_texts, batch_tokens=args.batch_tokens)
        opening = Opening(engine=args.engine, dtype=args.dtype, max_length=args.max_length)
        bound = stack.enter_context(bind(args.host, args.port))
        models = open_models(args.models, opening, limits)
        local = bound.getsockname()[0] in ("127.0.0.1", "::1")
        if not local and not keys:
            logger.warning("--host %s: other machines can reach this server, and it asks for no API key; set %s or "
                           "--api-key-file", args.host, KEY_VARIABLE)
        state = ServerState()
        # A page of another host that a browser opens could otherwise be given this server's address.
        hosts = (*LOOPBACK, args.host.lower()) if local and not keys else ()
        app = create_app(models, api_keys=keys, hosts=hosts, state=state, corpus=corpus)
        stopper = Stopper(models, state)
        with stop.stopping_by(stopper.ask):
            ended = serve(app, models, bound, state, stopper)
    if not ended:  # a batch is under way, which nobody waits for
        sys.stderr.flush()
        os._exit(0)
    return 0


def api_keys(file: str | None) -> tuple[str, ...]:
    """The keys that requests may have: of the file, else of the environment, else none.

    Raises ConfigError if the file cannot be read or holds none.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        with open(file, encoding="utf-8") as lines:
            keys = tuple(key for line in lines if (key := line.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: cannot be read ({error}); give a text file with a key per line",
                          key="--api-key-file") from None
    if not keys:
        raise ConfigError(f"--api-key-file {file}: holds no key; write one on a line", key="--api-key-file")
    return keys


def no_key(text: str) -> str:
    raise argparse.ArgumentTypeError("other users of the machine see a command's arguments; write the key to a file "
                                     f"for --api-key-file, or into {KEY_VARIABLE}")


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)
