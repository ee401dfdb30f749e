"""The README.md of a trained model's folder: what it is, what it was trained on, how well it does, how to open it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kalmagrove.data.packing import PackedText
from kalmagrove.models.accounting import count_parameters
from kalmagrove.training.run import TrainingRun

SCORES = ("perplexity", "word_perplexity", "bits_per_byte")
OF_EXAMPLES = ("loss",)
"""Words and bytes mean nothing where a sequence holds more than text."""
_OPEN_TEXT = """```python
import kalmagrove  # lets the Auto classes know our models
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def model_card(run: TrainingRun, scores: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter of the Hub; whoever publishes the model adds what is left open.

    Args:
        run: Where it stands; its test split is not read.
        scores: By split, as ``result.json`` has them; empty for a checkpoint in the middle of a run.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kalmagrove", run.config.model.preset, run.config.optim.name],
    }
    if not isinstance(run.data, PackedText):
        front.pop("pipeline_tag")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.config.model.preset}",
        _facts(run),
        "## Scores",
        _scores(scores, SCORES if isinstance(run.data, PackedText) else OF_EXAMPLES),
        "## Open it",
        _OPEN_TEXT if isinstance(run.data, PackedText) else _open_examples(run),
        "## Before you publish it",
        "Say here what it is for and what it must not be used for, the licence of its text, and whom the text leaves "
        "out. A model of this size repeats its text and makes things up.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(run: TrainingRun) -> str:
    parameters, loop = count_parameters(run.model), run.config.loop
    source = run.data.source or "the standard library of the running Python (built-in corpus)"
    # Where it lay on this machine is nobody's business.
    source = Path(source).name if Path(source).exists() else source
    facts = {
        "Parameters": f"{parameters.total:,}, of which {parameters.non_embedding:,} are not embeddings",
        "Trained on": f"{source} (fingerprint {run.data.fingerprint})",
        "Training": f"{run.step * loop.tokens_per_step:,} tokens in {run.step:,} steps, seed {loop.seed}",
        "Precision": run.precision,
        "Optimiser": f"{run.config.optim.name}, learning rate {run.config.optim.peak_rates()['lr']:.3g}",
        "Context": f"{loop.context_length} tokens",
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def _scores(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    if not scores:
        return "A checkpoint from the middle of a run; it was not scored."
    lines = [f"| split | {' | '.join(name.replace('_', ' ') for name in names)} |", "| :-- |" + " --: |" * len(names)]
    for split, found in scores.items():
        lines.append(f"| {split} | {' | '.join(_shown(found.get(name)) for name in names)} |")
    return "\n".join(lines)


def _shown(score: float | None) -> str:
    if score is None or not math.isfinite(score):
        return "too large"
    return f"{score:,.0f}" if score >= 1000 else f"{score:.4g}"


def _open_examples(run: TrainingRun) -> str:
    modality = run.config.data.modality
    return f"    kalmagrove predict path/to/the/run --data NEW\n\nIt was trained with `--modality {modality}`."
