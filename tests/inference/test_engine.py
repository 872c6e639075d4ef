"""Answers of the engine: those of the model alone, in any company, whatever was kept, cut short or went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from vlmamba.inference import Answer, Engine, Overloaded, Sampling
from vlmamba.inference import engine as module
from vlmamba.models.decode import Decoder

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture
def make(nano) -> Iterator:
    made = []

    def engine(**options) -> Engine:
        made.append(Engine(nano.model, nano.processor, **{"slots": 4} | options))
        return made[-1]

    yield engine
    for each in made:
        each.close()


def text_of(answer: Answer) -> str:
    pieces = list(answer)
    assert pieces[-1].finish in ("stop", "length"), pieces[-1]
    return "".join(piece.text for piece in pieces)


def about(chat: list[dict], text: str) -> list[dict]:
    """Another question on a chat's picture."""
    return [{"role": "user", "content": [chat[0]["content"][0], {"type": "text", "text": text}]}]


def test_many_at_once_are_answered_as_alone(make, chats, alone) -> None:
    engine = make()
    answers = []
    for number, chat in enumerate(chats):
        answers.append(engine.submit(chat, SHORT))
        if number % 3 == 0:
            time.sleep(0.05)  # so that some come while others are being answered
    assert [text_of(answer) for answer in answers] == alone
    stats = engine.stats()
    assert stats["requests_total"] == len(chats)
    assert stats["running"] == stats["waiting"] == 0
    assert stats["prompt_tokens_total"] == sum(answer.prompt_tokens for answer in answers)


def test_the_captured_step_s_slots(make, nano, chats, alone) -> None:
    """The path of a GPU, its kernels replaced by the reference."""
    decoder = Decoder(nano.model.language_model)
    engine = make(decoder=decoder, capture=False, implementation="reference")
    answers = [engine.submit(chat, SHORT) for chat in chats]
    assert [text_of(answer) for answer in answers] == alone
    assert set(engine._runner._steps) <= {1, 2, 4}


def test_looking_at_tokens_a_turn_late_changes_nothing(make, chats, alone) -> None:
    engine = make()
    engine._runner.ahead = True
    assert [text_of(a) for a in [engine.submit(chat, SHORT) for chat in chats]] == alone
    one = Sampling(max_new_tokens=1)
    assert [list(engine.submit(chat, one))[-1].tokens for chat in chats[:3]] == [1, 1, 1]
    first = engine.submit(chats[0], SHORT)
    longer = [*chats[0], {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "what else?"}]
    second = engine.submit(longer, SHORT)
    said = text_of(second)
    assert second.cached_tokens > first.prompt_tokens + 1  # the end of the answer has been read too
    assert said == text_of(make(cache_bytes=0).submit(longer, SHORT))


@pytest.mark.gpu
def test_on_a_gpu(nano, chats) -> None:
    """The captured step over slots, a turn ahead: as `generate` there, alone."""
    from vlmamba.commands.load import load

    loaded = load("nano", "cuda", "float32")
    engine = Engine(loaded.model, loaded.processor, slots=4)
    answers = [text_of(answer) for answer in [engine.submit(chat, SHORT) for chat in chats]]
    engine.close()
    for chat, said in zip(chats, answers, strict=True):
        inputs = loaded.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to("cuda")
        ids = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert loaded.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == said


def test_a_picture_is_read_once(make, chats) -> None:
    engine = make(slots=8)
    answers = [engine.submit(chat, SHORT) for chat in chats[:8]]
    for answer in answers:
        text_of(answer)
    assert sum(answer.cached_tokens == 0 for answer in answers) == 1
    again = engine.submit(chats[1], SHORT)
    text_of(again)
    assert again.cached_tokens > 256


def test_the_next_turn_reads_itself_alone(make, nano, chats) -> None:
    engine = make()
    first = engine.submit(chats[0], SHORT)
    said = text_of(first)
    longer = [*chats[0], {"role": "assistant", "content": said}, {"role": "user", "content": "what else is there?"}]
    second = engine.submit(longer, SHORT)
    text = text_of(second)
    assert second.cached_tokens >= first.prompt_tokens
    fresh = make(cache_bytes=0)
    anew = fresh.submit(longer, SHORT)
    assert text_of(anew) == text
    assert anew.cached_tokens == 0
    assert fresh.stats()["cache_entries"] == 0


def test_a_long_prompt_is_read_in_stretches(make, chats, alone, monkeypatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 40)  # ends within pictures and words
    engine = make()
    answers = [engine.submit(chat, SHORT) for chat in chats]
    assert [text_of(answer) for answer in answers] == alone


