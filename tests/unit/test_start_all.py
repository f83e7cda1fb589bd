"""scripts/start_all.sh, with a command in the place of `modelpool` that only says what it is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "start_all.sh"
COMMAND = f"""#!{sys.executable}
import signal, sys
print(sys.argv[1], flush=True)
if sys.argv[1] == "worker":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    print("worker ended", flush=True)
    sys.exit(3)
"""


def test_the_worker_and_then_the_pool_end_with_the_script(tmp_path: Path) -> None:
    command = tmp_path / ".venv" / "bin" / "modelpool"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND)
    command.chmod(0o755)
    script = tmp_path / "scripts" / SCRIPT.name
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    with subprocess.Popen([script], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ["deploy\n", "worker\n", "ready\n"]
        process.terminate()
        rest, _ = process.communicate(timeout=60)
    assert rest.splitlines() == ["worker ended", "undeploy"]
    assert process.returncode == 3
