"A tiny volume, and ways to run the command on it."
import os, subprocess, sys
from pathlib import Path
import pytest
from synapseclr.dev import tiny_volume

root = Path(__file__).parent.parent

def files(folder, *patterns):
    "Content of the files of a run that have to be the same in every run"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for o in patterns for p in sorted(Path(folder).glob(o)) if p.is_file()}

def python(code, *args, cwd):
    "Run some Python in a process of its own, with the fewest threads"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg'))

def synapseclr(*args, cwd):
    "Run the command"
    return python('from synapseclr.cli import main; main()', *args, cwd=cwd)

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "Configuration of a run on the tiny volume"
    return tiny_volume(tmp_path_factory.mktemp('tiny'), n=12)