def test_a_long_prompt_does_not_hold_up_others(make, chats, monkeypatch) -> None:
    monkeypatch.setattr(module, "STRETCH", 64)
    engine = make()
    order, done = [], threading.Event()

    def deliver(name: str):
        def take(piece) -> None:
            if piece.finish:
                order.append(name)
                if len(order) == 3:
                    done.set()

        return take

    long = [{"role": "user", "content": "so many words " * 1500}]
    for name, chat in (("long", long), ("one", [{"role": "user", "content": "hello"}]), ("two", chats[-1])):
        engine.submit(chat, Sampling(max_new_tokens=2), deliver(name))
    assert done.wait(60)
    assert order[-1] == "long"


def test_a_seed_draws_the_same_in_any_company(make, chats) -> None:
    drawn = Sampling(max_new_tokens=20, temperature=1.5, top_p=0.95, top_k=50, seed=7)
    described = about(chats[0], "describe the picture.")
    by_itself = text_of(make().submit(described, drawn))
    engine = make()
    company = [engine.submit(chat, Sampling(max_new_tokens=10, temperature=2.0)) for chat in chats[1:4]]
    assert text_of(engine.submit(described, drawn)) == by_itself
    for answer in company:
        text_of(answer)
    others = {text_of(engine.submit(described, Sampling(20, 1.5, seed=seed))) for seed in range(6)}
    assert len(others) > 1


def test_how_answers_end(make, chats, alone) -> None:
    engine = make()
    *_, last = engine.submit(chats[0], SHORT)
    assert (last.finish, last.error) == ("stop", "")
    long = Sampling(max_new_tokens=3)
    described = about(chats[0], "describe the picture.")
    *_, last = engine.submit(described, long)
    assert (last.finish, last.tokens) == ("length", 3)
    whole = text_of(engine.submit(described, Sampling(max_new_tokens=40)))
    word = whole.split()[2]
    pieces = list(engine.submit(described, Sampling(max_new_tokens=40, stop=("never said", word))))
    assert pieces[-1].finish == "stop"
    assert "".join(p.text for p in pieces) == whole[: whole.index(word)]


def test_cancelled_answers_free_their_slot(make, chats) -> None:
    engine = make(slots=1)
    described = about(chats[0], "describe the picture.")
    first = engine.submit(described, Sampling(max_new_tokens=100_000, temperature=100, seed=1, stop=("no such thing",)))
    waits, answered = engine.submit(chats[1], SHORT), engine.submit(chats[2], SHORT)
    waits.cancel()
    pieces = iter(first)
    next(pieces)
    first.cancel()
    assert [p.finish for p in pieces][-1] in ("cancelled", "stop")
    assert [p.finish for p in waits] == ["cancelled"]
    text_of(answered)


def test_the_line_has_an_end(make, chats, monkeypatch) -> None:
    engine = make(slots=1, waiting=2)
    held = threading.Event()
    run = engine._runner.read
    monkeypatch.setattr(engine._runner, "read", lambda *a: (held.wait(20), run(*a))[1])
    answers = [engine.submit(chats[0], SHORT)]
    while engine.stats()["waiting"]:
        time.sleep(0.01)
    answers += [engine.submit(chats[1], SHORT), engine.submit(chats[2], SHORT)]
    with pytest.raises(Overloaded, match="2 requests wait"):
        engine.submit(chats[3], SHORT)
    held.set()
    assert all(text_of(answer) for answer in answers)


@pytest.mark.parametrize("part", ["read", "step"])
def test_an_error_ends_answers_but_not_the_engine(make, chats, alone, monkeypatch, part) -> None:
    engine = make()
    run = getattr(engine._runner, part)

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(engine._runner, part, fail)
    *_, piece = engine.submit(chats[0], SHORT)
    assert (piece.finish, piece.error) == ("error", "MemoryError: no room")
    monkeypatch.setattr(engine._runner, part, run)
    assert text_of(engine.submit(chats[0], SHORT)) == alone[0]


def test_an_error_in_a_prompt_leaves_other_answers_alone(make, chats, alone, monkeypatch) -> None:
    engine = make()
    run = engine._runner.read
    full = threading.Event()

    def read(*what):
        if full.is_set():
            raise MemoryError("no room")
        return run(*what)

    monkeypatch.setattr(engine._runner, "read", read)
    described = iter(engine.submit(about(chats[0], "describe the picture."), Sampling(max_new_tokens=40)))
    next(described)
    full.set()
    *_, last = engine.submit(chats[-2], SHORT)
    assert last.finish == "error"
    assert list(described)[-1].finish in ("stop", "length")


