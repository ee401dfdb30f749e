"""Any model folder through lm-eval (EleutherAI's evaluation harness), offline, on tasks of local files."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from kalmagrove.adaptors.opening import open_with_adaptor
from kalmagrove.errors import KalmaGroveError, UsageError, first_line
from kalmagrove.evaluation.tasks import TASKS, find_rows, read_rows, write_task_folder
from kalmagrove.models.convert import context_of, model_folder
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import choose_device, choose_precision

ROWS_AT_ONCE = 16


def run_tasks(
    model: str,
    tasks: Sequence[str],
    data: Path,
    *,
    limit: int | None = None,
    context_length: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    adaptor: str | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of a model on tasks, by lm-eval's own code.

    Args:
        model: A run folder, a model folder or a Hub name.
        tasks: Names of :data:`~kalmagrove.evaluation.tasks.TASKS`.
        data: A folder with the questions of each task.
        limit: Only the first so many questions of each task.
        context_length: Longest prompt in tokens; what is longer is cut from the left. None is the model's.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, bf16 or fp32; the softmax is float32.
        adaptor: The name of one of the model's adaptors, or its folder; None is the model alone.

    Returns:
        By task: "rows", and as lm-eval defines them "acc", "acc_norm" and "perplexity", where the task has them; of
        accuracies also the standard error, "acc_stderr". "cut" counts the requests whose prompt was cut.

    Raises:
        UsageError: An option does not fit, or a task has no file.
        KalmaGroveError: The model or a file of questions cannot be read, or does not fit the other.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    rows = {name: read_rows(name, find_rows(name, data), limit=limit) for name in tasks}
    chosen_device = choose_device(device)
    is_short = choose_precision(precision, chosen_device) == "bf16"
    loaded = open_with_adaptor(model, adaptor).to(chosen_device)
    longest = context_of(loaded.config)
    length = longest if context_length is None else context_length
    if not 1 < length <= longest:
        raise UsageError(f"--context_length must be between 2 and {longest}, the model's context; got {length}")
    with tempfile.TemporaryDirectory() as folder, _quiet(), composed_weights(loaded):
        write_task_folder(rows, Path(folder))
        scorer = _Scorer(
            pretrained=loaded,
            tokenizer=_tokenizer(model_folder(model)),
            max_length=length,
            batch_size=ROWS_AT_ONCE,
            mixed_precision_dtype="bfloat16" if is_short else None,
            softmax_dtype="float32",
        )
        known = TaskManager(include_path=folder, include_defaults=False)
        # Without bootstraps: of a perplexity they start a process for each core, and of a mean none is needed.
        found = evaluate(scorer, known.load(list(tasks)), bootstrap_iters=0, log_samples=False)
    return {name: _scores(found["results"][name], name, len(rows[name]), scorer.cut[name]) for name in tasks}


def _scores(found: dict[str, Any], name: str, rows: int, cut: int) -> dict[str, float]:
    scores: dict[str, float] = {"rows": rows, "cut": cut}
    for metric in (metric["metric"] for metric in TASKS[name].metrics):
        value = scores[metric] = float(found[f"{metric},none"])
        if metric.startswith("acc") and rows > 1:
            # The sample's standard deviation over the root of its size, which is lm-eval's.
            scores[f"{metric}_stderr"] = math.sqrt(value * (1 - value) / (rows - 1))
    return scores


class _Scorer(HFLM):
    """lm-eval's model of transformers, which says of a request that does not fit what is wrong with it.

    Attributes:
        cut: By task, requests whose prompt did not fit and lost its beginning.
    """

    def __init__(self, **options: Any) -> None:
        self.cut: dict[str, int] = dict.fromkeys(TASKS, 0)
        super().__init__(**options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        self._tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        for task, ((_, text), context, continuation) in zip(self._tasks, requests, strict=True):
            if not 0 < len(continuation) <= self.max_length:
                raise KalmaGroveError(
                    f"{task}: the answer {text[:60]!r} has {len(continuation)} tokens; between 1 and "
                    f"{self.max_length}, the context, can be scored"
                )
            if max(*context, *continuation) >= self.config.vocab_size:
                raise KalmaGroveError("the tokeniser has tokens that its model does not know")
            self.cut[task] += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # What is wrong with the files reaches the library's own code, which has no common error for it.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(f"cannot read a tokeniser from {folder}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the library are told, and its bars are drawn on a terminal alone."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if sys.stderr.isatty() else redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(before)
