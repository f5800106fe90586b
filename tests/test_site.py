"The rendered site: every link and picture resolves, and no page needs the network."
import re, subprocess
from urllib.parse import unquote
import pytest
from conftest import root
from test_line import Links

@pytest.fixture(scope='module')
def site():
    "The site that `make site` has built, or a new one"
    if not (root/'_docs/index.html').exists(): subprocess.run(['synapseclr_docs'], cwd=root, check=True)
    return root/'_docs'

def pages(site): return {p: Links(p.read_text()) for p in site.rglob('*.html')}

def test_every_notebook_has_a_page(site):
    want = {re.sub(r'^\d+[a-z]*_', '', p.stem) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert want <= {p.stem for p in site.rglob('*.html')}

def test_links_resolve(site):
    broken = [(p.name, o) for p,links in pages(site).items() for o in links.leads + links.loads if not re.match(r'[a-z]+:|#|//', o)
        and not (p.parent/unquote(re.split('[#?]', o)[0])).exists()]
    assert not broken

def test_nothing_is_loaded_from_elsewhere(site):
    outside = [(p.name, o) for p,links in pages(site).items() for o in links.loads if re.match(r'https?:|//', o)]
    assert not outside

def test_mathematics_is_there(site):
    assert 'katex' in (site/'loss.html').read_text() and (site/'site_libs/katex/katex.min.js').exists()
