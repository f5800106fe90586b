"A tiny volume, and ways to run the command on it, in this process, in another one and in a browser."
import json, os, shutil, subprocess, sys
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest
from synapseclr.dev.fixtures import tiny_volume

root = Path(__file__).parent.parent
chromium = shutil.which('chromium')
driver = shutil.which('chromedriver')
try: from selenium import webdriver
except ImportError: webdriver = None
in_browser = pytest.mark.skipif(not (chromium and driver and webdriver),
    reason='needs chromium, chromium-driver and selenium')

def files(folder, *patterns):
    "Content of the files in `folder` that match one of the patterns, by their relative paths"
    folder = Path(folder)
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

def python(code, *args, cwd, **env):
    """Run Python code in a new process, with one thread unless `env` says otherwise. A variable that is `None` in `env`
    is removed"""
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg') | env
    env = {name: value for name,value in env.items() if value is not None}
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env=env)

command_code = 'from synapseclr.cli import main; main()'

def synapseclr(*args, cwd, **env):
    "Run the command in a new process; `cwd` and `env` as in `python`"
    return python(command_code, *args, cwd=cwd, **env)

_kill_code = """
import os, signal
import {module} as module
from synapseclr.cli import main
owner = {owner}
name = {name!r}
calls = 0
original = getattr(owner, name)
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == {fatal_call}: os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, counted)
main()
"""

def kill_at(module, name, fatal_call, in_class=None):
    """Code that runs the command and kills its own process with SIGKILL in the middle of a stage: at the `fatal_call`th
    call of function `name` of a module, or of a class in it"""
    owner = f'module.{in_class}' if in_class else 'module'
    return _kill_code.format(module=module, owner=owner, name=name, fatal_call=fatal_call)

@pytest.fixture
def run_command(capsys, monkeypatch):
    "A function that runs the command in this process. It returns the exit code and what the command printed"
    from synapseclr.cli import main
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['synapseclr', *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        code = e.value.code
        printed = capsys.readouterr()
        return (1, code) if isinstance(code, str) else (code or 0, printed.out + printed.err)
    return run

def open_browser(folder, *flags, downloads=None):
    "Headless Chromium that reaches this machine only; `flags` are added to its own"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    own_flags = ['headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run',
        'disable-background-networking', 'disable-component-update', 'disable-sync', f'user-data-dir={folder}/user',
        'use-angle=swiftshader', 'enable-unsafe-swiftshader',
        'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
    for flag in [*own_flags, *flags]: options.add_argument(f'--{flag}')
    options.add_experimental_option('prefs', {'download.default_directory': str(downloads or folder)})
    options.set_capability('goog:loggingPrefs', dict(performance='ALL', browser='ALL'))
    return webdriver.Chrome(options, webdriver.ChromeService(driver))

def requested_urls(browser):
    "URLs that the browser has requested since the last call"
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    return [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']

def browser_errors(browser):
    "Errors in the browser's log since the last call"
    return [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']

class Links(HTMLParser):
    "What a page loads, and where its links lead"
    def __init__(self, page):
        super().__init__()
        self.loads = []
        self.leads = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ('script', 'img', 'iframe') and attrs.get('src'): self.loads.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') == 'stylesheet': self.loads.append(attrs['href'])
        if tag == 'a' and attrs.get('href'): self.leads.append(attrs['href'])

@pytest.fixture(scope='session')
def tiny_config(tmp_path_factory):
    "Configuration file of a run on the tiny volume; the layers and the table lie beside it"
    return tiny_volume(tmp_path_factory.mktemp('tiny'), n=12)

@contextmanager
def http_server(answer):
    """An HTTP server on this machine; yields its address.
    `answer(method, path, headers, body)` returns status, headers and body"""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *args): pass
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
            status,headers,content = answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            for name,value in (headers | {'Content-Length': str(len(content))}).items(): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        do_POST = do_GET
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{server.server_port}'
        finally: server.shutdown()

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder without secrets; a function that writes one into it"
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    secrets = tmp_path/'home/.cloudvolume/secrets'
    secrets.mkdir(parents=True)
    return lambda name, **content: (secrets/f'{name}-secret.json').write_text(json.dumps(content))

# Files that take longest; begun first, so that the workers end at about the same time
longest = ['test_same_numbers', 'test_line', 'test_processes', 'test_figures', 'test_bad_input', 'test_faults']

def pytest_collection_modifyitems(items):
    "The longest files first; the order within a file stays"
    rank = {name: i for i,name in enumerate(longest)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(longest)))
