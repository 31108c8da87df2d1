"""Run many jobs: one after another, in processes of their own, or on a cluster.

Each way yields every job with its error, ``""`` for none, as they end: whatever ends one job, the
others go on. Closed before its end, it begins nothing new. What a job does is not known here.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from mlnet_utils.runtime import cpu_count

GRACE_SECONDS = 10  # for processes that stop by themselves, as they do after a terminal's Ctrl-C

Job = TypeVar("Job")
Run = Callable[[Job], Any]
Outcomes = Iterator[tuple[Job, str]]


def attempt(call: Callable[..., Any], *arguments: Any) -> str:
    """Call it; returns the error, or ``""``."""
    try:
        call(*arguments)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def one_by_one(run: Run, jobs: Sequence[Job]) -> Outcomes:
    """Run jobs in this process."""
    for job in jobs:
        yield job, attempt(run, job)


def in_processes(run: Run, jobs: Sequence[Job], workers: int) -> Outcomes:
    """Run so many jobs at a time, each in a new process: one that is killed takes no other along.

    Closed before its end, it lets what runs save and stop.
    """
    # Inherited by the processes, which start afresh, and by their notebooks' kernels.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // workers)))
    context = multiprocessing.get_context("spawn")
    waiting, running = iter(jobs), {}
    try:
        while True:
            for job in itertools.islice(waiting, workers - len(running)):
                answer, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_report, args=(run, job, theirs))
                process.start()
                theirs.close()  # only the process holds it now: `answer` ends when the process does
                running[answer] = job, process
            if not running:
                return
            for answer in connection.wait(running):
                job, process = running.pop(answer)
                try:
                    error = answer.recv()
                except EOFError:
                    process.join()
                    error = (
                        f"its process was killed (exit code {process.exitcode}); if memory ran "
                        "out, use fewer workers. The same command continues"
                    )
                process.join()
                yield job, error
    finally:
        for _, process in running.values():
            process.join(GRACE_SECONDS)
            process.terminate()  # training notes it, saves and stops
            process.join()


def _report(run: Run, job: Job, answer: connection.Connection) -> None:
    """What a process of its own does: run the job and answer with its error."""
    try:
        error = attempt(run, job)
    except KeyboardInterrupt as stop:
        error = str(stop) or "it was interrupted"
    answer.send(error)


def on_cluster(
    run: Run, jobs: Sequence[Job], folder: Path, cluster: str, options: Mapping[str, Any]
) -> Outcomes:
    """Submit jobs through submitit, as one array; closed before its end, they stay in the queue.

    Raises:
        ModuleNotFoundError: the extra ``cluster`` is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sweeps on a cluster need submitit: pip install 'mlnet-utils[cluster]'"
        ) from error
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(name="mlnet-sweep", **options)
    submitted = executor.map_array(run, jobs) if jobs else []
    for job, one in zip(jobs, submitted, strict=True):
        yield job, attempt(one.result)
