"The rendered site: every link and picture resolves, and no page needs the network."
import re, subprocess, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote
import pytest
from conftest import Links, browser_errors, in_browser, open_browser, requested_urls, root

@pytest.fixture(scope='module')
def site():
    "The site that `make site` has built, or a new one"
    if not (root/'_docs/index.html').exists(): subprocess.run(['synapseclr_docs'], cwd=root, check=True)
    return root/'_docs'

@pytest.fixture(scope='module')
def pages(site):
    "Links of every page"
    return {path: Links(path.read_text()) for path in site.rglob('*.html')}

def test_every_notebook_has_a_page(pages):
    notebooks = [path for path in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts]
    names = {re.sub(r'^\d+[a-z]*_', '', path.stem) for path in notebooks}
    assert names <= {path.stem for path in pages}

def test_links_resolve(pages):
    broken = []
    for page,links in pages.items():
        for url in links.leads + links.loads:
            if re.match(r'[a-z]+:|#|//', url): continue
            path = unquote(re.split('[#?]', url)[0])
            if not (page.parent/path).exists(): broken.append((page.name, url))
    assert not broken

def test_nothing_is_loaded_from_elsewhere(pages):
    outside = [(page.name, url) for page,links in pages.items() for url in links.loads
        if re.match(r'https?:|//', url)]
    assert not outside

def test_mathematics_is_rendered(site):
    assert 'katex' in (site/'learn/loss.html').read_text()
    assert (site/'site_libs/katex/katex.min.js').exists()

class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.fixture(scope='module')
def home(site):
    "Address at which the site is served"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(SilentHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def browser(home, tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp('browser'), 'window-size=1200,900')
    yield browser
    browser.quit()

def wait(browser, javascript):
    "Value of a JavaScript expression as soon as it is true"
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 20, .05).until(lambda b: b.execute_script(f'return {javascript}'))

empty_images = 'return [...document.images].filter(image => !image.complete || !image.naturalWidth).map(i => i.src)'
search_results = '[...document.querySelectorAll(".search-result")].map(result => result.href)'

@in_browser
def test_pages_in_a_browser(browser, home):
    "Formulas are rendered, pictures are not empty, search finds a function, and nothing is requested from elsewhere"
    for page in ('index', 'learn/loss', 'figures/fig2', 'figures/ledger', 'runs/consensus', 'guide/faq'):
        browser.get(f'{home}/{page}.html')
        wait(browser, 'document.readyState == "complete"')
        assert not browser.execute_script(empty_images), page
        assert not browser.execute_script('return document.querySelectorAll(".katex-error").length'), page
    browser.get(f'{home}/learn/loss.html')
    assert wait(browser, 'document.querySelectorAll(".katex-html").length') > 5
    browser.find_element('css selector', '.smalldocs-search input').send_keys('nt_xent')
    wait(browser, 'document.querySelectorAll(".search-result").length')
    found_urls = browser.execute_script(f'return {search_results}')
    assert any(url.endswith('loss.html#nt_xent') for url in found_urls)
    allowed = (home, 'data:', 'blob:', 'about:', 'chrome')
    assert not [url for url in requested_urls(browser) if not url.startswith(allowed)]
    assert not [error for error in browser_errors(browser) if 'favicon' not in error]

def test_anchors_exist(site, pages):
    "A link into a page leads to an element of it"
    ids = {path: set(re.findall(r'id="([^"]+)"', path.read_text())) for path in site.rglob('*.html')}
    broken = []
    for page,links in pages.items():
        for url in links.leads:
            if re.match(r'[a-z]+:|//', url) or '#' not in url: continue
            path,_,anchor = url.partition('#')
            target = (page.parent/unquote(path)).resolve() if path else page
            if anchor and target.suffix == '.html' and target in ids and unquote(anchor) not in ids[target]:
                broken.append((page.name, url))
    assert not broken, broken[:10]
