"""Own data and its metrics, the judge's manners, and the arithmetic of doubt."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from official import WRITERS, golden, llava_answers, put_json, put_lines

from vlmamba.cli import main
from vlmamba.evaluation import Judge, Options, OwnData, score
from vlmamba.evaluation.own import METRICS
from vlmamba.evaluation.statistics import bootstrap, interval, mcnemar, wilson


@pytest.mark.parametrize(
    ("metric", "answer", "truths", "value"),
    [
        ("exact", " A Fork. ", ["a fork"], 1.0),
        ("exact", "fork", ["a fork"], 0.0),
        ("contains", "It is a red fork, I think", ["red fork"], 1.0),
        ("contains", "forks", ["fork"], 0.0),  # whole words
        ("vqa", "The fork!", ["fork"], 1.0),
        ("vqa", "two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("vqa", "two", ["2", "3", "pair"], 1.0),  # too few to leave one out
        ("anls", "invoice 123", ["Invoice 124"], 10 / 11),
        ("anls", "abcd", ["wxyz"], 0.0),
        ("anls", "ab", ["ax"], 0.5),
        ("anls", "abc", ["axy"], 0.0),  # more than half of it wrong: nothing
        ("anls", "Yes.", ["yes"], 0.75),  # a period counts
        ("anls", "a   b", ["A c"], 0.8),  # blanks make no distance, but length
        ("choice", "B", ["B"], 1.0),
        ("choice", "The answer is b.", ["a dog"], 1.0),  # by text and by sentence
        ("choice", "a dog", ["(B)"], 1.0),
        ("choice", "A", ["B"], 0.0),
        ("choice", "", ["B"], 0.0),
    ],
)
def test_metrics(metric: Any, answer: str, truths: list[str], value: float) -> None:
    prompt = "Which one?\nA. a cat\nB. a dog\n(C) nobody"
    assert METRICS[metric](answer, truths, prompt) == pytest.approx(value)


def own_file(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a fork"}]
    return put_json(
        tmp_path / "own.json",
        [
            {"id": 1, "image": "a.jpg", "conversations": turns, "skill": "things"},
            {"id": "2", "conversations": turns + turns, "answers": ["spoon", "a spoon"]},
        ],
    )


def test_own_data(tmp_path: Path) -> None:
    data = own_file(tmp_path)
    first, second = OwnData().examples(data, "llava")
    assert (first.prompt, first.image, second.image) == ("What is it?", tmp_path / "a.jpg", None)
    answers = put_lines(
        tmp_path / "a.jsonl", [{"question_id": 1, "text": "A fork"}, {"question_id": "2", "text": "no"}]
    )
    result = score(OwnData("exact"), data, answers)
    assert result["headline"] == 50.0
    assert result["metrics"]["bySkill"] == {"things": 100.0, "all": 0.0}
    assert "1 conversations have more turns" in result["notes"][0]


def test_own_data_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown metric 'f1'"):
        OwnData("f1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no file"):
        OwnData().examples(tmp_path / "none.json", "llava")
    record = {"id": 1, "conversations": [{"from": "gpt", "value": "a"}]}
    with pytest.raises(ValueError, match="entry 1: expected a human turn"):
        OwnData().examples(put_json(tmp_path / "x.json", [record]), "llava")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    twice = [{"id": 1, "conversations": turns}, {"id": "1", "conversations": turns}]
    with pytest.raises(ValueError, match="entry 2: the id '1' occurs a second time"):
        OwnData().examples(put_json(tmp_path / "x.json", twice), "llava")
    with pytest.raises(ValueError, match="entry 1: the answers must be a list, found 5"):
        OwnData().examples(put_json(tmp_path / "x.json", [twice[0] | {"answers": 5}]), "llava")
    (example,) = OwnData().examples(put_json(tmp_path / "x.json", [twice[0] | {"answers": "yes"}]), "llava")
    assert example.data["truths"] == ["yes"]


class Endpoint(HTTPServer):
    """An OpenAI-compatible endpoint that replies from a function, and can be out of order for a while."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failures: list[int] = []
        self.reply: Any = lambda request: "0.5"
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"path": self.path, "key": self.headers.get("Authorization")})
        status = self.server.failures.pop(0) if self.server.failures else 200
        body = {"choices": [{"message": {"content": self.server.reply(request)}}]}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_judge_retries_and_keeps_replies(endpoint: Endpoint, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint.failures = [429, 503]
    judge = Judge(endpoint.url, "m", tmp_path / "cache.jsonl", key_variable="JUDGE_KEY", wait=0.001)
    assert judge.ask("how good?", max_tokens=3) == "0.5"
    assert len(endpoint.requests) == 3
    last = endpoint.requests[-1]
    assert (last["path"], last["key"], last["max_tokens"]) == ("/v1/chat/completions", "Bearer secret", 3)
    assert "secret" not in (tmp_path / "cache.jsonl").read_text()
    with (tmp_path / "cache.jsonl").open("a") as file:
        file.write('{"key": "torn')
    again = Judge(endpoint.url, "m", tmp_path / "cache.jsonl")
    assert again.ask("how good?", max_tokens=3) == "0.5"
    assert len(endpoint.requests) == 3  # cached
    again.ask("how good?", max_tokens=3, sample=(1,))  # another run asks anew
    assert len(endpoint.requests) == 4
    third = Judge(endpoint.url, "m", tmp_path / "cache.jsonl")
    third.ask("how good?", max_tokens=3, sample=(1,))
    assert len(endpoint.requests) == 4  # the torn line did not swallow the next


def test_judge_errors(endpoint: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="http"):
        Judge("localhost:1", "m")
    with pytest.raises(ValueError, match="address http://localhost:x/chat/completions cannot be used"):
        Judge("http://localhost:x", "m").ask("x")
    for line in ('{"a": 1}', "5"):
        (tmp_path / "cache.jsonl").write_text(line)
        with pytest.raises(ValueError, match=r"cache.jsonl, line 1: .*key, reply"):
            Judge(endpoint.url, "m", tmp_path / "cache.jsonl")
    endpoint.failures = [401]
    with pytest.raises(ValueError, match="refuses: 401"):
        Judge(endpoint.url, "m", wait=0.001).ask("x")
    assert len(endpoint.requests) == 1  # no use in asking again
    endpoint.failures = [0]  # no HTTP
    assert Judge(endpoint.url, "m", wait=0.001).ask("x") == "0.5"
    endpoint.failures = [500] * 2
    with pytest.raises(ValueError, match="did not answer in 2 tries: 500"):
        Judge(endpoint.url, "m", tries=2, wait=0.001).ask("x")


def test_judged_mmvet_and_estimate(endpoint: Endpoint, tmp_path: Path) -> None:
    data = WRITERS["mmvet"](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("mmvet"))
    said: list[str] = []
    judge = Judge(endpoint.url, "m", price=(10.0, 30.0))
    result = score("mmvet", data, answers, options=Options(judge=judge, runs=2), say=said.append)
    assert (result["headline"], result["metrics"]["runs"]) == (50.0, [50.0, 50.0])
    assert len(endpoint.requests) == 400  # the second run asks anew
    assert "400 calls to m" in said[0]
    assert "$" in said[0]
    assert "not comparable" in result["notes"][1]
    endpoint.reply = lambda request: "0.1" if len(endpoint.requests) == 401 else "0.0"
    mine = score("mmvet", data, answers, options=Options(judge=judge, few_shot="official text"))
    assert endpoint.requests[-1]["messages"][0]["content"].startswith("official text\n")
    assert not any("not comparable" in note for note in mine["notes"])
    assert (mine["headline"], mine["standard_error"]) == (0.0, pytest.approx(0.05))  # 0.05, rounded


def test_judged_mmbench(endpoint: Endpoint, tmp_path: Path) -> None:
    data = WRITERS["mmbench"](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("mmbench"))
    endpoint.reply = lambda request: "?"
    judge = Judge(endpoint.url, "m")
    result = score("mmbench", data, answers, options=Options(judge=judge))
    undecided = result["metrics"]["undecided"]
    assert len(undecided) == 20 == golden("mmbench")[1]["vlmevalkit_2023-12_fake_judge"]["n_judge_calls"]
    assert len(endpoint.requests) == 60  # three tries each
    assert "the judge left 20 answers undecided" in result["notes"][1]


def test_wilson() -> None:
    # 8 of 10: centre (0.8 + 1.92/10) / 1.384 = 0.7168, half width 0.2266 (Wilson 1927).
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == pytest.approx(0.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_intervals() -> None:
    scores = [0.3, 0.6, 0.9, 1.0] * 50
    low, high = bootstrap(scores)
    assert low < 0.7 < high
    # Standard error of the mean: 0.27 / sqrt(200) = 0.019.
    assert high - low == pytest.approx(2 * 1.96 * 0.0194, rel=0.15)
    assert interval([1.0, 0.0])[2] == "Wilson"
    assert interval(scores)[2] == "bootstrap"
    assert bootstrap(scores) == bootstrap(scores)


def test_mcnemar() -> None:
    test = mcnemar([1, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0])
    assert (test.both, test.first_only, test.second_only, test.neither) == (1, 3, 1, 1)
    assert test.p == pytest.approx(2 * (1 + 4) / 16)  # at most 1 of 4 heads, two-sided
    assert mcnemar([1, 0], [1, 0]).p == 1.0
    assert mcnemar([1.0] * 2000, [0.0] * 2000).p < 1e-300
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([1], [1, 0])


def test_pictures_are_missed_before_a_model_is_loaded(tmp_path: Path, capsys) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    put_json(tmp_path / "own.json", [{"id": 7, "image": "7.png", "conversations": turns}])
    assert main(["eval", "nowhere", "--own", str(tmp_path / "own.json"), "--images", str(tmp_path / "away")]) == 2
    said = capsys.readouterr().err
    assert f"sample '7' has no picture at {tmp_path / 'away/7.png'}; --images names" in said
