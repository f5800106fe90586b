"A tiny volume, and ways to run the command on it."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from synapseclr.dev.fixtures import tiny_volume

root = Path(__file__).parent.parent
chromium,driver = (shutil.which(o) for o in ('chromium', 'chromedriver'))
try: from selenium import webdriver
except ImportError: webdriver = None
in_browser = pytest.mark.skipif(not (chromium and driver and webdriver), reason='needs chromium, chromium-driver and '
    'selenium')

def files(folder, *patterns):
    "Content of the files of a run that have to be the same in every run"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for o in patterns for p in sorted(Path(folder).glob(o))
        if p.is_file()}

def python(code, *args, cwd, **env):
    "Run some Python in a process of its own, with the fewest threads unless `env` says otherwise"
    changed = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg') | env
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env={k: v for k,v in changed.items() if v is not None})

command = 'from synapseclr.cli import main; main()'

def synapseclr(*args, **how):
    "Run the command; `how` as of `python`"
    return python(command, *args, **how)

# Kills its own process with SIGKILL, at a call that is in the middle of a stage
kill_at = """
import os, signal, sys
import {module} as module
from synapseclr.cli import main
owner, name, deadly, calls = {owner}, {name!r}, {deadly}, 0
original = getattr(owner, name)
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == deadly: os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, counted)
main()
"""

def say(capsys, monkeypatch, *args):
    "Exit code and what the command printed"
    from synapseclr.cli import main
    monkeypatch.setattr(sys, 'argv', ['synapseclr', *map(str, args)])
    with pytest.raises(SystemExit) as e: main()
    code = e.value.code
    printed = capsys.readouterr()
    return (1, code) if isinstance(code, str) else (code or 0, printed.out + printed.err)

def open_browser(folder, *more, downloads=None):
    "Chromium without a screen, which finds this machine and nobody else; `more` are further flags"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for o in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
        'disable-component-update', 'disable-sync',
        f'user-data-dir={folder}/user', 'use-angle=swiftshader', 'enable-unsafe-swiftshader',
        'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', *more):
            options.add_argument(f'--{o}')
    options.add_experimental_option('prefs', {'download.default_directory': str(downloads or folder)})
    options.set_capability('goog:loggingPrefs', dict(performance='ALL', browser='ALL'))
    return webdriver.Chrome(options, webdriver.ChromeService(driver))

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "Configuration of a run on the tiny volume"
    return tiny_volume(tmp_path_factory.mktemp('tiny'), n=12)
