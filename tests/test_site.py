"The rendered site: every link and picture resolves, and no page needs the network."
import json, re, subprocess, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote
import pytest
from conftest import in_browser, open_browser, root
from test_line import Links

@pytest.fixture(scope='module')
def site():
    "The site that `make site` has built, or a new one"
    if not (root/'_docs/index.html').exists(): subprocess.run(['synapseclr_docs'], cwd=root, check=True)
    return root/'_docs'

def pages(site): return {p: Links(p.read_text()) for p in site.rglob('*.html')}

def test_every_notebook_has_a_page(site):
    want = {re.sub(r'^\d+[a-z]*_', '', p.stem) for p in (root/'nbs').rglob('*.ipynb')
        if '.ipynb_checkpoints' not in p.parts}
    assert want <= {p.stem for p in site.rglob('*.html')}

def test_links_resolve(site):
    broken = [(p.name, o) for p,links in pages(site).items() for o in links.leads + links.loads
        if not re.match(r'[a-z]+:|#|//', o)
        and not (p.parent/unquote(re.split('[#?]', o)[0])).exists()]
    assert not broken

def test_nothing_is_loaded_from_elsewhere(site):
    outside = [(p.name, o) for p,links in pages(site).items() for o in links.loads if re.match(r'https?:|//', o)]
    assert not outside

def test_mathematics_is_there(site):
    assert 'katex' in (site/'learn/loss.html').read_text() and (site/'site_libs/katex/katex.min.js').exists()

@pytest.fixture(scope='module')
def browser(site, tmp_path_factory):
    "Chromium, and the address at which it finds the site"
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = open_browser(tmp_path_factory.mktemp('browser'), 'window-size=1200,900')
    yield browser,f'http://127.0.0.1:{server.server_port}'
    browser.quit()
    server.shutdown()
    server.server_close()

def wait(browser, javascript):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 20, .05).until(lambda b: b.execute_script(f'return {javascript}'))

@in_browser
def test_as_a_reader_meets_it(browser):
    "Formulas are set, pictures have pixels, search leads to a function, and nobody else is asked for anything"
    browser,home = browser
    asked = lambda: [m['params']['request']['url'] for o in browser.get_log('performance')
        if (m := json.loads(o['message'])['message'])['method'] == 'Network.requestWillBeSent']
    for page in ('index', 'learn/loss', 'figures/fig2', 'figures/ledger', 'runs/consensus', 'guide/faq'):
        browser.get(f'{home}/{page}.html')
        wait(browser, 'document.readyState == "complete"')
        assert not browser.execute_script('return [...document.images].filter(o => !o.complete || '
            '!o.naturalWidth).map(o => o.src)'), page
        assert not browser.execute_script('return document.querySelectorAll(".katex-error").length'), page
    browser.get(f'{home}/learn/loss.html')
    assert wait(browser, 'document.querySelectorAll(".katex-html").length') > 5
    browser.find_element('css selector', '.smalldocs-search input').send_keys('nt_xent')
    wait(browser, 'document.querySelectorAll(".search-result").length')
    assert any(o.endswith('loss.html#nt_xent') for o in browser.execute_script('return '
        '[...document.querySelectorAll(".search-result")].map(o => o.href)'))
    outside = [o for o in asked() if not o.startswith((home, 'data:', 'blob:', 'about:', 'chrome'))]
    assert not outside and not [o for o in browser.get_log('browser') if o['level'] == 'SEVERE'
        and 'favicon' not in o['message']]

def test_anchors_are_there(site):
    "Links into a page lead to a place in it"
    ids = {p: set(re.findall(r'id="([^"]+)"', p.read_text())) for p in site.rglob('*.html')}
    lost = []
    for p,links in pages(site).items():
        for o in links.leads:
            if re.match(r'[a-z]+:|//', o) or '#' not in o: continue
            page,_,anchor = o.partition('#')
            target = (p.parent/unquote(page)).resolve() if page else p
            if anchor and target.suffix == '.html' and target in ids and unquote(anchor) not in ids[target]:
                lost.append((p.name, o))
    assert not lost, lost[:10]
