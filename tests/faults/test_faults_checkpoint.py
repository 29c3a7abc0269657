"""A process that dies at any one call to the system while it saves a checkpoint leaves one that can be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, shutil, sys
from pathlib import Path
import torch
from saelab.checkpoint import Checkpoints

def dying_at(number, calls=[0]):
    def wrapped(original):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os._exit(9)  # nothing is cleaned up, as after kill -9
            return original(*args, **kwargs)
        return call
    for module, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "open")):
        setattr(module, name, wrapped(getattr(module, name)))

root, tensors = Path(sys.argv[1]), {"x": torch.arange(5)}
number, status, found = 0, 9, []
while status:
    number += 1
    directory = root / str(number)
    for step in (10, 20):
        Checkpoints(directory).save(step, tensors, {})
    child = os.fork()
    if not child:
        dying_at(number)
        Checkpoints(directory).save(30, tensors, {})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    latest = Checkpoints(directory).latest()
    assert torch.equal(latest.tensors["x"], torch.arange(5))
    assert Checkpoints(directory).steps()[0] in (10, 20)
    Checkpoints(directory).save(40, tensors, {})  # and the run goes on
    assert Checkpoints(directory).steps()[-1] == 40
    found.append(latest.step)
print(number, sorted(set(found)), found == sorted(found))
"""


def test_a_checkpoint_is_never_lost_whatever_call_is_the_last(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_calls, _, rest = done.stdout.partition(" ")
    assert int(n_calls) > 8  # so many places to die
    assert rest.strip() == "[20, 30] True"  # first the old one, from some call on the new one
