"""The benchmark runner: what it times agrees with the oracle, what does not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dendrite_kernels as dk
from bench.questions import crossover
from bench.speed import cases, roofline, run
from bench.speed.kernels import KERNELS, Kernels
from dendrite_kernels.benchmark import case, peer, peers
from dendrite_kernels.benchmark.case import Case
from dendrite_kernels.benchmark.comparison import Comparison
from dendrite_kernels.benchmark.oracle import PARAMETERS, oracle
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS, PEERS
from dendrite_kernels.benchmark.problem import TOLERANCE, Problem, largest_error
from dendrite_kernels.benchmark.timing import Task, interleave, ratio

TINY = Case("T", 9, 6, 5, 2, 7, 3, 4)
COMPILED = ("embedding_bag, compiled", "gather, compiled")
KINDS = list(case.KINDS)


@pytest.fixture(params=KINDS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem.draw(TINY.connectivity(request.param), TINY.batch)


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, TINY.name, TINY)


def _skip_unless_possible(name: str, problem: Problem) -> None:
    reason = peers.reason_to_skip(name, problem)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def _check(name: str, problem: Problem) -> None:
    expected = oracle(problem, gradients=True)
    peer = PEERS[name](problem)
    for mode in peer.modes:
        with peer.surroundings():
            results = peer.results(mode)
        wanted = {"y"} if mode == "forward" else {"y", *PARAMETERS}
        assert set(results) == wanted | ({"x"} if mode == "training with dx" else set())
        found = {key: value for key, value in results.items() if value is not None}
        assert len(found) == len(results)
        assert largest_error(found, expected) <= TOLERANCE, (name, mode)


@pytest.mark.parametrize("name", [name for name in PEERS if name not in COMPILED])
def test_peers_agree_with_the_oracle(name: str, problem: Problem) -> None:
    _skip_unless_possible(name, problem)
    _check(name, problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_peers_agree_with_the_oracle(name: str, problem: Problem) -> None:
    _skip_unless_possible(name, problem)
    torch.compiler.reset()
    _check(name, problem)


@pytest.mark.parametrize("backend", ["cpp", "numba"])
def test_kernels_agree_with_the_oracle(backend: str, problem: Problem) -> None:
    _skip_unless_possible(f"dendrite_kernels {backend}", problem)
    expected, kernels = oracle(problem, gradients=True), Kernels(backend, problem)
    for kernel in KERNELS:
        assert largest_error(kernels.results(kernel), expected) <= TOLERANCE


def test_oracle_is_the_reference(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soma by soma, a few synapses at a time."""
    monkeypatch.setattr("dendrite_kernels.benchmark.oracle._CHUNK", 1)
    monkeypatch.setattr("dendrite_kernels.benchmark.oracle._SYNAPSES", 5)
    found, p = oracle(problem, gradients=True), problem
    inputs: dict[str, Any] = {
        name: t.double().requires_grad_() for name, t in {"x": p.x, **p.parameters}.items()
    }
    y = dk.reference.dendritic_layer(
        connectivity=p.connectivity, negative_slope=p.negative_slope, **inputs
    )
    gradients = torch.autograd.grad(y, list(inputs.values()), p.grad.double())
    expected = {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}
    assert set(found) == set(expected)
    assert largest_error(found, expected) < 1e-14
    assert largest_error(oracle(problem), expected) < 1e-14


def test_dendrites_of_a_problem_are_exact_and_never_at_the_kink(problem: Problem) -> None:
    p = problem
    u = dk.reference.sparse_linear(p.x, p.synapse_weight, p.dendrite_bias, p.connectivity)
    exact = dk.reference.sparse_linear(
        p.x.double(), p.synapse_weight.double(), p.dendrite_bias.double(), p.connectivity
    )
    assert torch.equal(u.double(), exact)
    assert exact.abs().min() > 0


class _Wrong(peers.Cpp):
    """Right forward, one wrong gradient."""

    def gradients(self) -> dict[str, Tensor | None]:
        found = super().gradients()
        cable = found["cable_weight"]
        assert cable is not None
        return {**found, "cable_weight": cable * 1.001}


