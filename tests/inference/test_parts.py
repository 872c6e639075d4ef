"""The engine's parts by themselves: sampling, text, kept states, the line, stretches, slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmamba.inference.pool import States
from vlmamba.inference.request import Answer, Overloaded, Picture, Request, Sampling
from vlmamba.inference.runner import Runner
from vlmamba.inference.sampling import draw
from vlmamba.inference.scheduler import Scheduler
from vlmamba.inference.state_cache import StateCache
from vlmamba.inference.text import Writer
from vlmamba.models.state import MambaState


def picture(name: bytes, begin: int, size: int = 4) -> Picture:
    return Picture(np.zeros((3, 2, 2), np.uint8), name, begin, begin + size)


def request(ids: list[int], pictures: tuple[Picture, ...] = ()) -> Request:
    return Request(ids, pictures, Sampling(), Answer(len(ids), None))


def a_state(value: float = 1.0) -> States:
    return States(torch.full((1, 1, 3, 4), value), torch.full((1, 1, 4, 2), value))


def keep(cache: StateCache, ids: list[int], pictures: tuple[Picture, ...], state: States) -> None:
    cache.put(ids, pictures, state.nbytes, lambda: state)


# Sampling


def test_temperature_0_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -torch.inf, 5.0]])
    assert draw(logits, [Sampling(), Sampling(top_k=2, top_p=0.1)], [0.99, 0.99]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("how", "chances"),
    [
        (Sampling(temperature=1.0), {0.0: 2, 0.49: 2, 0.51: 0, 0.79: 0, 0.81: 1, 0.9999: 1}),
        (Sampling(temperature=1.0, top_k=1), {0.0: 2, 0.9999: 2}),
        (Sampling(temperature=1.0, top_k=2), {0.6: 2, 0.63: 0, 0.9999: 0}),
        (Sampling(temperature=1.0, top_p=0.4), {0.9999: 2}),
        (Sampling(temperature=1.0, top_p=0.6), {0.6: 2, 0.63: 0, 0.9999: 0}),
        (Sampling(temperature=1e-6), {0.9999: 2}),
        (Sampling(temperature=100.0), {0.3: 2, 0.5: 0, 0.7: 1}),
    ],
)
def test_chances_fall_to_tokens_by_their_share(how: Sampling, chances: dict[float, int]) -> None:
    logits = torch.tensor([[0.3, 0.2, 0.5, 0.0]]).log()  # the last is never drawn
    for chance, token in chances.items():
        assert draw(logits, [how], [chance]).tolist() == [token]


def test_rows_do_not_know_of_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    how = [
        Sampling(),
        Sampling(1, 1, 0.9),
        Sampling(1, 2, 1, 5),
        Sampling(1, 0.5, 0.5),
        Sampling(1, 1, 1, 1),
        Sampling(1, 3),
    ]
    chances = [0.1, 0.5, 0.9, 0.3, 0.7, 0.999]
    together = draw(logits, how, chances).tolist()
    assert together == [draw(logits[i : i + 1], how[i : i + 1], chances[i : i + 1]).item() for i in range(6)]


def test_shares_are_met() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]]).repeat(4000, 1)
    chances = ((np.arange(4000) + 0.5) / 4000).tolist()
    found = np.bincount(draw(logits, [Sampling(temperature=1.0)] * 4000, chances).numpy(), minlength=3) / 4000
    assert np.allclose(found, torch.softmax(logits[0], 0).numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("top_k", 10**400),
        ("temperature", "hot"),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", (5,)),
        ("stop", "END"),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        Sampling(**{field: value})  # type: ignore[arg-type]


# Text


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def written(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    writer = Writer(Letters(), stop)
    said = []
    for byte in text.encode():
        said.append(writer.write(byte))
        if writer.stopped:
            break
    return said, "".join(said) + writer.rest(), writer.stopped


def test_characters_come_whole_and_the_first_blank_goes() -> None:
    said, text, stopped = written("  é日本 x")
    assert (text, stopped) == ("é日本 x", False)
    assert "\ufffd" not in "".join(said)
    assert written("") == ([], "", False)


def test_half_a_character_at_the_end_is_said_as_what_it_is() -> None:
    writer = Writer(Letters(), ())
    assert writer.write("é".encode()[0]) == ""
    assert writer.rest() == "\ufffd"


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    writer = Writer(Letters(), ())
    said = [writer.write(0xBF) for _ in range(40)]
    assert max(map(len, said)) <= 4
    assert sum(map(len, said)) == 40


def test_seeds_of_either_sign_differ() -> None:
    drawn = [Request([1], (), Sampling(seed=seed), Answer(1, None)).chance.random() for seed in (5, -5, 5)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


def test_nothing_of_a_stop_string_is_said() -> None:
    assert written("one two STOP three", ("STOP",))[1:] == ("one two ", True)
    assert written("a STO b", ("STOP",))[1:] == ("a STO b", False)
    assert written("a STO", ("STOP",))[1:] == ("a STO", False)
    assert written("xaab", ("aab",))[1:] == ("x", True)
    assert written("one, two", ("two", ","))[1:] == ("one", True)


# States that are kept


def test_the_longest_beginning_is_found() -> None:
    cache = StateCache(10**6)
    shown = (picture(b"A", 2),)
    ids = [1, 2, 9, 9, 9, 9, 3, 4, 5]
    short, long = a_state(1), a_state(2)
    keep(cache, ids[:6], shown, short)
    keep(cache, ids[:8], shown, long)
    assert cache.longest(ids, shown) == (8, long)
    assert cache.longest(ids[:8], shown) == (6, short)  # the last token is always read
    assert cache.longest([*ids[:7], 7, 7], shown) == (6, short)
    assert cache.longest(ids, (picture(b"B", 2),)) == (0, None)
    assert cache.longest([0, *ids[1:]], shown) == (0, None)


def test_a_prefix_has_one_name_whatever_else_is_looked_for() -> None:
    cache = StateCache(10**6)
    shown = (picture(b"A", 2), picture(b"B", 8))
    ids = list(range(20))
    state = a_state()
    keep(cache, ids[:15], shown, state)
    for length in (1, 2, 3, 7, 12, 14):
        keep(cache, [99] * length, (), a_state())
    assert cache.longest(ids, shown) == (15, state)


def test_room_is_made_by_what_was_not_used() -> None:
    size = a_state().nbytes
    cache = StateCache(2 * size)
    first, second = a_state(), a_state()
    keep(cache, [1, 1], (), first)
    keep(cache, [2, 2], (), second)
    assert cache.longest([1, 1, 1], ())[1] is first
    keep(cache, [3, 3], (), a_state())
    assert (len(cache), cache.nbytes) == (2, 2 * size)
    assert cache.longest([2, 2, 2], ()) == (0, None)
    assert cache.longest([1, 1, 1], ())[1] is first
    small = StateCache(size - 1)
    keep(small, [1, 1], (), first)
    assert (len(small), small.holds(size)) == (0, False)
    cache.halve()
    assert (len(cache), cache.nbytes, cache.longest([3, 3, 3], ())[0]) == (1, size, 0)
    keep(cache, [1, 1], (), a_state())
    assert cache.longest([1, 1, 1], ())[1] is first  # it was there, so no other was taken


# The line


def test_first_come_first_served() -> None:
    line = Scheduler(slots=2, waiting=3)
    requests = [request([1]) for _ in range(3)]
    for each in requests:
        line.submit(each)
    with pytest.raises(Overloaded):
        line.submit(request([1]))
    assert line.admit() == (requests[:2], [])
    assert {r.slot for r in line.active} == {0, 1}
    assert line.admit() == ([], [])
    line.release(requests[0])
    assert line.admit() == ([requests[2]], [])
    assert requests[2].slot == requests[0].slot
    line.submit(stays := request([1]))
    line.submit(gone := request([1]))
    gone.answer.cancel()
    assert line.admit() == ([], [gone])  # at once, though no slot is free and another waits before it
    assert line.waiting == 1
    line.defer(requests[1])
    assert line.active == [requests[2], requests[1]]
    line.wait()  # returns at once: there is something to do
    assert line.give_up(waiting=False) == [requests[2], requests[1]]
    assert (line.active, line.waiting) == ([], 1)
    assert line.give_up(waiting=True) == [stays]
    line.close()
    line.wait()
    with pytest.raises(Overloaded, match="closed"):
        line.submit(request([1]))


def test_stretches_never_end_within_a_picture() -> None:
    shown = (picture(b"A", 3, 10), picture(b"B", 20, 10))
    asked = request(list(range(50)), shown)
    ends = []
    while asked.read < 50:
        asked.read, _ = end, pictures = asked.next_stretch(8)
        ends.append((end, [p.digest for p in pictures]))
    assert ends == [(13, [b"A"]), (21 + 9, [b"B"]), (38, []), (46, []), (50, [])]
    nearly = request(list(range(9)))
    assert nearly.next_stretch(8) == (9, ())  # nothing of one token is left
    whole = request(list(range(50)), shown)
    assert whole.next_stretch(1000) == (30, shown)


# Pool


@pytest.mark.parametrize("moves", [False, True])
def test_slots_are_read_apart_and_in_any_pieces(nano, monkeypatch, moves: bool) -> None:
    """Also where a single token takes the state to other memory, as it does on a GPU."""
    runner = Runner(nano.model, nano.processor, slots=3)
    if moves:
        forward = nano.model.forward

        def moving(*args, cache_params: MambaState, **kwargs):
            cache_params.conv = [t.clone() for t in cache_params.conv]
            cache_params.ssm = [t.clone() for t in cache_params.ssm]
            return forward(*args, cache_params=cache_params, **kwargs)

        monkeypatch.setattr(nano.model, "forward", moving)
    for tensor in (runner.pool.conv, runner.pool.ssm):
        tensor.fill_(torch.nan)
    for slot in (0, 1, 2):
        runner.put(slot, None)
    runner.read([[5, 6, 7], [8, 9]], [2, 0], ())
    runner.put(1, runner.take(2))
    cut = runner.read([[10]], [2], ())
    both = runner.read([[10], [11, 12]], [1, 0], ())
    runner.put(2, None)
    whole = runner.read([[5, 6, 7, 10], [8, 9, 11, 12]], [2, 1], ())
    torch.testing.assert_close(cut[0], whole[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[0], whole[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(AssertionError):  # slot 1 had read something else before
        torch.testing.assert_close(both[1], whole[1], atol=1e-2, rtol=1e-2)
    runner.put(1, None)
    torch.testing.assert_close(both[1], runner.read([[8, 9, 11, 12]], [1], ())[0], atol=1e-4, rtol=1e-4)
    assert runner.pool.conv[:, 3].isnan().all(), "the spare slot is nobody's"
