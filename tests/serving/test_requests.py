"""Whatever a body holds, it is understood or refused in one way; and models are found by their names."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalmagrove.serving.errors import RequestError
from kalmagrove.serving.fields import NOT_HERE, WITHOUT_MEANING
from kalmagrove.serving.models import ServedModels
from kalmagrove.serving.requests import chat_of, completion_of, parse_json

FIELDS = sorted(
    {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"}
)
FIELDS += sorted([*NOT_HERE, *WITHOUT_MEANING, "stream_options", "max_completion_tokens"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "x"]), "content": VALUES}), max_size=2)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), VALUES, max_size=6), VALUES, MESSAGES)
def test_any_body_is_understood_or_refused(body: dict[str, Any], prompt: Any, messages: Any) -> None:
    for parse, given_body in ((completion_of, body | {"prompt": prompt}), (chat_of, body | {"messages": messages})):
        read = parse_json(json.dumps(given_body, allow_nan=True).encode()) if _is_json(given_body) else given_body
        try:
            wanted, _ = parse(read, most_tokens=50, next_seed=lambda: 7)
        except RequestError as error:
            assert 400 <= error.status < 500 and json.loads(json.dumps(error.to_dict()).encode())["error"]["message"]
            continue
        assert 1 <= wanted.sampling.max_new_tokens <= 50
        assert 0 <= wanted.sampling.temperature <= 2 and 0 < wanted.sampling.top_p <= 1
        assert 0 <= wanted.sampling.seed < 2**63


def _is_json(body: Any) -> bool:
    """Infinity is none."""
    return "Infinity" not in json.dumps(body)


@pytest.mark.parametrize("value", [0, 0.0])
def test_a_field_that_asks_for_nothing_may_be_any_number_of_its_value(value: float) -> None:
    completion_of({"prompt": "a", "presence_penalty": value}, most_tokens=5, next_seed=lambda: 1)
    with pytest.raises(RequestError, match="does not offer presence_penalty"):
        completion_of({"prompt": "a", "presence_penalty": False}, most_tokens=5, next_seed=lambda: 1)


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (completion_of, {"prompt": ["a", "b"]}),
        (completion_of, {"prompt": "a", "stream": "yes"}),
        (completion_of, {"prompt": "a", "stream": True, "stream_options": {"include_usage": 3}}),
        (completion_of, {"prompt": "a", "stop": 3}),
        (chat_of, {"messages": [{"role": "nobody", "content": "a"}]}),
    ],
)
def test_a_wrong_request_takes_no_seed(parse: Any, body: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        parse(body, most_tokens=50, next_seed=lambda: pytest.fail("it took one"))


def test_what_is_left_out_has_the_apis_own_defaults() -> None:
    wanted, prompt = completion_of(
        {"prompt": "a", "user": "me", "n": 1, "logprobs": None}, most_tokens=50, next_seed=lambda: 7
    )
    sampling = wanted.sampling
    assert (prompt, wanted.model, wanted.stream) == ("a", None, False)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (16, 1.0, 1.0, 7)
    messages = [{"role": "user", "content": "a"}]
    assert chat_of({"messages": messages}, most_tokens=50, next_seed=lambda: 7)[0].sampling.max_new_tokens == 50
    assert (
        completion_of({"prompt": "a", "max_tokens": 99}, most_tokens=50, next_seed=lambda: 7)[0].sampling.max_new_tokens
        == 50
    )


def test_without_a_chat_template_a_conversation_is_refused() -> None:
    served = ServedModels("book", {}, None)
    with pytest.raises(RequestError, match=r"the tokeniser of book has no chat template; send the text to"):
        served.messages_prompt([{"role": "user", "content": "a"}])
