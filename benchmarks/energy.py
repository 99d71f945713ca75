"""Whether the energy of a record can be believed: a minute of steady load on a GPU, then one without NVML.

    python benchmarks/energy.py [--backend triton] [--model shape:qwen3-0.6b] [--seconds 60] [--out DIR]

The first run must have the card's energy counter and its integrated power within 5 % of each other over the
steady state, an idle power and joules per output token. The second, in which NVML cannot be imported, must
have nulls with a reason there, and be as valid. Exits 1 where one of that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from backbench.reports.metrics.energy import AGREEMENT
from backbench.reports.metrics.validity import fails
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.verify import verify

RATE = 32
"""Requests a second of 256 prompt and 256 output tokens: a load that a data-centre card holds with ease."""
SLOTS = 64
"""Sequences at once, as many as the first and the last requests that the steady state leaves out."""
NO_NVML = "raise ModuleNotFoundError('NVML is hidden by benchmarks/energy.py')\n"


def run(args: argparse.Namespace, out: Path, hidden: bool) -> tuple[RunRecord, list[str]]:
    """One run in a process of its own; its record, and what `bench verify` finds."""
    requests = RATE * args.seconds + 2 * SLOTS + RATE
    command = [
        sys.executable,
        "-m",
        "backbench",
        "run",
        "-w",
        "synthetic",
        "-b",
        args.backend,
        "-m",
        args.model,
    ]
    command += ["--rate", str(RATE), "--arrival", "constant", "-n", str(requests), "--max-seqs", str(SLOTS)]
    command += [
        "--input-lengths",
        "fixed:256",
        "--output-lengths",
        "fixed:256",
        "--no-report",
        "-o",
        str(out),
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        if hidden:
            Path(folder, "pynvml.py").write_text(NO_NVML, encoding="utf-8")
            paths = [folder, *paths]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    directory = RunDirectory.open(out)
    return directory.read_record(), verify(directory)


def judged(record: RunRecord, problems: list[str], hidden: bool) -> dict[str, Any]:
    """What the record says of energy, and what of it does not hold."""
    energy = record.energy
    steady = energy["measured"].get("steady_state") or {}
    ratios = steady.get("counter_over_power") or [None]
    faults = [f"verify: {each}" for each in problems]
    faults += [f"not valid: {each}" for each in record.validity] if fails(record) else []
    numbers = (energy["joules_per_output_token"], energy["idle_power_w"])
    if hidden:
        faults += ["a field is not null"] if numbers != (None, None) or steady else []
        faults += [] if energy["sensor_reasons"] else ["no reason is given"]
    else:
        close = all(each is not None and abs(each - 1) <= AGREEMENT for each in ratios)
        faults += [] if close else [f"counter over integrated power is {ratios}"]
        faults += [] if None not in numbers else ["joules per token or idle power is null"]
    return {
        "device": (record.system.get("device") or {}).get("name"),
        "steady_state_s": record.metrics["steady_state"]["duration_s"],
        "output_tokens_per_s": record.metrics["output_tokens_per_s"]["steady_state"],
        "joules_per_output_token": energy["joules_per_output_token"],
        "idle_power_w": energy["idle_power_w"],
        "mean_power_w": steady.get("mean_power_w"),
        "source": steady.get("source"),
        "counter_over_power": ratios,
        "sampling_period_s": steady.get("sampling_period_s"),
        "largest_gap_s": steady.get("largest_gap_s"),
        "sampler_cpu_share": energy.get("sampler_cpu_share"),
        "decode_fit": record.roofline.get("decode_fit"),
        "reasons": energy["reasons"],
        "validity": record.validity,
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--model", default="shape:qwen3-0.6b")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/energy"))
    args = parser.parse_args()
    found = {}
    for name, hidden in (("nvml", False), ("hidden", True)):
        found[name] = judged(*run(args, args.out / name, hidden), hidden)
    print(json.dumps(found, indent=1))
    sys.exit(1 if any(each["faults"] for each in found.values()) else 0)


if __name__ == "__main__":
    main()