def test_a_receiver_that_fails_is_its_own_trouble(make, chats, alone, caplog) -> None:
    engine = make()
    calls = []

    def fail(piece) -> None:
        calls.append(piece)
        raise KeyboardInterrupt("of all things")

    failed, other = engine.submit(chats[0], SHORT, fail), engine.submit(chats[1], SHORT)
    assert text_of(other) == alone[1]
    assert text_of(engine.submit(chats[2], SHORT)) == alone[2]
    assert failed.cancelled
    assert len(calls) == 1
    assert "receiver of an answer failed" in caplog.text


def test_a_state_that_cannot_be_kept_ends_nothing(make, chats, alone, monkeypatch) -> None:
    engine = make()
    text_of(engine.submit(chats[0], SHORT))
    kept = engine.stats()["cache_entries"]

    def fail(slot):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine._runner, "take", fail)
    assert text_of(engine.submit(chats[-1], SHORT)) == alone[-1]
    assert engine.stats()["cache_entries"] == kept // 2


def test_a_failed_turn_leaves_the_line_alone(make, chats, alone, monkeypatch) -> None:
    engine = make(slots=1)
    run, failing = engine._runner.step, threading.Event()

    def step(slots):
        if not failing.is_set():
            failing.set()
            raise RuntimeError("a bad day")
        return run(slots)

    monkeypatch.setattr(engine._runner, "step", step)
    answers = [engine.submit(chat, SHORT) for chat in chats[:3]]
    assert [list(answers[0])[-1].finish, *map(text_of, answers[1:])] == ["error", *alone[1:3]]


def test_more_slots_than_steps_are_captured_for(make, nano) -> None:
    """Above 256 a step holds a multiple of 64."""
    engine = make(slots=300, decoder=Decoder(nano.model.language_model), capture=False, implementation="reference")
    for batch in (257, 259, 300):
        engine._runner.step(range(batch))
    assert set(engine._runner._steps) == {320}


def test_slots_without_end_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"1000000000 slots of 0\.3 MB do not fit .* take fewer"):
        make(slots=10**9)


def test_pieces_are_had_once(make, chats) -> None:
    engine = make()
    answer = engine.submit(chats[0], SHORT)
    text_of(answer)
    with pytest.raises(ValueError, match="earlier iteration"):
        iter(answer)
    with pytest.raises(ValueError, match="receiver"):
        iter(engine.submit(chats[0], SHORT, lambda piece: None))


def test_whoever_comes_while_it_closes_is_told(make, nano, chats, monkeypatch) -> None:
    engine = make()
    scaled = threading.Event()
    pixels = nano.processor.image_pixels

    def slowly(image):
        scaled.set()
        time.sleep(0.3)
        return pixels(image)

    monkeypatch.setattr(nano.processor, "image_pixels", slowly)
    told = []

    def ask() -> None:
        try:
            told.append(list(engine.submit(chats[0], SHORT))[-1].finish)
        except Overloaded as error:
            told.append(str(error))

    asker = threading.Thread(target=ask)
    asker.start()
    scaled.wait()
    engine.close()
    asker.join(10)
    assert told == ["the engine is closed"]


def test_what_cannot_be_asked(make) -> None:
    engine = make()
    with pytest.raises(ValueError, match="message 1 is"):
        engine.submit(["hi"])
    with pytest.raises(ValueError, match="role"):
        engine.submit([{"role": "robot", "content": "hello"}])
    with pytest.raises(ValueError, match="no such image"):
        engine.submit([{"role": "user", "content": [{"type": "image", "image": "/nowhere.png"}]}])
    text = [{"role": "user", "content": "<image> is a word here, <|endoftext|> too"}]
    assert list(engine.submit(text, SHORT))[-1].finish in ("stop", "length")
    engine.close()
    with pytest.raises(Overloaded, match="closed"):
        engine.submit(text)


def test_closing_ends_what_is_there(make, chats) -> None:
    engine = make(slots=1)
    described = about(chats[0], "describe the picture.")
    answers = [engine.submit(described, Sampling(max_new_tokens=10_000, temperature=100)) for _ in range(3)]
    first = iter(answers[0])
    next(first)
    engine.close()
    assert list(first)[-1].finish in ("cancelled", "stop")
    assert [list(answer)[-1].finish for answer in answers[1:]].count("cancelled") >= 1


def test_pictures_are_told_apart(make, nano) -> None:
    """Two pictures of one size and one text: no state of the one serves the other."""
    engine = make()
    answers = []
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (128, 128), colour)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is it?"}]
        answers.append(engine.submit([{"role": "user", "content": content}], SHORT))
        text_of(answers[-1])
    assert [answer.cached_tokens for answer in answers] == [0, 0]
