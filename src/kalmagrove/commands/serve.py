"""``kalmagrove serve``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from kalmagrove.commands.parsing import make_parser, parse, say
from kalmagrove.serving.options import ServeLimits
from kalmagrove.training.extras import require_extra

EXAMPLES = """\
  kalmagrove serve runs/book
  kalmagrove serve runs/book --name book --port 8080 --max_tokens 256
  kalmagrove serve path/to/a/hugging-face-folder --adaptors none

Then, for example:
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "Once upon a time", "max_tokens": 50}'"""


def make_serve_parser() -> ArgumentParser:
    """The flags of ``kalmagrove serve``."""
    parser = make_parser("serve", "A model over HTTP, in the style of OpenAI's API.", EXAMPLES, configurable=False)
    parser.add_argument("model", type=str, help="a run folder, a model folder or a Hub name")
    parser.add_argument("--port", type=int, default=8000, help="to listen at; 0 is any free one")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="0.0.0.0 lets other machines in: without a password"
    )
    parser.add_argument(
        "--name", type=str, default=None, help="of the model in requests; left out: MODEL as it is given"
    )
    parser.add_argument(
        "--adaptors",
        type=str,
        default="all",
        help="all of the model's, each as a model of its own, NAME:ADAPTOR; none; or names with commas between them",
    )
    parser.add_argument("--max_tokens", type=int, default=ServeLimits.max_tokens, help="most of an answer")
    parser.add_argument(
        "--concurrency", type=int, default=ServeLimits.concurrency, help="answers that are generated at once, in turns"
    )
    parser.add_argument("--queue", type=int, default=ServeLimits.queue, help="requests that may wait; others get a 429")
    parser.add_argument("--max_body", type=int, default=ServeLimits.max_body, help="bytes of a request")
    parser.add_argument(
        "--grace", type=float, default=ServeLimits.grace, help="seconds for running answers after Ctrl-C or SIGTERM"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first request that has none, then one more each")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


def run(words: Sequence[str]) -> None:
    """Serves until it is stopped."""
    options = parse(make_serve_parser(), words)
    limits = ServeLimits(options.max_tokens, options.concurrency, options.queue, options.max_body, options.grace)
    for module in ("starlette", "uvicorn"):
        require_extra(module, "serve", "serve")
    from kalmagrove.serving.server import serve

    serve(
        options.model,
        host=options.host,
        port=options.port,
        name=options.name,
        adaptors=options.adaptors,
        limits=limits,
        seed=options.seed,
        device=options.device,
        say=say,
    )
