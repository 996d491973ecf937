"""The launcher: what it sets and what it leaves, and that it says what is wrong."""

import os
import pathlib
import subprocess
import sys

import pytest

from tfpar import exchange, launch

GPUS = ["NVIDIA H100, 570.1"] * 4
SET = " ".join(launch.FLAGS)


@pytest.mark.fast
def test_settings(tmp_path):
    found = launch.settings(GPUS, {"XDG_CACHE_HOME": str(tmp_path)}, 2, True)
    folder = found["TF_XLA_FLAGS"].split()[0].partition("=")[2]
    assert pathlib.Path(folder).is_dir() and folder.startswith(str(tmp_path))
    assert found["XLA_FLAGS"] == SET and found["TF_NUM_INTEROP_THREADS"] == "6"


def test_what_the_user_has_set_stays(tmp_path):
    own = {
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=FUSION --xla_gpu_enable_latency_hiding_scheduler=false "
        "--xla_gpu_enable_analytical_sol_latency_estimator=true --xla_gpu_enable_triton_gemm=true "
        "--xla_gpu_nccl_termination_timeout_seconds=60",
        "TF_NUM_INTEROP_THREADS": "3",
        "TF_XLA_FLAGS": "--tf_xla_persistent_cache_directory=mine",
    }  # fmt: skip
    assert launch.settings(GPUS, own, 2, True) == {}
    longer = launch.settings(GPUS, {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm_int4=false"}, 64, False)
    assert longer["XLA_FLAGS"].endswith(SET)
    found = launch.settings(GPUS, {"XLA_FLAGS": "--a", "XDG_CACHE_HOME": str(tmp_path)}, 64, False)
    assert found == {"XLA_FLAGS": f"--a {SET}"}


@pytest.mark.fast
def test_programs_of_other_gpus_and_flags_are_kept_apart(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    kinds = [(GPUS, {}), (GPUS[:2], {}), (["NVIDIA H200, 570.1"] * 4, {}), (GPUS, {"XLA_FLAGS": "--b"})]
    found = {launch.settings(gpus, {**environment, **more}, 64, True)["TF_XLA_FLAGS"] for gpus, more in kinds}
    assert len(found) == 4


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with two GPUs, as far as nvidia-smi says."""
    script = '#!/bin/sh\ncase "$1" in *query*) printf "NVIDIA H100, 570\\nNVIDIA H100, 570\\n";; *) echo links;; esac\n'
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_run_says_what_it_sets_and_runs_the_script(host):
    script = host / "train.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.environ['XLA_FLAGS'])")
    command = [sys.executable, "-m", "tfpar", "run", str(script), "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"['--epochs', '3'] {SET}\n"
    assert f"tfpar: XLA_FLAGS={SET}\n" in done.stderr


def test_run_without_gpus(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("print('trained')")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [sys.executable, "-m", "tfpar", "run", str(tmp_path / "train.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "trained\n" and "no GPU was found" in done.stderr


@pytest.mark.parametrize(
    "code, said",
    [
        ("", "ok"),
        ("import time; time.sleep(60)", "no answer within 2 s: the devices wait for each other"),
        ("raise RuntimeError('NCCL is broken')", "failed: RuntimeError: NCCL is broken"),
    ],
)
def test_check_says_what_is_broken(host, monkeypatch, capsys, code, said):
    original = launch.tried
    monkeypatch.setattr(launch, "tried", lambda command, timeout: original([sys.executable, "-c", code], timeout))
    assert launch.check(2.0) is (said == "ok")
    told = capsys.readouterr().out
    assert f"tensors over all GPUs: {said}\n" in told and "GPU NVIDIA H100" in told and "in pairs" not in told


def test_exchange():
    """On logical CPUs; collectives are TensorFlow's own there."""
    exchange.main("both")


def test_exchange_finds_what_is_wrong(monkeypatch):
    original = exchange.weights
    monkeypatch.setattr(exchange, "weights", lambda s, n: [w + (s is not None) for w in original(s, n)])
    with pytest.raises(ValueError, match="between programs: weights are 1"):
        exchange.main("data")
