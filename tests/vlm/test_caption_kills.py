"""The benchmark that kills a captioning run, on few pictures: it checks what it promises."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_that_is_killed_again_and_again_loses_and_doubles_nothing() -> None:
    script = ROOT / "benchmarks" / "caption_ledger.py"
    command = [sys.executable, str(script), "--pictures", "200", "--kills", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=400
    )
    assert "captions that differ" in done.stdout
