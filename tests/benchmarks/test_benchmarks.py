"""The benchmark program at toy size: it runs everywhere, refuses to time wrong functions, and reports what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as program
from benchmarks import gate, timing
from benchmarks.bench import Bench
from benchmarks.report import Report, Row

SECTIONS = ("ops", "decode", "prefill", "vlm", "evaluation", "training", "memory", "block", "engine", "cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Report(tmp_path / "out", {"name": "a machine"}), torch.device("cpu"), True, {"copy": 1e9})


def run(out: Path, *arguments: str) -> int:
    return program.main(["--toy", "--device", "cpu", "--out", str(out), *arguments])


def test_every_section_gives_numbers_of_ours_and_names_missing_peers(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    assert run(out, "--only", ",".join(SECTIONS), "--budget", "100") == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    for section in SECTIONS:
        of_ours = [row for row in rows if row["section"] == section and row["who"] == "vlmamba"]
        assert of_ours, section
        assert all(row["value"] is not None for row in of_ours), [row for row in of_ours if row["value"] is None]
    text = out.with_suffix(".md").read_text()
    assert "mamba-ssm: missing" in text or torch.cuda.is_available()
    assert not [row for row in rows if row["note"].startswith("failed")]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_nothing_is_timed_while_an_op_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gate.ops.selective_scan

    def wrong(*args, implementation=None, **options):  # type: ignore[no-untyped-def]
        y, state = right(*args, implementation=implementation, **options)
        return (y if implementation else y * 1.05), state

    monkeypatch.setattr(gate.ops, "selective_scan", wrong)
    assert run(tmp_path / "red", "--only", "prefill") == 1
    assert "the gate is red" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nan_never_passes_the_gate() -> None:
    assert gate.relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_an_unknown_section_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", "--only", "prefil") == 2
    assert "prefil" in capsys.readouterr().err


def test_a_section_without_time_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "run", lambda device: [])
    assert run(tmp_path / "short", "--only", "prefill,vlm", "--budget", "1") == 0
    assert not list(tmp_path.iterdir())


def test_a_failure_becomes_a_row_and_the_run_goes_on(bench: Bench) -> None:
    bench.begin("ops", 10)
    with bench.row_of("a case", "vlmamba", "eager"):
        raise RuntimeError("no such kernel\nand more")
    assert bench.report.rows[0].value is None
    assert bench.report.rows[0].note == "failed: RuntimeError: no such kernel"


def test_a_second_run_replaces_its_own_sections_alone(tmp_path: Path) -> None:
    first = Report(tmp_path / "x", {"name": "m"})
    first.rows = [Row("ops", "a", "vlmamba", "eager", "ms", 1.0), Row("prefill", "b", "vlmamba", "eager", "ms", 2.0)]
    first.write()
    second = Report(tmp_path / "x", {"name": "m"})
    second.start("ops")
    second.add(Row("ops", "a", "vlmamba", "eager", "ms", 3.0))
    second.write()
    assert [row.value for row in Report(tmp_path / "x", {}).rows] == [2.0, 3.0]


def test_a_shorter_run_keeps_what_it_does_not_come_to(tmp_path: Path) -> None:
    def run_at(
        commit: str, name: str = "m", short: bool = True, **values: float
    ) -> dict[str, tuple[float | None, str]]:
        report = Report(tmp_path / "x", {"name": name, "commit": commit, "date": "today"})
        bench = Bench(report, torch.device("cpu"), True, {})
        bench.begin("ops", 10)
        for case, value in values.items():
            bench.add(case, "vlmamba", "graph", value=value)
        if short:
            bench.missing("more", "all")
        report.end(bench.begun)
        report.write()
        return {row.case: (row.value, row.note) for row in Report(tmp_path / "x", {}).rows if row.mode == "graph"}

    assert run_at("1st", a=1.0, b=2.0, c=3.0) == {"a": (1.0, ""), "b": (2.0, ""), "c": (3.0, "")}
    assert "earlier run" not in (tmp_path / "x.md").read_text()
    assert run_at("2nd", a=4.0, b=5.0) == {"a": (4.0, ""), "b": (5.0, ""), "c": (3.0, "commit 1st")}
    assert run_at("3rd", a=6.0) == {"a": (6.0, ""), "b": (5.0, "commit 2nd"), "c": (3.0, "commit 1st")}
    text = (tmp_path / "x.md").read_text()
    assert "| b | vlmamba | graph (commit 2nd) |" in text
    assert "Commit 3rd, today. Rows that name a commit are of an earlier run, held against its limits." in text
    assert run_at("3rd", b=7.0) == {"a": (6.0, ""), "b": (7.0, ""), "c": (3.0, "commit 1st")}
    assert run_at("4th", short=False, b=8.0) == {"b": (8.0, "")}  # all that there is now
    assert run_at("4th", short=False, b=8.0) == {"b": (8.0, "")}
    assert run_at("5th", name="another machine", c=9.0) == {"c": (9.0, "")}


@pytest.mark.parametrize(
    ("unit", "ours", "theirs", "said"),
    [("ms", 2.0, 6.0, "3.00 x slower"), ("tokens/s", 600.0, 200.0, "3.00 x slower"), ("ms", 6.0, 2.0, "3.00 x faster")],
)
def test_the_table_compares_in_the_right_direction(
    tmp_path: Path, unit: str, ours: float, theirs: float, said: str
) -> None:
    report = Report(tmp_path / "x", {"name": "m"})
    report.add(Row("decode", "a", "vlmamba", "graph", unit, ours))
    report.add(Row("decode", "a", "mamba-ssm", "graph", unit, theirs))
    assert said in report.markdown()


def test_a_row_says_its_share_of_the_limit(bench: Bench) -> None:
    bench.begin("ops", 10)
    row = bench.add("copy", "vlmamba", "eager", timing.Timing(2.0, 1.9, 2.1, 9), floor_bytes=1e6)
    assert row.fraction == pytest.approx(0.5)  # 1 MB at 1 GB/s is 1 ms of the 2
    tokens = bench.add("t", "vlmamba", "eager", timing.Timing(2.0, 1.0, 4.0, 9), unit="tokens/s", work=8)
    assert (tokens.low, tokens.value, tokens.high) == (2000.0, 4000.0, 8000.0)


def test_timings_are_medians_with_quartiles() -> None:
    taken = timing.Timing.of([5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 6.0, 7.0])
    assert (taken.low, taken.median, taken.high) == (3.0, 4.5, 6.0)


def test_buffers_rotate_through_more_than_the_cache() -> None:
    sets = timing.rotating(lambda: (torch.zeros(1000), {"b": torch.zeros(500)}), "cpu", cache=30_000)
    assert timing.nbytes(sets) >= 3 * 30_000
    assert len({pair[0].data_ptr() for pair in sets}) == len(sets)


def test_thread_times_refuse_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="set_num_threads"):
        timing.cpu_times(lambda: None)
