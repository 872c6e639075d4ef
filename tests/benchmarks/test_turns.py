"""What the benchmark program measures first, from which commit, and against which limits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as program
from benchmarks import decode, machine, memory, models, ops, peer_decode, peers, prefill, rehearsal, timing, training
from benchmarks.aims import AIMS
from benchmarks.bench import Bench
from benchmarks.report import Report, Row
from benchmarks.turns import SECTIONS, TURNS


def test_transformers_mamba_decodes_in_bfloat16() -> None:
    """Its residual stream is float32, and its last norm's output with it: only its own forward minds that."""
    mamba = peers.plain_mamba().MambaForCausalLM
    model = models.placed(lambda: mamba(models.mamba_config("toy")), torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        step = peer_decode._step(models.KERNELS, "graph", model, models.tokens("toy", 2, 8, torch.device("cpu")))
        for _ in range(3):
            step()


def test_what_is_aimed_at_comes_first() -> None:
    parts = [turn.part for turn in TURNS]
    assert parts == sorted(parts, key=["marks", "more", "last"].index)
    assert {turn.section for turn in TURNS if turn.part == "marks"} == {*SECTIONS} - {"block", "engine"}
    slow = [part for part, plan in prefill.PARTS.items() if models.PLAIN in plan]
    compiled = [part for part, plan in peer_decode.PARTS.items() if any(mode == "compiled" for _, mode, _ in plan)]
    assert slow == compiled == ["last"]


def test_every_aim_has_a_number() -> None:
    """The aims go by the names of the cases: a name that changed would lose its aim."""
    batches = [f"decode 2.8b, B{batch}" for batch in decode.MARKS]
    prompts = [prefill.case_of("2.8b", *case) for case in prefill.MARKS]
    cases = {*batches, "decode 2.8b, B1 int8", *prompts, training._case(False)}
    cases |= {f"scan B{b} D{d} L{n}, {way}" for b, n, d in ops.SCANS[:2] for way in ("forward", "backward")}
    cases |= {f"one sequence of {memory.PARTS['marks'][models.OURS][-1]} tokens, memory above the weights"}
    assert cases < AIMS.keys()
    assert len(AIMS.keys() - cases) == 4  # 2-D scan, image to first token, two of the evaluation


def test_each_gets_its_share_of_the_time(tmp_path: Path) -> None:
    bench = Bench(Report(tmp_path / "x", {}), torch.device("cpu"), False, {})
    bench.begin("prefill", 100)
    shares = []
    for _ in bench.in_turn("abcd"):
        shares.append(bench.left() - bench._until)
        assert not bench.over()
        assert bench.over(101)
        bench._until += 100  # as if its share had passed
        assert bench.over()
    assert shares == pytest.approx([25, 33.3, 50, 100], abs=1)  # nobody took time, so those that follow have more


def test_a_function_slower_than_its_time_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    taken = timing._measure_events(lambda: calls.append(time.sleep(0.01)), [()], 0.005, 1, 1, 50)
    assert (len(calls), taken.repeats) == (2, 1)  # one to warm up
    assert taken.median >= 10


def test_results_name_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = shutil.which("git")
    assert git
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("VLMAMBA_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"  # no repository
    for command in ("init -q", "add x", "-c user.name=n -c user.email=e commit -qm m"):
        (tmp_path / "x").write_text("1")
        subprocess.run([git, *command.split()], cwd=tmp_path, check=True)
    clean = machine.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "untracked").touch()
    assert machine.commit() == clean
    (tmp_path / "x").write_text("2")
    assert machine.commit() == f"{clean}+changes"
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "below")
    assert machine.commit() == "abc1234"  # an archive unpacked in somebody else's repository


def test_sections_of_two_runs_say_which_they_are_from(tmp_path: Path) -> None:
    for commit, section, rate in (("aaa", "ops", "700"), ("bbb", "prefill", "750")):
        about = {"name": "m", "commit": commit, "date": "2026-01-01", "measured limits": rate}
        report = Report(tmp_path / "x", about)
        report.start(section)
        report.add(Row(section, "a", "vlmamba", "eager", "ms", 1.0))
        report.write()
    stored = json.loads((tmp_path / "x.json").read_text())
    assert {section: made["commit"] for section, made in stored["made"].items()} == {"ops": "aaa", "prefill": "bbb"}
    text = (tmp_path / "x.md").read_text()
    assert "Commit aaa, 2026-01-01; limits: 700." in text
    assert "Commit bbb, 2026-01-01." in text


def test_the_product_rate_is_of_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves a second a product, of 1 TFLOP each: the rate is that, warm-up not counted."""
    clock = [0.0]
    monkeypatch.setattr(machine, "PRODUCTS_OF_A_CPU", ((1, 1, 1),))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(machine.torch, "mm", lambda a, b: clock.__setitem__(0, clock[0] + 1.0))
    assert machine.product_rate(torch.device("cpu"), 25.0) == pytest.approx(2.0)
    assert clock[0] == 60.0


def test_an_aim_stands_beside_our_best_number(tmp_path: Path) -> None:
    report = Report(tmp_path / "x", {"name": "m"})
    case = "prefill 2.8b, B1 L1024"
    for who, mode, value in (("vlmamba", "eager", 40.0), ("vlmamba", "graph", 18.0), ("Transformer", "graph", 17.0)):
        report.add(Row("prefill", case, who, mode, "ms", value))
    aimed = [line for line in report.markdown().splitlines() if "≤ 15 ms" in line]
    assert len(aimed) == 1
    assert "18 ms" in aimed[0]


def test_rehearsals_run_beside_the_gate_and_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rehearsal, "PATIENCE", 0.5)
    monkeypatch.setattr(rehearsal, "COMMAND", ("-c", "import time; time.sleep(60)"))
    began = time.monotonic()
    with rehearsal.of(["prefill", "cpu"]):
        pass
    assert time.monotonic() - began < 20
    assert "the rehearsal of prefill is not over" in capsys.readouterr().out


def test_a_rehearsal_is_a_run_on_two_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "WIDTHS", {**models.WIDTHS, "2.8b": (64, 64)})
    assert (
        program.main(["--toy", "--device", "cpu", "--out", str(tmp_path / "x"), "--rehearse", "--only", "memory"]) == 0
    )
    assert models.mamba_config("2.8b").num_hidden_layers == rehearsal.LAYERS
    assert not list(tmp_path.iterdir())  # and leaves no result
