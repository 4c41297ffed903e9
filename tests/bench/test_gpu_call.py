"""`python -m bench.gpu`: stages that hang, fail or find nothing, and what is made of numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench.gpu import clock, memory, preflight, processes, profile, sanitize, sweep, timing
from bench.gpu.__main__ import Call, stages, substitute
from bench.gpu.plans import KERNELS, TODAY, candidates
from bench.gpu.problem import CASES
from bench.gpu.processes import ROOT, UNAVAILABLE, Stage
from dendrite_kernels.backends.cuda.plan import Limits, TilePlan, Work
from dendrite_kernels.benchmark.case import Case


def python(name: str, code: str, share: float = 20, **options: bool) -> Stage:
    return Stage(name, [sys.executable, "-c", code], share, **options)


def call(chosen: list[Stage], folder: Path, seconds: float = 60) -> dict[str, str]:
    """How the stages ended."""
    scratch = folder / "scratch"
    scratch.mkdir()
    made = Call(chosen, seconds, folder, dry=False)
    made.run(scratch)
    saved = json.loads((folder / "gpu.json").read_text())
    assert saved == made.results
    return {name: entry["ending"] for name, entry in saved["stages"].items()}


def ends(process: int) -> bool:
    """Whether a process is gone within seconds, but for what its parent has to collect."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_that_hangs_is_killed_with_its_children(tmp_path: Path, alone: bool) -> None:
    code = (
        "import subprocess, sys, time; print('begun', flush=True);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    chosen = [python("hangs", code, 2, alone=alone), python("later", "print('ran')", 2)]
    started = time.monotonic()
    endings = call(chosen, tmp_path, 4)
    assert time.monotonic() - started < 10
    assert endings == {"hangs": endings["hangs"], "later": "passed"}
    assert endings["hangs"].startswith("out of time")
    assert ends(int((tmp_path / "child").read_text()))
    assert "begun" in (tmp_path / "gpu.log").read_text()


def test_a_call_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    wait = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    code = f"""
import signal, sys
from pathlib import Path
from bench.gpu.__main__ import Call, stop
from bench.gpu.processes import Stage
signal.signal(signal.SIGTERM, stop)
stage = Stage("hangs", [sys.executable, "-c", {wait + "; time.sleep(60)"!r}], 60)
Call([stage], 60, Path({str(tmp_path)!r}), dry=False).run(Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert ends(int(pid.read_text()))


def test_later_stages_run_after_a_failure_but_not_without_the_build(tmp_path: Path) -> None:
    chosen = [
        python("preflight", "raise SystemExit(3)", needs_build=False),
        python("build", "raise SystemExit(1)", needs_build=False),
        python("smoke", ""),
        Stage("lost", ["no-such-program"], 1, needs_build=False),
        python("tool", f"raise SystemExit({UNAVAILABLE})", needs_build=False),
    ]
    endings = call(chosen, tmp_path)
    assert endings["preflight"] == "failed (3)"
    assert endings["smoke"] == "skipped: build failed (1)"
    assert endings["lost"].startswith("failed (")
    assert endings["tool"] == "not available"
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.log", "scratch"}


def test_results_of_a_killed_stage_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    write = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('[1]'); time.sleep(60)"
    slow = Stage("slow", [sys.executable, "-c", write, "{results}"], 2)
    look = f"import json; assert json.load(open({str(tmp_path / 'gpu.json')!r}))['stages']['slow']"
    endings = call([slow, python("look", look, 3)], tmp_path, 5)
    assert endings["look"] == "passed"
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["slow"]["results"] == [1]


def test_shares_fill_the_time_of_a_borrowed_machine() -> None:
    chosen = stages([sys.executable, "-m"])
    together = max(stage.share for stage in chosen if not stage.alone)
    assert sum(stage.share for stage in chosen if stage.alone) + together == 580
    names = [stage.name for stage in chosen]
    assert names[:4] == ["preflight", "build", "smoke", "timing"]


def test_a_long_log_keeps_its_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"begin" + b"x" * processes.LOG_BYTES + b"end")
    text = processes._ends(log)
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "8 bytes left out" in text
    log.write_bytes(b"short")
    assert processes._ends(log) == "short"


def test_a_substitute_for_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    substitute(tmp_path)
    assert os.environ["PYTHONPATH"] == "before"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    substitute(tmp_path)
    assert os.environ["PYTHONPATH"] == f"before{os.pathsep}{tmp_path / 'substitutes'}"
    assert (tmp_path / "substitutes" / "safetensors" / "torch.py").exists()


def test_our_tests_go_before_a_foreign_package(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "tests").mkdir(parents=True)
    (foreign / "tests" / "__init__.py").touch()
    environment = processes.environment({"PYTHONPATH": str(foreign)}, tmp_path)
    assert environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}{foreign}"
    assert preflight.tests_folder() == str(ROOT / "tests")


def test_programs_are_found_beside_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bin/nvcc", "compute-sanitizer/compute-sanitizer", "nsight-compute-2025/ncu"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\necho release 13.0\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    assert preflight.find("compute-sanitizer") == f"{tmp_path}/compute-sanitizer/compute-sanitizer"
    assert preflight.find("ncu") == f"{tmp_path}/nsight-compute-2025/ncu"
    assert preflight.version(f"{tmp_path}/bin/nvcc") == "release 13.0"
    assert preflight.find("no-such-program") is None


def test_a_missing_tool_is_not_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sanitize", "memcheck"])
    monkeypatch.setattr(sanitize, "find", lambda name: None)
    assert sanitize.main() == UNAVAILABLE
    monkeypatch.setattr(sys, "argv", ["profile"])
    monkeypatch.setattr(profile, "find", lambda name: None)
    assert profile.main() == UNAVAILABLE


@pytest.mark.parametrize(
    ("printed", "code"),
    [("==ERROR== ERR_NVGPUCTRPERM - no permission", UNAVAILABLE), ("some other fault", 1)],
)
def test_counters_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\necho '{printed}'\nexit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(profile, "find", lambda name: str(ncu))
    monkeypatch.setattr(sys, "argv", ["profile", "--output", str(tmp_path / "profile.json")])
    assert profile.main() == code


def test_counters_are_read_launch_by_launch() -> None:
    text = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Value"\n'
        '"0","forward_tile","dram__bytes.sum","1,024"\n"0","forward_tile","other","5"\n'
        '"1","finish_weight","gpu__time_duration.sum","7.5"\n'
        '"1","finish_weight","lts__t_bytes.sum","n/a"\n'
    )
    assert profile.parse(text) == [
        {"kernel": "forward_tile", "bytes of memory": 1024.0},
        {"kernel": "finish_weight", "time, ns": 7.5, "bytes of L2": None},
    ]


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    costs = [2000.0, 25.0, 9.0, 1.1, 0.0]  # nothing was staged
    amounts = [[1.0, i, i * i % 13, 3 * i % 7, 0.0] for i in range(1, 30)]
    rows = [(a, sum(c * n for c, n in zip(costs, a, strict=True))) for a in amounts]
    found = sweep.fit(rows)
    wanted = {n: c for n, c in zip(TODAY, costs, strict=True) if c}
    assert found == pytest.approx(wanted)
    fewer = [(a, 100 + 5 * a[1] - 0.1 * a[2]) for a in amounts]  # no cost becomes negative
    assert min(sweep.fit(fewer).values()) >= 0


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.003, 50), (0.018, 18), (0.15, 2), (30, 1)])
def test_a_sample_of_graphs_is_long_beside_a_launch(
    monkeypatch: pytest.MonkeyPatch, milliseconds: float, calls: int
) -> None:
    def timed(captured: int, calls: int, *_: float, **__: float) -> dict[str, float]:
        assert captured == calls
        return {"p50": milliseconds + 0.006 / calls}

    monkeypatch.setattr(clock, "replayed", lambda run, calls=1: calls)
    monkeypatch.setattr(clock, "milliseconds", timed)
    found = clock.graph_milliseconds(lambda: None)
    assert found["p50"] == pytest.approx(milliseconds + 0.006 / calls)


def test_only_gathers_are_compared_with_their_limit(capsys: pytest.CaptureFixture[str]) -> None:
    times = {name: {"p50": 1.0} for name in ("forward", "backward_weight: finish_weight")}
    timing.report("A", CASES["A"], {"our kernels, graph": times}, 1.0)
    limits = [line for line in capsys.readouterr().out.splitlines() if "limit" in line]
    assert [line.split()[0] for line in limits] == ["forward"]


def test_what_no_graph_captures_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(timing, "graph_milliseconds", refuse)
    error = {"error": "RuntimeError: operation not permitted"}
    assert timing.in_a_graph(lambda: None) == error
    found = {"error": "not timed", "errors": {"y": 1.0}}
    assert timing.ratio({"step, graph": error}, {}, "step, graph") is None
    timing.report("A", CASES["A"], {"peer": found, "all": error}, 1.0)


def test_a_peer_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layer: object) -> torch.nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(timing, "prepare", lambda case: (None, None, None))
    monkeypatch.setattr(timing, "wanted", lambda *_: {})
    found = timing.measure_case(CASES["A"], {"peer, fp32": fail}, True, float("inf"))
    assert found == {"peer, fp32": {"error": "OutOfMemoryError: out of memory"}}
    late = timing.measure_case(CASES["A"], {"peer, fp32": fail}, False, 0.0)
    assert late == {"peer, fp32": {"error": "TimeoutError: no time left"}}


LIMITS = Limits(132, 227 << 10, 228 << 10, 50 << 20)
WORK = Work(128, 784, 256, 4096, 65536, 4)


def test_every_kind_that_fits_is_swept() -> None:
    for kernel in KERNELS:
        plans = candidates(kernel, WORK, LIMITS)
        assert len(plans) == len(set(plans)) > 20
        assert all(plan.shared_bytes <= LIMITS.block_shared for plan in plans)
        assert all((plan.tile_groups > 0) == (kernel == "backward_weight") for plan in plans)
        wide = candidates(kernel, dataclasses.replace(WORK, gathered=65536), LIMITS)
        assert {plan.kind.shared for plan in wide} == {False}


class FakeProblem:
    """Kernels that take as many milliseconds as a block has warps, refuse 32 and fail with 4."""

    x = torch.zeros(1)

    def work(self, kernel: str) -> tuple[Work, Limits, TilePlan]:
        return WORK, LIMITS, next(p for p in candidates(kernel, WORK, LIMITS) if p.threads == 512)

    def launches(self, kernel: str, plan: TilePlan | None = None) -> tuple[list[Any], Any]:
        warps = 8 if plan is None else plan.threads // 32
        if warps == 32:
            raise RuntimeError("too many resources requested for launch")
        return [(kernel, lambda: float(warps))], torch.tensor([2.0 if warps == 4 else 1.0])


def test_the_sweep_takes_wrong_plans_for_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "graph_milliseconds", lambda run, **_: {"p50": run() or 8.0})
    subject = sweep.Subject("A", cast(Any, FakeProblem()), "forward")
    assert subject.summary() == {"error": "no time left"}
    sweep.sweep([subject], float("inf"))
    faults = {point["error"] for point in subject.points if "error" in point}
    assert faults == {
        "RuntimeError: too many resources requested for launch",
        "ArithmeticError: relative error 1.0e+00",
    }
    summary = subject.summary()
    assert summary["choice"]["kernel_ms"] == 16
    assert len(subject.points) == summary["plans"] > summary["timed"] > 0
    found = sweep.constants([subject], 1e6)
    assert found["backward_input"] == {}
    assert found["forward"] == found["all kernels"]
    sweep.report({"summary": {"A": summary, "B": {"error": "?"}}, "today": {}, "fit": found})


def test_the_widest_layer_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(make: object, case: Case) -> int:
        if case.in_features > 3000:
            raise torch.OutOfMemoryError
        return case.in_features**2

    monkeypatch.setattr(memory, "bytes_of_training", needed)
    found = memory.largest(memory.ours, 2000**2)
    assert 2000 - 2000 // 16 <= found["width"] <= 2000
    assert memory.largest(memory.ours, 10**9)["width"] <= 3000


def test_like_is_compared_with_like() -> None:
    ours = {"forward, eager": {"p50": 2.0}, "step, eager": {"p50": 4.0}}
    half = {"forward, eager": {"p50": 1.0}, "step, eager": {"p50": 1.0}}
    graph = {"forward, graph": {"p50": 1.0}, "step, graph": {"error": "no capture"}}
    peer = {"errors": {}, "forward, eager": {"p50": 6.0}, "step, eager": {"p50": 8.0}, **graph}
    found = {
        "ours, fp32": {**ours, **graph, "step, graph": {"p50": 1.0}}, "ours, bf16": half,
        "masked dense, tf32": dict(peer), "masked dense, bf16": dict(peer),
    }  # fmt: skip
    timing.compare(found)
    assert list(found["masked dense, tf32"]["times ours"].values()) == [3.0, 1.0, 2.0, None]
    assert list(found["masked dense, bf16"]["times ours"].values()) == [6.0, None, 8.0, None]


def test_a_real_run_knows_nothing_of_the_stub() -> None:
    mentions = [p.name for p in (ROOT / "bench" / "gpu").glob("*.py") if ".stub" in p.read_text()]
    assert mentions == ["__main__.py"]
    text = (ROOT / "bench" / "gpu" / "__main__.py").read_text()
    assert text.index("if options.dry_run:") < text.index("bench.gpu.stub")
    assert not any("stub" in word for stage in stages(["python"]) for word in stage.command)
