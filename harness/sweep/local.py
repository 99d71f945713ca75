"""Workers on this machine, and what can be said of a campaign before they start."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

from backbench.errors import BackbenchError, HarnessError
from backbench.harness.repeats import start_process
from backbench.harness.sweep.campaign import Campaign
from backbench.harness.sweep.worker import CHILD


def check(campaign: Campaign) -> None:
    """Find every backend and model that the campaign names, and make each kind of its workloads once.

    Devices are left to the runs: other machines may have them, and a card that this process opened would
    be shared by every run.

    Raises:
        BackbenchError: one is unknown, or options do not go together; nothing has been started.
    """
    from backbench.harness.experiment import make_workload
    from backbench.harness.subjects.choice import subject_class

    seen = set()
    for point in campaign.points:
        options = replace(point.options, device="cpu", interpret=False)
        try:
            subject = subject_class(options)(options)
            kind = (options.workload, options.model, options.engine.get("max_len"), *sorted(options.load))
            if kind not in seen:
                make_workload(options, subject.limits())
            seen.add(kind)
        except BackbenchError as error:
            raise HarnessError(f"{point.name}: {error}") from None


def work_here(path: Path, workers: int, quiet: bool = False) -> list[int]:
    """Start workers on a sweep's directory and wait for them; how each ended. They end with this process.

    Raises KeyboardInterrupt after they gave their cells back.
    """
    arguments = [str(os.getpid()), "sweep", "work", str(path), *(["--quiet"] if quiet else [])]
    processes = [start_process(arguments, CHILD) for _ in range(workers)]
    try:
        return [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
        raise
    finally:
        for process in processes:
            if process.poll() is None:  # interrupted again
                process.kill()
                process.wait()
