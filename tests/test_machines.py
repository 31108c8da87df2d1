"""Two "machines" on one: network namespaces that see each other over a virtual cable only.

Needs Linux, root and iproute2; skips with the reason where namespaces cannot be made.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import prepare_run

from mlnet_utils import runtime
from mlnet_utils.model.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

PATIENCE = 600  # seconds, for a machine that does other things
ADDRESSES = ("10.213.77.1", "10.213.77.2")
# The same mathematics whatever the share of each process: see test_distributed.py.
DIVISIBLE = {"preset": "tiny", "height": 32, "width": 40, "prior_cells": [2, 2], "limit": 0,
             "dropout": 0.0, "freeze_norm": True, "optimizer": "sgd", "lr": 0.02,
             "batch_size": 4}  # fmt: skip


def ip(*words: str) -> str:
    """iproute2; raises CalledProcessError with what it says."""
    command = ["ip", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def machines():
    """Two namespaces, each with one end of a cable: (names, names of the ends)."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2's ip")
    names = [f"mlnet-test-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"mln{os.getpid() % 10**7}{side}" for side in "ab"]  # at most 15 characters
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth",
               "peer", "name", ends[1], "netns", names[1])  # fmt: skip
            for name, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/30", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", names[0], "true")
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces cannot be made here: {said.strip()}")
        yield names, ends
    finally:
        for name in names:  # the cable goes with its ends
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                for process in ip("netns", "pids", name).split():  # of launchers that were killed
                    os.kill(int(process), signal.SIGKILL)
                ip("netns", "del", name)


def received(name: str, end: str) -> int:
    """Bytes that came over the cable."""
    return int(ip("netns", "exec", name, "cat", f"/sys/class/net/{end}/statistics/rx_bytes"))


def start(command: list[str], interface: str) -> subprocess.Popen:
    root = Path(runtime.__file__).parent.parent
    environment = {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true",
                   "GLOO_SOCKET_IFNAME": interface}  # fmt: skip
    settings = {"text": True, "env": {**os.environ, **environment}, "cwd": root}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)


def finish(jobs: list[subprocess.Popen]) -> list[str]:
    """What the jobs printed; none outlives this call."""
    try:
        texts = [job.communicate(timeout=PATIENCE)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), texts
    return texts


def test_two_machines_train_to_the_weights_of_one(machines, tmp_path, tiny_photos):
    names, ends = machines
    preset = tmp_path / "small.yaml"
    preset.write_text(yaml.safe_dump(DIVISIBLE))
    folders = [prepare_run(tmp_path / kind, *tiny_photos) for kind in ("one", "two")]
    train = ["-m", "mlnet_utils", "train", "--preset", str(preset), "--run-dir"]
    finish([start([sys.executable, *train, str(folders[0])], "lo")])

    before = [received(name, end) for name, end in zip(names, ends, strict=True)]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                f"--master_addr={ADDRESSES[0]}", "--master_port=29511"]  # fmt: skip
    nodes = []
    for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
        inside = ["ip", "netns", "exec", name, sys.executable, *launcher, f"--node_rank={rank}"]
        nodes.append(start([*inside, *train, str(folders[1])], end))
    texts = finish(nodes)
    assert [text.count("trained 2 epochs") for text in texts] == [1, 0]

    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in folders)
    assert one["progress"]["updates"] == two["progress"]["updates"] == 6
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=1e-5, msg=key)
    # Every update's gradients went over the cable, both ways.
    gradients = 4 * sum(v.numel() for k, v in one["model"].items() if k.endswith("weight"))
    for name, end, earlier in zip(names, ends, before, strict=True):
        assert received(name, end) - earlier > 6 * 0.8 * gradients
