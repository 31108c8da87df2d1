"""docs/slurm.sh, with stand-ins for the cluster's programs: what is launched, and the requeue."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm.sh"
STAND_INS = {
    # So many nodes that whoever reads only the first line leaves the rest in a broken pipe.
    "scontrol": 'if [ "$1" = show ]; then seq -f node%.0f 1 100000; else echo "$@" > requeued; fi',
    "srun": 'shift\nexport SLURM_NODEID=1\nexec "$@"',
    # Like training: ends a moment after SIGTERM.
    "accelerate": 'echo "$@" > launched\ntrap "sleep 0.2; exit 130" TERM\n'
    "for _ in $(seq ${SECONDS_TO_RUN}0); do sleep 0.1; done\nexit $CODE",
}


@pytest.fixture
def submit(tmp_path):
    """Start the script as a job, by default of two nodes with four GPUs each."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)

    def start(*words, seconds=0, code=0, nodes=2, gpus=4) -> subprocess.Popen:
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]",
               "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus),
               "SECONDS_TO_RUN": str(seconds), "CODE": str(code),
               "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
        return subprocess.Popen(["bash", SCRIPT, *words], cwd=tmp_path, env={**os.environ, **job})

    return start


def test_one_launcher_per_node_with_all_processes(submit, tmp_path):
    assert submit("salicon", "--set", "epochs=4").wait(60) == 0
    assert (tmp_path / "launched").read_text().split() == [
        *("launch", "--multi_gpu", "--num_machines", "2", "--machine_rank", "1"),
        *("--main_process_ip", "node1", "--main_process_port", "32345", "--num_processes", "8"),
        *("-m", "mlnet_utils", "train", "--preset", "salicon", "--set", "epochs=4"),
    ]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("nodes", "gpus", "several"), [(1, 1, 0), (2, 1, 1), (1, 2, 1)])
def test_only_several_processes_are_multi_gpu(submit, tmp_path, nodes, gpus, several):
    # "You need to use at least 2 processes to use `--multi_gpu`", accelerate says.
    assert submit("salicon", nodes=nodes, gpus=gpus).wait(60) == 0
    words = (tmp_path / "launched").read_text().split()
    assert words.count("--multi_gpu") == several
    assert words[words.index("--num_processes") + 1] == str(nodes * gpus)


def test_a_failure_is_the_job_s(submit, tmp_path):
    assert submit("salicon", code=3).wait(60) == 3
    assert not (tmp_path / "requeued").exists()
    assert submit().wait(60) != 0  # no preset


def test_before_the_time_limit_the_job_saves_and_queues_again(submit, tmp_path):
    job = submit("salicon", seconds=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "launched").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # for the stand-in to set its trap
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "12345"]
