"""Every command of one word, in the order of the help text; light, so that help is quick."""

from __future__ import annotations

COMMANDS = {
    "compare": "train a Transformer and a KalmaGrove on the same text and report which is better",
    "train": "one training run",
    "adapt": "a small adaptor for a domain over a frozen model",
    "eval": "perplexity and bits per byte of a model on a text",
    "watch": "follow a run that another process trains",
    "generate": "text from a prompt",
    "predict": "a column of a table, its missing cells, or the labels of images",
    "draw": "new images by a model of images",
    "serve": "a model over HTTP, in the style of OpenAI's API",
    "info": "parameters, FLOPs and memory of a model before it is trained",
    "compress": "a dense model with fewer parameters: factors over shared bases",
    "export": "a model as a plain dense folder, for other tools",
    "data": "tokenise and pack a text (data prepare)",
    "scale": "scaling laws: train a ladder, fit it, plan a budget (scale sweep, fit, plan)",
    "reproduce": "the paper's table and claims, trained again and answered",
    "report": "pages written again without training: of a comparison, of claims, of a ladder",
    "completion": "a script by which your shell completes commands and flags",
}
"""What each is for."""
