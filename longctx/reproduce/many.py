"""Many experiments, their parts measured by several processes that share the device."""

import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from longctx.errors import UserError
from longctx.reproduce.experiment import Study, Whole
from longctx.reproduce.part import Part, measured, run_name
from longctx.reproduce.speed import timed

type Task = tuple[Study, int]  # a study and the number of one of its parts


def reproduce(
    files: Sequence[Path], scale: str, out: Path, jobs: int = 1, gpus: int = 1
) -> list[Path]:
    """Measure experiments; write results.jsonl, table.md and figure.png of each.

    What was measured before into `out` is kept: an interrupted call goes on where it stopped. With
    several `jobs` so many processes share the device, or the first `gpus` in turn, and some train
    while others compile; speeds are measured later, one at a time; experiments that are not divided
    come last, in this process.

    Returns:
      The folders of the results, `out/<paper>/<experiment>/<scale>`.

    Raises:
      ValueError: a file is not an experiment, or it refuses the scale.
      UserError: some parts failed; all others are written down.
    """
    studies = [Study(file, scale, out) for file in files]
    tasks = [(study, n) for study in studies for n in range(len(study.parts))]
    # Parts that wait for another run would only keep a process waiting.
    tasks.sort(key=lambda task: _part(task).after is not None)
    timings = [task for task in tasks if _part(task).timed]
    steps = Counter(study.name for study, _ in tasks + timings)
    waiting = {study.name: study for study in studies}
    failed: list[str] = []
    try:
        with _workers(jobs, gpus) as each:
            for step, todo in ((_measure, tasks), (_time, timings)):
                for study, error in each(step, todo):
                    failed += error
                    study.collect()
                    steps[study.name] -= not error
                    if not steps[study.name]:
                        waiting.pop(study.name).show()
        for study in studies:
            if isinstance(study.experiment, Whole):
                study.measure()
                waiting.pop(study.name).show()
    finally:
        for study in waiting.values():
            _show_unfinished(study)
    if failed:
        raise UserError(f"{len(failed)} parts failed: {'; '.join(failed)}")
    return [study.folder for study in studies]


def _show_unfinished(study: Study) -> None:
    """What there is of a study that was interrupted, or of which parts failed."""
    if not study.results.exists() or not study.results.stat().st_size:
        return
    try:
        study.show()
    except (LookupError, ValueError) as error:  # the base of all comparisons, for instance
        print(f"{study.name}: too little was measured for a table, {error!r} is missing")


def _part(task: Task) -> Part:
    study, number = task
    return study.parts[number]


type Step = Callable[[Path, str, Path, int], None]
type Each = Callable[[Step, Sequence[Task]], Iterator[tuple[Study, list[str]]]]


@contextlib.contextmanager
def _workers(jobs: int, gpus: int) -> Iterator[Each]:
    """What takes a step for each task, in several processes or (of one job) in this one.

    It yields the study of each task when it is done, and how it failed. In this process a failure
    is raised at once instead.
    """
    if jobs == 1:
        yield _in_turn
        return
    # Otherwise the first process would take most of the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _take_gpu, (context.Value("i", 0), gpus))
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process stays behind
    try:
        yield functools.partial(_at_once, pool)
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, former)


def _take_gpu(started: "Synchronized[int]", gpus: int) -> None:
    """Keep a new process to one of the first GPUs that it may use, the next in turn.

    By CUDA's own variable: kernels fail where the process sees other GPUs than JAX.
    """
    with started:
        number, started.value = started.value, started.value + 1
    if gpus > 1:
        usable = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        found = usable.split(",") if usable else [str(n) for n in range(gpus)]
        if len(found) < gpus:
            raise UserError(f"gpus={gpus} must be at most {len(found)}, which CUDA may use")
        os.environ["CUDA_VISIBLE_DEVICES"] = found[number % gpus]


def _in_turn(step: Step, tasks: Sequence[Task]) -> Iterator[tuple[Study, list[str]]]:
    for study, number in tasks:
        step(study.file, study.scale, study.out, number)
        yield study, []


def _at_once(
    pool: ProcessPoolExecutor, step: Step, tasks: Sequence[Task]
) -> Iterator[tuple[Study, list[str]]]:
    began = time.perf_counter()
    futures = {
        pool.submit(_quietly, step, study.file, study.scale, study.out, n): (study, n)
        for study, n in tasks
    }
    for count, future in enumerate(as_completed(futures), start=1):
        task = futures[future]
        what, error = f"{task[0].name}, {_part(task).name}", future.exception()
        seconds = f"{time.perf_counter() - began:.0f} s"
        outcome = "" if error is None else f": {error!r}"
        print(f"{count}/{len(futures)} after {seconds}: {what}{outcome}", flush=True)
        yield task[0], [] if error is None else [f"{what}: {error}"]


def _quietly(step: Step, file: Path, scale: str, out: Path, number: int) -> None:
    """Take a step whose output goes to the run's log.txt."""
    study = _study(file, scale, out)
    log = study.runs / run_name(study.parts[number].config) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        step(file, scale, out, number)


_study = functools.cache(Study)  # a process reads an experiment file once


def _measure(file: Path, scale: str, out: Path, number: int) -> None:
    study = _study(file, scale, out)
    measured(study.parts[number], study.name, study.runs)


def _time(file: Path, scale: str, out: Path, number: int) -> None:
    study = _study(file, scale, out)
    timed(study.parts[number], study.runs)
