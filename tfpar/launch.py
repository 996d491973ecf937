"""What must be set before TensorFlow starts, and whether the GPUs of this host can exchange tensors."""

import hashlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

FLAGS = (  # of XLA
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_analytical_sol_latency_estimator=false",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_nccl_termination_timeout_seconds=600",
)
CACHE = "--tf_xla_persistent_cache_directory={} --tf_xla_persistent_cache_device_types=GPU"
PARTS = {  # of the check: the shape of the mesh, by how many GPUs it takes at least
    "tensors over all GPUs": (2, "tensor"),
    "gradients over all GPUs": (2, "data"),
    "both, in pairs": (4, "both"),
}


def run(script: str, arguments: Sequence[str] = (), cache: bool = True):
    """Run a script with the settings of `settings`, in place of this process.

    Args:
        script: a Python file.
        arguments: its own.
        cache: whether compiled programs are kept for the next start.
    """
    gpus, changes = query("name,driver_version"), {}
    if gpus:
        changes = settings(gpus, os.environ, threads(), cache)
    for name, value in changes.items():
        print(f"tfpar: {name}={value}", file=sys.stderr)
    if not gpus:
        print("tfpar: no GPU was found by nvidia-smi; nothing is set", file=sys.stderr)
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, script, *arguments], {**os.environ, **changes})


def settings(gpus: Sequence[str], environment: Mapping[str, str], cores: int, cache: bool) -> dict[str, str]:
    """The variables of the environment to set; what the user has set stays.

    - Compiled programs are kept in a folder for this TensorFlow, these GPUs, their driver and these flags.
    - No command buffers of XLA: programs whose arguments move, as with micro-batches, would write them anew.
    - XLA's scheduler that looks for work to do while tensors are exchanged, by its estimates that begin those early.
    - Products of matrices by cuBLAS: XLA would compile and try many kernels of Triton for each of them.
    - The process ends, and says so, when programs have waited for ten minutes for one that failed on its GPU.
    - A thread for each program that waits for others, if there are fewer cores.

    Args:
        gpus: the name and the driver of each.
        environment: as it is.
        cores: that this process may use.
        cache: whether to keep compiled programs.
    """
    found = {}
    flags = environment.get("XLA_FLAGS", "")
    names = {flag.partition("=")[0] for flag in flags.split()}
    missing = [flag for flag in FLAGS if flag.partition("=")[0] not in names]
    if missing:
        found["XLA_FLAGS"] = flags = " ".join([*flags.split(), *missing])
    bridge = environment.get("TF_XLA_FLAGS", "")
    if cache and "persistent_cache" not in bridge:
        versions = [metadata.version(name) for name in ("tensorflow", "keras")]
        key = hashlib.sha256("\n".join([*versions, *gpus, flags, bridge]).encode()).hexdigest()[:16]
        home = pathlib.Path(environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        folder = home / "tfpar" / "programs" / key
        folder.mkdir(parents=True, exist_ok=True)
        found["TF_XLA_FLAGS"] = f"{bridge} {CACHE.format(folder)}".strip()
    if cores < len(gpus) + 2 and "TF_NUM_INTEROP_THREADS" not in environment:
        found["TF_NUM_INTEROP_THREADS"] = str(len(gpus) + 2)
    return found


def threads() -> int:
    """The cores that this process may use, of each of which TensorFlow makes a thread."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def query(what: str) -> list[str]:
    """What nvidia-smi says of each GPU; nothing without it."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def check(timeout: float = 120.0) -> bool:
    """Print the GPUs and their links, and run each collective once, in processes of their own.

    Args:
        timeout: seconds for each part.

    Returns:
        Whether all went well.
    """
    gpus = query("index,name,memory.total,driver_version")
    print("\n".join(f"GPU {line}" for line in gpus) or "no GPU was found by nvidia-smi")
    try:
        links = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60).stdout
        print(links.split("Legend")[0].strip())
    except (OSError, subprocess.TimeoutExpired):
        pass
    fine = True
    for name, (least, kind) in PARTS.items():
        if len(gpus) >= least:
            result = tried([sys.executable, "-m", "tfpar.exchange", kind], timeout)
            fine &= result == "ok"
            print(f"{name}: {result}", flush=True)
    return fine


def tried(command: Sequence[str], timeout: float) -> str:
    """`ok`, or what is wrong with a process."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s: the devices wait for each other"
    if done.returncode == 0:
        return "ok"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    wrong = [line for line in lines if "Error" in line or "Check failed" in line] or lines or [str(done.returncode)]
    return f"failed: {wrong[-1].strip()}"
