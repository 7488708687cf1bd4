"""Many devices give the step of one; the tests themselves, in ``on_eight_devices``, need a process with eight."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_on_eight_virtual_devices():
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:xdist",
    "-o",
    "addopts=",
    str(HERE / "on_eight_devices.py"),
  ]
  ended = subprocess.run(
    command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False, timeout=900
  )
  assert ended.returncode == 0, ended.stdout[-5000:]
  assert "7 passed" in ended.stdout, ended.stdout[-500:]
