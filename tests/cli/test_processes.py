"""Several processes train one generator; one that is killed or told to stop goes on where it was."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
TINY_RUN = pathlib.Path(__file__).parents[1] / "tiny_run.py"


def start(workdir, *flags):
  command = [sys.executable, str(TINY_RUN), f"--workdir={workdir}", *flags]
  environment = os.environ | {"PYTHONPATH": str(TINY_RUN.parents[1])}
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


def metrics(workdir):
  return json.loads((workdir / "metrics.json").read_text())


def run(workdir, *flags):
  code, out, err = finish(start(workdir, *flags))
  assert code == 0, err
  assert out.splitlines()[-1] == str(workdir / "metrics.json")
  return metrics(workdir)


def wait_for_first_step(process, workdir):
  while process.poll() is None and not (workdir / "metrics.jsonl").exists():
    time.sleep(0.05)
  assert process.poll() is None, process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The metrics of a run that nothing happens to."""
  return run(tmp_path_factory.mktemp("undisturbed"))


def test_two_processes_train_what_one_does(tmp_path, undisturbed):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  together = [f"--coordinator=localhost:{port}", "--num_processes=2"]
  processes = [start(tmp_path / str(own), *together, f"--process_id={own}") for own in range(2)]
  (code, out, err), (other_code, other_out, _) = [finish(process) for process in processes]
  assert (code, other_code) == (0, 0), err
  both = metrics(tmp_path / "0")
  assert both["devices"] == 2 * undisturbed["devices"]
  assert both["sum"] == pytest.approx(undisturbed["sum"], rel=1e-4)
  assert "metrics.json" in out and "metrics.json" not in other_out  # the first alone talks
  assert not (tmp_path / "1").exists()  # and writes
  steps = [json.loads(line)["step"] for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(1, 21))
  # What several processes saved, one can go on with; there is nothing left to do here.
  assert run(tmp_path / "0")["digest"] == both["digest"]


def test_told_to_stop_it_saves_and_says_how_to_go_on(tmp_path, undisturbed):
  long = "--steps=100000"
  process = start(tmp_path, long, "--save_every=100000")
  wait_for_first_step(process, tmp_path)
  process.send_signal(signal.SIGTERM)
  code, _, err = finish(process)
  assert code == 130
  assert f"tiny_run.py --workdir={tmp_path} {long}" in err
  assert "Traceback" not in err
  assert [path.name for path in (tmp_path / "generator").iterdir() if path.name.isdigit()]  # saved before its time


def test_two_runs_in_one_folder_are_refused(tmp_path):
  first = start(tmp_path, "--steps=100000")
  try:
    wait_for_first_step(first, tmp_path)
    code, _, err = finish(start(tmp_path, "--steps=100000"))
    assert code == 2
    assert f"--workdir={tmp_path}" in err and "in use by another run" in err
    assert first.poll() is None
  finally:
    first.kill()
    first.communicate()


def saved_steps(workdir):
  return [int(path.name) for path in pathlib.Path(workdir, "generator").glob("[0-9]*") if path.name.isdigit()]


def test_killed_at_any_moment_it_ends_in_the_same_bits(tmp_path, request):
  kills = request.config.getoption("kills")
  flags = [f"--steps={20 * kills}", "--save_every=1"]  # it writes checkpoints most of the time
  for delay in np.random.default_rng(0).uniform(0.0, 0.5, size=kills):
    before = max(saved_steps(tmp_path), default=0)
    process = start(tmp_path, *flags)
    while process.poll() is None and max(saved_steps(tmp_path), default=0) <= before:
      time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()
    # Metrics are logged before their checkpoint is written: no more than this interval is lost.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) <= max(saved_steps(tmp_path)) + 1
  resumed = run(tmp_path, *flags)
  steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(1, 20 * kills + 1))  # none is left out or logged twice
  assert resumed["digest"] == run(tmp_path.with_name("undisturbed"), *flags)["digest"]
