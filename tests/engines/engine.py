"""What the tests on real engines share: ways to find, start and stop them, and the log at the end.
A plugin of pytest, which `run.sh` names; without it these tests are not collected."""
import os, shutil, socket, subprocess, time
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
import pytest
from synapseclr.dev.fixtures import tiny_volume

installed = Path(os.environ['ENGINES']) # by `run.sh`
for folder in ('system/usr/bin', 'system/usr/sbin', 'moto/bin'):
    os.environ['PATH'] = f'{installed/folder}:{os.environ["PATH"]}'

versions = {} # Of the engines that were started
results = {} # Outcome and seconds of each test

def program(name):
    "Path of a program; skips the test if it is absent"
    path = shutil.which(name)
    if not path: pytest.skip(f'there is no {name} here, and it could not be installed')
    return path

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def wait_for(what, is_there, seconds=60):
    "The first value of `is_there()` that is true; the test fails if there is none after some seconds"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if value := is_there(): return value
        time.sleep(.05)
    pytest.fail(f'waited {seconds} s for {what}')

@contextmanager
def daemon(*command, log, **options):
    "A program that runs until the end of the block; writes what it says to the file `log`"
    with open(log, 'wb') as f: process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, **options)
    try: yield process
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired: process.kill()

def is_listening(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0

@pytest.fixture(scope='session')
def volume(tmp_path_factory):
    "Folder of a tiny volume: layers em, seg, cleft and mito, synapses.csv, tiny.toml"
    return tiny_volume(tmp_path_factory.mktemp('volume')).parent

def pytest_runtest_logreport(report):
    if report.when == 'call' or report.skipped:
        results[report.nodeid.rpartition('/')[2]] = f'{report.outcome:8} {report.duration:6.1f} s'

def pytest_terminal_summary(terminalreporter):
    terminalreporter.section('engines')
    if find_spec('caveclient'): versions['caveclient'] = version('caveclient')
    for name,text in versions.items(): terminalreporter.line(f'{name}: {text}')
    for test,result in results.items(): terminalreporter.line(f'{result}  {test}')
