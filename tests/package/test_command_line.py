"""python -m dendrite_kernels: its commands, their arguments and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import dendrite_kernels as dk
from dendrite_kernels import __main__ as program
from dendrite_kernels.benchmark import command, comparison, peers
from dendrite_kernels.benchmark.peers import OFFICIAL, OURS, PEERS
from dendrite_kernels.benchmark.report import dense_from, winners
from tests.processes import run_python

NAMES = [OURS, OFFICIAL, "torch CSR by hand", "scipy CSR"]
SIZES = "--batch 9 --inputs 40 --somas 5 --dendrites 3 --synapses 4 --threads 1 --seconds 0.02"
needs_cpp = pytest.mark.skipif(
    not dk.backend_info()["cpp"]["available"], reason="the C++ backend is unavailable"
)


@pytest.fixture
def few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are quick to make; no process is started to measure memory."""
    few = {name: PEERS[name] for name in NAMES}
    for module in (command, comparison, peers):
        monkeypatch.setattr(module, "PEERS", few)
    monkeypatch.setattr(command, "available_bytes", lambda: 100_000)  # x fits, training does not


def _bench(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = program.main(["bench", *SIZES.split(), *options])
    return status, capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a user reads after a call that ends with 2."""
    with pytest.raises(SystemExit) as end:
        program.main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


@needs_cpp
@pytest.mark.usefixtures("few_peers")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bench_prints_json(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    status, printed = _bench(capsys, "--json", "--dtype", dtype)
    found: dict[str, Any] = json.loads(printed)
    assert status == 0
    assert found["refused"] == {}
    assert set(found["ms"]) == set(NAMES)
    assert (found["inputs"], found["synapses"], found["density"]) == (40, 60, 0.1)
    assert found["dtype"] == dtype
    assert 0 < max(found["relative_errors"].values()) < (1e-5 if dtype == "float32" else 1e-12)
    for mode, winner in found["winners"].items():
        medians = {name: times[mode]["p50"] for name, times in found["ms"].items() if mode in times}
        assert winner["name"] == min(medians, key=lambda name: medians[name])
        assert min(winner["ours"], winner["dense"], winner["other"]) == 1
    assert set(found["training"]) == {OURS, OFFICIAL}
    assert all(entry["estimated_mib"] > 0 for entry in found["training"].values())
    assert {"cpu", "versions", "date"} <= set(found["environment"])


@needs_cpp
@pytest.mark.usefixtures("few_peers")
def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = _bench(capsys, "--rule", "local", "--shape", "8x5")
    assert status == 0
    for text in (*NAMES, "fastest", "dense would win from", "MiB estimated", "local: 60 synapses"):
        assert text in printed


@needs_cpp
@pytest.mark.usefixtures("few_peers")
def test_bench_says_who_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "available_bytes", lambda: 5000)
    status, printed = _bench(capsys)
    assert status == 0
    assert f"skipped: {OFFICIAL}: needs about 0.0 of 0.0 GiB" in printed
    assert OURS in printed


@needs_cpp
@pytest.mark.usefixtures("few_peers")
def test_bench_does_not_wait_for_the_slowest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PATIENCE", 0.0)
    status, printed = _bench(capsys, "--json")
    found = json.loads(printed)
    assert status == 0
    assert (found["ms"], found["winners"]) == ({}, {})
    assert found["skipped"][OURS] == "forward took 0 s, more than 0"


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("can't allocate memory: no")])
def test_bench_ends_with_2_if_memory_runs_out(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> None:
        raise error

    monkeypatch.setattr(command, "_measure", measure)
    assert "Expected sizes that fit into memory, got" in _refused(capsys, "bench", *SIZES.split())


@needs_cpp
@pytest.mark.usefixtures("few_peers")
def test_bench_ends_with_1_if_a_result_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peers.Cpp.layer
    monkeypatch.setattr(peers.Cpp, "layer", lambda self, x: 1.001 * right(self, x))
    status, printed = _bench(capsys)
    assert status == 1
    assert f"refused: {OURS}: relative error" in printed


@needs_cpp
@pytest.mark.slow
def test_bench_as_a_user_calls_it() -> None:
    """All peers, training in processes of their own; nothing but JSON on standard output."""
    script = f"from dendrite_kernels.__main__ import main; main('bench --json {SIZES}'.split())"
    done = run_python(f"if __name__ == '__main__':\n    {script}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["ms"]) | set(found["skipped"]) == set(PEERS)
    for entry in found["training"].values():
        assert entry["step_seconds"] > 0
        assert entry["peak_mib"] > entry["growth_mib"] > 0


def test_winners_and_density() -> None:
    times = {
        OURS: {"forward": {"p50": 2.0}, "training": {"p50": 4.0}},
        OFFICIAL: {"forward": {"p50": 8.0}, "training": {"p50": 2.0}},
        "scipy CSR": {"forward": {"p50": 1.0}},
    }
    found = winners(times)
    assert found["forward"] == {"name": "scipy CSR", "ours": 2.0, "dense": 8.0, "other": 1.0}
    assert found["training"] == {"name": OFFICIAL, "ours": 2.0, "dense": 1.0, "other": None}
    assert dense_from(times, 0.1) == {"forward": 0.4, "training": 0.05}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("no-such-command", "invalid choice"),
        ("check --fast", "unrecognized arguments: --fast"),
        ("--fast", "unrecognized arguments: --fast"),
        ("bench --batch 0", "Expected a positive integer, got '0'"),
        ("bench --batch many", "Expected a positive integer, got 'many'"),
        ("bench --shape 28", "Expected HxW, such as 28x28, got '28'"),
        ("bench --inputs 10 --synapses 11", "Expected synapses <= 10, in_features, got 11"),
        ("bench --rule local", "Expected --shape HxW with --rule local, got none"),
        ("bench --shape 4x4 --inputs 15", "Expected --inputs 16, the pixels of --shape, got 15"),
        ("bench --dtype int8", "invalid choice: 'int8'"),
        ("bench --seconds nan", "Expected seconds > 0, got 'nan'"),
        ("bench --seconds inf", "Expected seconds > 0, got 'inf'"),
        ("bench --seconds -1", "Expected seconds > 0, got '-1'"),
        ("bench --threads 100000000000", "Expected at most 1024 threads, got 100000000000"),
        ("bench --batch 2000000000 --inputs 10000", "Expected sizes that fit into the "),
        ("bench --batch 2000000 --inputs 1 --somas 1000000 --dendrites 1 --synapses 1", "that fit"),
        ("bench --somas 65536 --dendrites 30000", "Expected sizes that fit into the "),
    ],
)
def test_bad_arguments_end_with_2(
    capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    threads = torch.get_num_threads()
    assert expected in _refused(capsys, *arguments.split())
    assert torch.get_num_threads() == threads


def test_a_reader_that_stops_is_no_error() -> None:
    """As with `... info | head -1`: the pipe has no reader any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-m", "dendrite_kernels", "info"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_needs_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert "got cuda" in _refused(capsys, "bench", "--device", "cuda")


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, texts in (
        ([], ["check", "info", "bench", "Without a command: check"]),
        (["bench"], ["--batch", "--inputs", "--somas", "--dendrites", "--synapses", "--rule",
                     "--shape", "--dtype", "--threads", "--device", "--seconds", "--json"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            program.main([*arguments, "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert all(text in printed for text in texts)


def test_info_names_versions_threads_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in ("processor: ", f"threads: {torch.get_num_threads()}", "CUDA devices: ", "numpy "):
        assert text in printed
    for name in dk.backend_info():
        assert f"{name}: " in printed
    assert "relative error" not in printed


@pytest.mark.parametrize("arguments", [[], ["check"]])
def test_check_is_the_default(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "check", lambda: 0)
    assert program.main(arguments) == 0
    assert "reference: available" in capsys.readouterr().out
    monkeypatch.setattr(program, "check", lambda: 3)
    assert program.main(arguments) == 1


def test_check_compares_with_float64(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = {"tiny": dk.connectivity.random(20, 3, 2, 4, seed=0)}
    monkeypatch.setattr("dendrite_kernels._check._networks", lambda: networks)
    assert program.check() == 0
    assert "All checks passed" in capsys.readouterr().out
    monkeypatch.setattr("dendrite_kernels._check._worst_error", lambda *_: 1.0)
    assert program.check() > 0
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "check"])
def test_output_that_is_closed_changes_no_exit_code(command: str) -> None:
    line = [sys.executable, "-m", "dendrite_kernels", command]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *line], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_cpp
def test_info_says_what_is_wrong_with_the_environment() -> None:
    line = [sys.executable, "-m", "dendrite_kernels", "info"]
    environment = {**os.environ, "DENDRITE_KERNELS_ISA": "nonsense"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: DENDRITE_KERNELS_ISA: Expected one of base, ")
    assert error.endswith("got nonsense")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        program.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{dk.__version__}\n")