class _Failing(peers.Cpp):
    def layer(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such instruction\nat all")


def _run(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    fixed = ["--cases", "T", "--threads", "1", "--seconds", "0.02", "--output", str(path)]
    status = run.main([*fixed, *options])
    return status, json.loads(path.read_text())


@pytest.mark.usefixtures("tiny_case")
def test_run_writes_what_a_figure_must_be_published_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _skip_unless_possible(OURS, Problem.draw(TINY.connectivity("constant"), 1))
    names = [OURS, OFFICIAL, "torch CSR by hand", "scipy CSR"]
    status, report = _run(tmp_path / "run.json", "--kinds", *KINDS, "--peers", *names)
    assert status == 0
    assert {"cpu", "versions", "commit", "date"} <= set(report["environment"])
    assert report["backends"]["cpp"]["available"]
    assert [c["kind"] for c in report["configurations"]] == KINDS
    for configuration in report["configurations"]:
        assert configuration["refused"] == {}
        assert set(configuration["ms"]) == set(names)
        assert 0 <= configuration["relative_errors"][OURS] <= TOLERANCE
        for mode in peer.MODES:
            p20, p50, p80, samples = configuration["ms"][OURS][mode]
            assert 0 < p20 <= p50 <= p80
            assert samples >= 1
            ratio = configuration["ratios"][mode]
            assert ratio["official"] >= ratio["best_peer"] > 0
        assert set(configuration["ms"]["scipy CSR"]) == {"forward"}
        assert set(configuration["kernels_ms"]["cpp kernels"]) == set(KERNELS)
        assert set(configuration["step_ms"]) == {OURS, OFFICIAL}
    printed = capsys.readouterr().out
    assert "masked dense, official / cpp" in printed
    assert "roofline" in printed


@pytest.mark.usefixtures("tiny_case")
@pytest.mark.parametrize(
    ("wrong", "reason"), [(_Wrong, "relative error"), (_Failing, "RuntimeError: no such")]
)
def test_run_refuses_a_wrong_peer(
    wrong: type[peer.Peer],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _skip_unless_possible(OURS, Problem.draw(TINY.connectivity("constant"), 1))
    monkeypatch.setitem(PEERS, "torch CSR by hand", wrong)
    names = ["torch CSR by hand", "embedding_bag"]
    status, report = _run(tmp_path / "run.json", "--peers", *names)
    assert status == 1
    (configuration,) = report["configurations"]
    assert reason in configuration["refused"]["torch CSR by hand"]
    assert set(configuration["ms"]) == {"embedding_bag"}
    assert "refused: torch CSR by hand" in capsys.readouterr().out


def test_run_says_which_cases_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--cases", "Z"])
    assert "got 'Z'" in capsys.readouterr().err
    assert [case.name for case in cases.find(["E", "A", "E1"])] == ["E1", "E16", "A"]


def test_a_peer_too_large_for_the_machine_is_skipped(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "available_bytes", lambda: 1000)
    assert "GiB" in str(peers.reason_to_skip(OFFICIAL, problem))


def test_every_task_gets_samples() -> None:
    calls: list[str] = []
    tasks = [Task(lambda name=name: calls.append(name)) for name in "ab"]  # type: ignore[misc]
    interleave(tasks, seconds=0.0)
    assert all(len(task.samples) >= 3 for task in tasks)
    assert calls.count("a") >= len(tasks[0].samples)


def test_what_is_slow_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dendrite_kernels.benchmark.timing.SLOW", -1.0)
    calls: list[int] = []
    task = Task(lambda: calls.append(0))
    interleave([task], seconds=0.0)
    assert len(calls) == len(task.samples) == 1


class _Machine:
    """A clock, and a machine that becomes 1.5 times as slow at some second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow_from: float) -> None:
        self.seconds, self.slow_from = 0.0, slow_from
        monkeypatch.setattr("dendrite_kernels.benchmark.timing.time.perf_counter", self.clock)

    def clock(self) -> float:
        return self.seconds

    @property
    def slowness(self) -> float:
        return 1.5 if self.seconds >= self.slow_from else 1.0

    def works(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.seconds += seconds * self.slowness

        return run


def test_ratios_are_of_turns_at_the_same_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow task has a sample in three of ten rounds, at the speed that the machine then has."""
    medians = []
    for slow_from in np.arange(0, 12, 0.25):
        machine = _Machine(monkeypatch, float(slow_from))
        quick, slow = Task(machine.works(0.004)), Task(machine.works(1.2))
        interleave([quick, slow], 8)
        assert ratio(slow, quick) == pytest.approx(300, rel=0.01)
        assert ratio(quick, slow) == pytest.approx(1 / 300, rel=0.01)
        medians.append(np.median(slow.samples) / np.median(quick.samples))
    assert max(medians) == pytest.approx(450)  # medians of all samples would not do


def test_ratio_takes_the_nearest_turns() -> None:
    a, b = Task(int), Task(int)
    a.turns = {0: [1.0], 1: [2.0, 2.0, 9.0], 2: [4.0], 3: [8.0], 9: [1.0]}
    b.turns = {-1: [2.0], 4: [4.0], 9: [3.0]}
    assert ratio(a, b) == pytest.approx(0.5)  # of 1 / 2, 8 / 4 and 1 / 3
    assert ratio(b, a) == pytest.approx(2.0)


def test_kernels_are_compared_with_the_roof_of_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel at 80 % of the roof and 90 % of L2, while the machine changes its speed."""
    machine = _Machine(monkeypatch, slow_from=12)

    def measured(*_: object) -> roofline.Roof:
        rate = 100.0 / machine.slowness
        machine.seconds += 0.06
        return roofline.Roof({16: rate}, {16: 0.9 * rate}, 8 / 9 * rate)

    monkeypatch.setattr(roofline, "measure", measured)
    roof, kernel = roofline.RoofTask(1, 1, 1), Task(machine.works(0.4 / 80))
    other = Task(machine.works(0.5))
    interleave([roof, kernel, other], 21)
    assert len(roof.turns) == 10
    assert roof.fraction(kernel, 0.4) == pytest.approx(0.8, rel=0.02)
    assert roof.fraction_of_l2(kernel, 0.4) == pytest.approx(0.9, rel=0.02)


def test_a_configuration_is_divided_turn_by_turn(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, the second at half the speed."""
    comparison = Comparison(problem, {})

    def timed(group: str, name: str, mode: str, turns: dict[int, list[float]]) -> None:
        comparison.tasks[group, name, mode] = Task(int, turns=turns)

    timed("peers", OURS, "forward", {0: [1.0, 1.0, 1.0], 1: [2.0]})
    timed("peers", OFFICIAL, "forward", {1: [60.0]})
    timed("peers", "embedding_bag", "forward", {0: [3.0], 1: [6.0, 6.0, 6.0]})
    timed("kernels", "cpp kernels", "forward", {0: [0.005], 1: [0.01, 0.01, 0.01]})
    timed("kernels", "cpp kernels", "backward", {0: [0.016], 1: [0.032]})
    timed("kernels", run.BF16, "forward", {0: [0.001]})
    found = run._ratios(comparison)["forward"]
    assert found["of"] == OURS
    assert found["all"] == {OFFICIAL: 30.0, "embedding_bag": 3.0}
    assert (found["official"], found["best_peer"]) == (30.0, 3.0)
    monkeypatch.setattr(roofline, "measure", lambda *_: roofline.Roof({8: 100.0}, {8: 9.0}, 50.0))
    roof = roofline.RoofTask(1, 1, 1)
    roof.turns = {0: [1 / 100], 1: [1 / 50]}
    (reached,) = run._fractions(roof, comparison, gflop=0.4)["reached"].values()
    assert reached["forward_fraction"] == pytest.approx(0.8)
    assert reached["backward_fraction"] == pytest.approx(0.5)
    assert reached["backward_fraction_of_l2"] == pytest.approx(1.0)
    assert reached["forward_gflops"] == pytest.approx(40)


def test_crossover_is_interpolated() -> None:
    assert crossover.crossover([0.01, 0.1, 0.2], [8.0, 4.0, 0.25]) == pytest.approx(
        0.1 * 2**0.5, rel=1e-9
    )
    assert crossover.crossover([0.01, 0.1], [8.0, 4.0]) is None
    assert crossover.crossover([0.01, 0.1], [0.9, 0.5]) == 0.0


def test_crossover_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _skip_unless_possible(OURS, Problem.draw(TINY.connectivity("constant"), 1))
    path = tmp_path / "crossover.json"
    sizes = ["--inputs", "40", "--somas", "3", "--batch", "5", "--densities", "0.1", "0.5"]
    rest = ["--threads", "1", "--seconds", "0.02", "--output", str(path)]
    assert crossover.main([*sizes, *rest]) == 0
    (sweep,) = json.loads(path.read_text())["sweeps"]
    assert [point["synapses"] for point in sweep["points"]] == [4, 20]
    assert set(sweep["crossovers"][OFFICIAL]) == set(peer.MODES)
    assert "density" in capsys.readouterr().out


def test_roofline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MILLISECONDS", 1)
    try:
        roof = roofline.measure(inputs=100, synapses=2000, threads=2)
    except roofline.Unavailable as error:
        pytest.skip(str(error))
    assert roof.gflops == max(*roof.one_by_one.values(), *roof.interleaved.values()) > 0
    assert roof.l2 > 0
    faster = roofline.Roof(roof.one_by_one, dict.fromkeys(roof.interleaved, 1e6), roof.l2 + 1)
    assert roofline.Roof.of([roof, faster, faster]) == faster
    with pytest.raises(roofline.Unavailable, match="65536"):
        roofline.measure(inputs=70000, synapses=1, threads=1)
