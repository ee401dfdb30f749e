"""A real server and a real client: answers, streams, adaptors, limits, and how it stops."""

import http.client
import json
import signal
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from serving_client import GREEDY, SECONDS, Server, events_of, hang_up

from kalmagrove.cli import main
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.evaluation.generation import generate_text

LONG = {"max_tokens": 5000}


def text_of(folder: Path, count: int, adaptor: str | None = None, prompt: str = "The river", **options: Any) -> str:
    """What ``kalmagrove generate`` writes."""
    chosen = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0} | options
    return "".join(generate_text(str(folder), prompt, max_new_tokens=count, device="cpu", adaptor=adaptor, **chosen))


def test_models_are_the_base_and_its_adaptors(server: Server) -> None:
    status, answer = server.ask("/v1/models")
    assert status == 200 and answer["object"] == "list"
    names = ["book", "book:legal", "book:medical", "book:overflowing"]
    assert [model["id"] for model in answer["data"]] == names
    assert server.ask("/v1/models/book:legal") == (200, answer["data"][1])
    status, answer = server.ask("/v1/models/other")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert server.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"seed": 3}, {"seed": 4, "temperature": 0.7, "top_p": 0.9}, {"seed": 5, "top_k": 4}],
    ids=["greedy", "drawn", "cut", "few"],
)
def test_an_answer_is_what_generate_writes_streamed_or_not(
    options: dict[str, Any], server: Server, folder: Path
) -> None:
    expected = text_of(folder, 30, **({"temperature": 1.0} | options))
    body = {"model": "book", "prompt": "The river", "max_tokens": 30, **options}
    status, answer = server.ask("/v1/completions", body)
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "book"
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    response = server.send("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status == 200 and response.getheader("content-type", "").startswith("text/event-stream")
    *pieces, counts, end = events_of(response)
    assert end == "[DONE]" and counts["usage"] == answer["usage"] and counts["choices"] == []
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == expected and len(choices) > 5
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == answer["choices"][0]["finish_reason"] == "length"
    assert {piece["id"] for piece in [*pieces, counts]} == {pieces[0]["id"]} != {answer["id"]}


def test_requests_without_a_seed_differ(server: Server) -> None:
    assert server.complete(temperature=1, max_tokens=20) != server.complete(temperature=1, max_tokens=20)


def test_a_stop_string_ends_the_answer(server: Server) -> None:
    whole = server.complete(max_tokens=40)
    stop = whole[12:15]
    _, answer = server.ask("/v1/completions", GREEDY | {"max_tokens": 40, "stop": ["\x00no", stop]})
    choice = answer["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    streamed = events_of(server.send("/v1/completions", GREEDY | {"max_tokens": 40, "stop": stop, "stream": True}))
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == choice["text"]


def test_tokens_are_a_prompt_too(server: Server, folder: Path) -> None:
    ids = load_tokenizer(str(folder)).encode("The river").ids
    for prompt in (ids, [ids], ["The river"]):
        assert server.complete(prompt=prompt, max_tokens=8) == server.complete(max_tokens=8)


def test_an_adaptor_is_a_model_of_its_own_also_at_the_same_time(server: Server, folder: Path) -> None:
    expected = {None: text_of(folder, 60), "legal": text_of(folder, 60, "legal")}
    assert expected[None] != expected["legal"]
    assert server.complete(model="legal", max_tokens=60) == expected["legal"]
    found: dict[str | None, str] = {}

    def ask(name: str | None) -> None:
        found[name] = server.complete(max_tokens=60, model="book" if name is None else f"book:{name}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_generation_that_fails_is_told_and_the_server_goes_on(server: Server) -> None:
    body = {"model": "overflowing", "prompt": "The river", "max_tokens": 5}
    status, answer = server.ask("/v1/completions", body)
    assert status == 500 and answer["error"]["type"] == "server_error"
    *_, last = events_of(server.send("/v1/completions", body | {"stream": True}))
    assert last["error"]["message"] == "the generation failed"
    server.wait_for("RuntimeError: ", 2)
    assert server.complete(max_tokens=3) != ""


def test_two_answers_are_generated_in_turns(server: Server) -> None:
    first = server.begin(**LONG)
    assert server.complete(max_tokens=5) != ""
    second = server.begin(**LONG)
    for response in (first, second):
        assert response.readline() == b"\n" and response.readline().startswith(b"data: {")
        hang_up(response)


def test_chat_uses_the_models_template(server: Server, folder: Path) -> None:
    expected = text_of(folder, 12, prompt="user: The river\nassistant: turns\nuser: 7\nassistant:")
    messages = [
        {"role": "user", "content": "The river"},
        {"role": "assistant", "content": "turns"},
        {"role": "user", "content": [{"type": "text", "text": "7"}]},
    ]
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 12}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200 and answer["object"] == "chat.completion", answer
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    first, *pieces, end = events_of(server.send("/v1/chat/completions", body | {"stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and end == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == expected
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    status, answer = server.ask("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]})
    assert status == 400 and "refuses the messages: no system here" in answer["error"]["message"]


WRONG: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b'{"prompt": ', 400, "the body is not JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "the body is not JSON"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, "the body is not JSON"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, 400, "the body is not JSON"),
    "no object": ([1], 400, "must be a JSON object"),
    "no prompt": ({}, 400, "prompt must be a text or a list of tokens, got None"),
    "prompt": ({"prompt": {"a": 1}}, 400, "prompt must be a text"),
    "no text": ({"prompt": "\ud800"}, 400, "the prompt is not valid UTF-8"),
    "two prompts": ({"prompt": ["a", "b"]}, 400, "one prompt here"),
    "tokens": ({"prompt": [0, 99999]}, 400, "the tokens of prompt must be from 0 to 299"),
    "unknown model": ({"prompt": "a", "model": "\ud800"}, 404, "there is no model"),
    "type of model": ({"prompt": "a", "model": 3}, 400, "model must be a text, got 3"),
    "unknown field": ({"prompt": "a", "\ud800max": 3}, 400, "unknown field"),
    "not offered": ({"prompt": "a", "n": 2}, 400, "this server does not offer n"),
    "max_tokens": ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be a whole number from 1"),
    "text for a number": ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens must be a whole number"),
    "true": ({"prompt": "a", "temperature": True}, 400, "temperature must be a number from 0.0 to 2.0, got true"),
    "temperature": ({"prompt": "a", "temperature": 2.1}, 400, "temperature must be from 0.0 to 2.0, got 2.1"),
    "top_p": ({"prompt": "a", "top_p": 0}, 400, "top_p must be above 0"),
    "seed": ({"prompt": "a", "seed": -1}, 400, "seed must be a whole number"),
    "stop": ({"prompt": "a", "stop": ["a", ""]}, 400, "stop must be a text that is not empty"),
    "stops": ({"prompt": "a", "stop": list("abcde")}, 400, "or at most 4 of them"),
    "stream": ({"prompt": "a", "stream": 1}, 400, "stream must be true or false"),
    "stream options": ({"prompt": "a", "stream_options": {}}, 400, "stream_options must be an object beside stream"),
    "too long": ({"prompt": "1 " * 4000}, 400, "the model's context is 6000; shorten it"),
    "too large": (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_one_clear_answer(case: str, server: Server) -> None:
    body, expected, message = WRONG[case]
    status, answer = server.ask("/v1/completions", body)
    assert status == expected and message in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and "\n" not in answer["error"]["message"]


def test_wrong_ways_to_ask(server: Server) -> None:
    for path, options, expected in (
        ("/v1/other", {}, 404),
        ("/v1/models", {"method": "DELETE"}, 405),
        ("/v1/completions", {}, 405),
        ("/v1/completions", {"body": {"prompt": "a"}, "headers": {"Content-Type": "text/plain"}}, 415),
        ("/v1/chat/completions", {"body": {"messages": []}}, 400),
        ("/v1/chat/completions", {"body": {"messages": [{"role": "robot", "content": "a"}]}}, 400),
        ("/v1/chat/completions", {"body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}}, 400),
    ):
        status, answer = server.ask(path, **options)
        assert status == expected and set(answer["error"]) == {"message", "type", "param", "code"}, path


def test_a_body_without_a_length_is_limited_too(server: Server) -> None:
    parts = iter([b'{"prompt": "', *[b"a" * 100_000] * 30])
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        # The server need not read the rest.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
        with connection.getresponse() as response:
            assert response.status == 413


def test_when_all_places_are_taken_a_request_is_refused_and_gone_clients_free_theirs(server: Server) -> None:
    told = sum("the client went away" in line for line in server.lines)
    running = [server.begin(**LONG) for _ in range(2)]
    waiting = server.send("/v1/completions", GREEDY | LONG | {"stream": True})
    with server.send("/v1/completions", GREEDY) as response:
        assert response.status == 429 and response.getheader("Retry-After") == "1"
        assert b"all 3 places are taken" in response.read()
    for stream in (*running, waiting):
        hang_up(stream)
    tokens = [int(server.wait_for("the client went away", told + n).split(" + ")[1].split()[0]) for n in (1, 2, 3)]
    assert max(tokens) < 5000
    assert server.complete(max_tokens=3) != ""


def test_a_client_that_waits_for_a_whole_answer_may_go_too(server: Server) -> None:
    told = sum("the client went away" in line for line in server.lines)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    connection.request("POST", "/v1/completions", json.dumps(GREEDY | LONG), {"Content-Type": "application/json"})
    connection.close()
    server.wait_for("the client went away", told + 1)
    assert server.complete(max_tokens=3) != ""


def test_a_stop_signal_lets_running_answers_end_and_no_other_begin(folder: Path) -> None:
    with Server.started(folder, "--concurrency", "1", "--queue", "1") as server:
        name = str(folder)
        stream = server.begin(max_tokens=400, model=name)
        waiting = server.send("/v1/completions", GREEDY | {"stream": True})
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping: running answers have 20 seconds")
        events = events_of(stream)
        assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == "length"
        (refused,) = events_of(waiting)
        assert refused["error"]["code"] == "server_stopping"
        assert server.process.wait(SECONDS) == 0


def test_after_ctrl_c_answers_that_take_longer_than_the_limit_are_ended_with_an_error(folder: Path) -> None:
    with Server.started(folder, "--grace", "0.3", "--max_tokens", "9000") as server:
        stream, results = server.begin(**LONG), []
        thread = threading.Thread(target=lambda: results.append(server.ask("/v1/completions", GREEDY | LONG)))
        thread.start()
        stream.readline()
        server.process.send_signal(signal.SIGINT)
        *_, last = events_of(stream)
        assert "stopped before the answer was whole" in last["error"]["message"]
        thread.join()
        assert results[0][0] == 503 and results[0][1]["error"]["code"] == "server_stopping"
        assert server.process.wait(SECONDS) == 0


def test_a_second_signal_ends_running_answers_at_once(folder: Path) -> None:
    with Server.started(folder, "--grace", "600", "--max_tokens", "9000") as server:
        stream = server.begin(**LONG)
        stream.readline()
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping: running answers have 600 seconds")
        server.process.send_signal(signal.SIGINT)
        *_, last = events_of(stream)
        assert "stopped before the answer was whole" in last["error"]["message"]
        assert server.process.wait(SECONDS) == 0


def test_an_address_in_use_is_one_line(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", str(server.port)]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen at 127.0.0.1:{server.port}" in error and error.count("\n") == 1


USAGE = {
    "places": (["--concurrency", "0"], 2, "--concurrency must be at least 1, got 0"),
    "grace": (["--grace", "-1"], 2, "--grace must be at least 0, got -1.0"),
    "port": (["--port", "70000"], 2, "--port must be between 0 and 65535"),
    "seed": (["--seed", "-1"], 2, "--seed must be between 0"),
    "adaptor": (
        ["--adaptors", "legal,other"],
        2,
        "--adaptors: no adaptor 'other'; the model has: legal, medical, overflowing",
    ),
    "device": (["--device", "cuda:9"], 2, "cuda:9"),
    "not installed": ([], 2, "pip install 'kalmagrove[serve]'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "not installed":
        monkeypatch.setitem(sys.modules, "uvicorn", None)
    words, code, message = USAGE[case]
    words = words if "--port" in words else [*words, "--port", "0"]
    assert main(["serve", str(folder), *words]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1
