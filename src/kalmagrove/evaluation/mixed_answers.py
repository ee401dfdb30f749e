"""What a model that reads texts, images and rows answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kalmagrove.data.mixed.codec import MixedCodec, open_mixed
from kalmagrove.data.mixed.reading import MixedRow, Piece, iter_mixed
from kalmagrove.data.part_sequences import sequences_of_parts
from kalmagrove.data.tokenizer import end_of_text_id
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.evaluation.modality_model import ModalityModel, Predictions
from kalmagrove.modalities.modality import Modality
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import autocast


def predict_answers(opened: ModalityModel, data: str, *, max_new_tokens: int) -> Predictions:
    """The likeliest text after what each line of a file gives.

    Of a line whose parts say ``learn`` it is what follows the parts before the first of those, and that is the answer
    that is looked for where it is a text; other lines are gone on with.

    Args:
        opened: The model.
        data: A JSONL as for training.
        max_new_tokens: Most tokens of an answer.

    Raises:
        KalmaGroveError: A line cannot be used.
        UsageError: A line begins with its answer, or is too long for the model.
    """
    codec = open_mixed(opened.schema, opened.tokenizer)
    rows, known, right, cut = [], 0, 0, 0
    with torch.inference_mode(), composed_weights(opened.model), autocast(opened.precision, opened.model.device):
        for row in iter_mixed(Path(data).expanduser()):
            given, wanted = divide_line(row)
            answer, is_whole = _answer(opened.model, codec, row, given, max_new_tokens)
            rows.append({"place": row.place, "answer": answer} | ({} if wanted is None else {"wanted": wanted}))
            known += wanted is not None
            right += wanted is not None and answer.strip() == wanted.strip()
            cut += not is_whole
    if not rows:
        raise KalmaGroveError(f"{data} has no lines; give some to answer")
    scores = {"accuracy": right / known, "rows": known} if known else {}
    notes = [f"{cut:,} answers were cut, at {max_new_tokens} tokens or where the model's context ends"] if cut else []
    return Predictions(rows, scores, notes)


def divide_line(row: MixedRow) -> tuple[tuple[Piece, ...], str | None]:
    """What is given, and the answer where a line has one."""
    learnt = [place for place, piece in enumerate(row.pieces) if piece.is_learnt]
    if not learnt or len(learnt) == len(row.pieces):
        return row.pieces, None
    first = learnt[0]
    if first == 0:
        raise UsageError(f"{row.place} begins with its answer; put what is asked before it")
    answer = row.pieces[first]
    return row.pieces[:first], answer.text if answer.kind == "text" and len(row.pieces) == first + 1 else None


def _answer(
    model: KalmaGroveForCausalLM, codec: MixedCodec, row: MixedRow, given: Sequence[Piece], most: int
) -> tuple[str, bool]:
    """The text, and whether it came to its end."""
    modalities = {name: m for name, m in model.model.modalities.items() if isinstance(m, Modality)}
    end = end_of_text_id(codec.tokenizer)
    prompt = sequences_of_parts(
        [codec.parts(row, given)],
        end_token=end,
        placeholders={name: modality.placeholder for name, modality in modalities.items()},
        sizes={name: modality.feature_size for name, modality in modalities.items()},
    ).to(model.device)
    room = model.config.max_position_embeddings - prompt.tokens.shape[1]
    if room < 1:
        raise UsageError(f"{row.place} has {prompt.tokens.shape[1]} tokens, as many as the model's context or more")
    axes = prompt.axes if "patch" in modalities else None
    cache, most = model.new_cache(), min(most, room)
    tokens: list[int] = []
    hidden = model.model(prompt.tokens, features=prompt.features, axes=axes, cache=cache).last_hidden_state
    while True:
        token = int(model.precise_logits(hidden[0, -1]).argmax())
        # Whatever is no text ends the answer too.
        is_whole = token == end or any(token == modality.placeholder for modality in modalities.values())
        if is_whole or len(tokens) == most:
            break
        tokens.append(token)
        hidden = model.model(torch.tensor([[token]], device=model.device), cache=cache).last_hidden_state
    text: str = codec.tokenizer.decode(tokens)
    return text, is_whole
