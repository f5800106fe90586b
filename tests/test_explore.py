"The map of all synapses, as a person meets it: in a browser, offline, with the server and without."
import http.client, json, subprocess, sys, threading
from urllib.parse import urlsplit
import numpy as np, pandas as pd, pytest
from conftest import in_browser, open_browser, webdriver
from synapseclr.dev.fixtures import tiny_fetched
from synapseclr.show.explore import ExploreError, ExplorerData, make_server, serve, write_static
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_ids, read_labels

side = 14

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with chunks"
    return tiny_fetched(tmp_path_factory.mktemp('explore'))

@pytest.fixture(scope='module')
def table(run):
    "Synapses on a grid, from its upper left; the first ones have chunks, the ids of the others are beyond 2^53"
    ids = ChunkStore.open(run/'chunks.zarr').ids
    n = side**2
    y,x = divmod(np.arange(n), side)
    return pd.DataFrame(dict(id=np.concatenate([ids, 2**53 + 1 + 2*np.arange(n-len(ids))]), umap_1=x*1., umap_2=-1.*y,
        cluster=x//5, cleft_um3=y/10, pre_root_id=2**60 + y,
        neuroglancer=[f'https://viewer.example/{i}' for i in range(n)]))

class Served:
    "A server of the map that can be stopped and started"
    def __init__(self, run, table):
        self.labels = run/'labels.csv'
        self.map = ExplorerData(table, ChunkStore.open(run/'chunks.zarr'), 'grid')
        self.port = 0
        self.start()

    def start(self):
        self.server = make_server(self.map, self.labels, self.port)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def home(self): return f'http://127.0.0.1:{self.port}'

    def ask(self, path, method='GET', body=None, **headers):
        "Status and content; the path goes out as it is"
        c = http.client.HTTPConnection('127.0.0.1', self.port)
        c.request(method, path, body, {k.replace('_', '-'): v for k,v in headers.items()})
        answer = c.getresponse()
        return answer.status,answer.read()

@pytest.fixture(scope='module')
def served(run, table):
    o = Served(run, table)
    yield o
    o.stop()

class Page:
    "A browser with the page, and what it has asked for"
    def __init__(self, folder):
        self.downloads = folder/'downloads'
        self.downloads.mkdir()
        self.browser = open_browser(folder, 'window-size=1200,900', 'screen-info={1600x1200}', downloads=self.downloads)

    def js(self, code, *args): return self.browser.execute_script(f'return {code}', *args)

    def wait(self, condition, *args):
        "Until some JavaScript, or a function, gives something true"
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(self.browser, 20, .02).until(lambda _: condition() if callable(condition)
            else self.js(condition, *args))

    def open(self, home):
        self.browser.get(home + '/')
        self.wait('document.body.dataset.ready')

    def find(self, css): return self.browser.find_element('css selector', css)

    def mouse(self, *points, drag=False):
        "Click at a place of the canvas, or drag from the first place to the last"
        canvas = self.find('#canvas')
        middle = np.array([canvas.size['width'], canvas.size['height']])/2
        a = webdriver.ActionChains(self.browser, duration=40)
        for i,p in enumerate(points):
            a.move_to_element_with_offset(canvas, *(int(round(o)) for o in np.subtract(p, middle)))
            if drag and not i: a.click_and_hold()
        (a.release() if drag else a.click()).perform()

    def at(self, i): return self.js('explore.plot.getScreenPosition(arguments[0])', i)

    def click(self, i):
        self.mouse(self.at(i))
        self.wait('document.getElementById("rows").dataset.id == arguments[0]',
            self.js('`${explore.ids[arguments[0]]}`', i))

    def colour_by(self, name):
        from selenium.webdriver.support.ui import Select
        Select(self.find('#colour')).select_by_visible_text(name)
        self.wait('document.body.dataset.colour == document.getElementById("colour").value')

    def label(self, name): self.find(f'#labels [data-label="{name}"]').click()

    def pixel(self, i):
        "Colour in the middle of a point"
        return np.array(self.js(
            '[...document.getElementById("canvas").getContext("2d").getImageData(...arguments[0].map(o => '
            'Math.round(o*devicePixelRatio)), 1, 1).data].slice(0, 3)', self.at(i)))

    def download(self, css, name):
        path = self.downloads/name
        path.unlink(missing_ok=True)
        self.find(css).click()
        self.wait(path.exists)
        return path

    def asked(self):
        "Addresses asked for since the last time"
        events = [json.loads(o['message'])['message'] for o in self.browser.get_log('performance')]
        return [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']

    def errors(self): return [o['message'] for o in self.browser.get_log('browser') if o['level'] == 'SEVERE']

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    p = Page(tmp_path_factory.mktemp('browser'))
    yield p
    p.browser.quit()

def outside(urls, home):
    return [o for o in urls if urlsplit(o).scheme not in ('data', 'blob') and not o.startswith(home + '/')]

@in_browser
def test_page_asks_nobody_else(page, served):
    page.asked()
    page.errors()
    page.open(served.home)
    page.click(0)
    page.wait('document.getElementById("slices").naturalWidth')
    asked = page.asked()
    assert f'{served.home}/points.bin' in asked and not outside(asked, served.home)
    assert not page.errors()
    said = page.browser.execute_async_script('fetch("http://127.0.0.1:9/").then(() => arguments[0]("asked"), e => '
        'arguments[0]("refused"))')
    assert said == 'refused' and any('Content Security Policy' in o for o in page.errors())

@in_browser
def test_click_shows_the_synapse(page, served, table):
    page.open(served.home)
    for i in (3, len(table)-2):
        page.click(i)
        shown = dict(tuple(o.text for o in line.find_elements('css selector', 'td'))
            for line in page.find('#rows').find_elements('css selector', 'tr'))
        want = table.iloc[i]
        assert page.find('#id').text == shown['id'] == str(want.id) and shown['pre_root_id'] == str(want.pre_root_id)
        assert float(shown['cleft_um3']) == pytest.approx(want.cleft_um3)
        assert page.find('#link').get_attribute('href') == want.neuroglancer
        page.wait('document.getElementById("slices").complete')
        assert page.find('#nopicture').is_displayed() == (i >= 12)

@in_browser
def test_an_id_is_found_or_said_to_be_unknown(page, served, table):
    page.open(served.home)
    page.find('#find').send_keys('777\n')
    page.wait('document.getElementById("message").textContent == "There is no synapse 777 on this map."')
    page.js('document.getElementById("find").value = ""')
    page.find('#find').send_keys(f'{table.id.iloc[100]}\n')
    page.wait('document.getElementById("rows").dataset.id == arguments[0]', str(table.id.iloc[100]))

@in_browser
def test_lasso_exports_what_is_inside(page, served, table):
    "An L whose edges run midway between the points"
    page.open(served.home)
    at = np.array([page.at(i) for i in range(side**2)]).reshape(side, side, 2)
    def corner(row, column): return (at[row, column] + at[row+1, column+1])/2
    page.find('#lasso').click()
    page.mouse(*(corner(r, c) for r,c in ((1, 1), (1, 9), (4, 9), (4, 5), (10, 5), (10, 1), (1, 1))), drag=True)
    page.wait('explore.chosen().length > 1')
    y,x = np.divmod(np.arange(side**2), side)
    inside = (y > 1) & (x > 1) & (((y <= 4) & (x <= 9)) | ((y <= 10) & (x <= 5)))
    got = read_ids(page.download('#export', 'ids.txt'))
    assert sorted(got) == sorted(table.id[inside])
    page.find('#pan').click()

@in_browser
def test_labels_survive_reload_and_restart(page, served, table):
    page.open(served.home)
    first = str(table.id.iloc[0])
    last = str(table.id.iloc[-1])
    page.click(0)
    page.label('defect')
    page.wait('explore.labels.get(arguments[0]) == "defect"', first)
    page.click(0)
    page.label('clean')
    page.wait('explore.labels.get(arguments[0]) == "clean"', first)
    page.click(side**2-1)
    page.label('unsure')
    page.wait('explore.labels.get(arguments[0]) == "unsure"', last)
    want = {table.id.iloc[0]: 'clean', table.id.iloc[-1]: 'unsure'}
    assert read_labels(served.labels) == want
    for restart in (False, True):
        if restart:
            served.stop()
            served.start()
        page.open(served.home)
        assert dict(page.js('[...explore.labels]')) == {first: 'clean', last: 'unsure'}
        page.click(0)
        assert page.find('#label').text == '· clean'
    assert pd.read_csv(served.labels).columns.tolist() == ['id', 'label',
        'time'] and len(pd.read_csv(served.labels)) == 3

@in_browser
def test_names_of_labels_can_be_changed_and_many_get_one(page, served, table):
    page.open(served.home)
    page.js('document.querySelector("details").open = true')
    page.click(20)
    page.js('document.getElementById("names").value = ""')
    page.find('#names').send_keys('shaft, "spine"\n')
    page.open(served.home)
    page.js('explore.plot.select([30, 31, 32])')
    page.wait('explore.chosen().length == 3')
    page.find('#all').click()
    page.browser.find_elements('css selector', '#labels button')[1].click()
    page.wait('explore.labels.get(`${explore.ids[32]}`) == \'"spine"\'')
    said = read_labels(served.labels)
    assert [said[i] for i in table.id.iloc[30:33]] == ['"spine"']*3

@in_browser
def test_another_column_has_other_colours(page, served):
    page.open(served.home)
    def rgb(colour): return [int(colour[i:i+2], 16) for i in (1, 3, 5)]
    first,last = 0,side*(side-1)
    np.testing.assert_allclose(page.pixel(first), rgb('#0072B2'), atol=12)
    np.testing.assert_allclose(page.pixel(last), rgb('#0072B2'), atol=12)
    page.colour_by('cleft_um3')
    ramp = served.map.about['ramp']
    np.testing.assert_allclose(page.pixel(first), rgb(ramp[0]), atol=12)
    np.testing.assert_allclose(page.pixel(last), rgb(ramp[-1]), atol=12)
    assert 'or more' in page.find('#legend').text
    page.colour_by('pre_root_id')
    assert str(2**60) in page.find('#legend').text

@in_browser
def test_legend_hides_and_shows(page, served, table):
    page.open(served.home)
    page.find('#legend div').click()
    hidden = (table.cluster == 0).sum()
    page.wait('explore.plot.get("filteredPoints").length == arguments[0]', int(len(table)-hidden))
    page.find('#find').send_keys(f'{table.id[0]}\n')
    page.wait('document.getElementById("message").textContent.includes("is hidden")')
    page.find('#legend div').click()
    page.wait('!explore.plot.get("isPointsFiltered")')

def test_only_known_paths_are_served(served, run):
    (run/'config.toml').write_text('secret = 1')
    for path in ('/config.toml', '/labels.csv', '/../config.toml', '/lib/../../config.toml', '/%2e%2e/config.toml',
        '/lib/..%2fexplore.py', '//etc/passwd', '/slices/..%2f..%2fconfig.png', '/slices/-1.png',
        '/slices/99999999.png', '/column/99.bin', '/column/x.json', '/rows/99.json', '/rows/9999999999999999999.json',
        '/slices/9999999999999999999.png', '/rows/0.bin'):
        status,said = served.ask(path)
        assert status == 404 and b'secret' not in said and said.startswith(b'there is no'), path
    assert served.ask('/map.json', 'PUT')[0] == 501 and served.ask('/map.json', 'POST', '{}', Origin=served.home,
        Content_Type='application/json')[0] == 404

def test_only_the_page_itself_may_label(served, table):
    before = read_labels(served.labels)
    body = json.dumps(dict(ids=[str(table.id.iloc[0])], label='evil'))
    page = dict(Origin=served.home, Content_Type='application/json')
    for change in (dict(Origin='http://evil.example'), dict(Origin='null'),
        dict(Origin=f'http://127.0.0.1:{served.port+1}'), dict(Host='evil.example'),
        dict(Host=f'evil.example:{served.port}')):
        assert served.ask('/labels', 'POST', body, **page | change)[0] == 403, change
    assert served.ask('/labels', 'POST', body, Content_Type='application/json')[0] == 403
    assert served.ask('/labels', 'POST', body, **page | dict(Content_Type='text/plain'))[0] == 400
    assert served.ask('/labels', 'POST', body, Content_Length='-5', **page)[0] == served.ask('/labels', 'POST', body,
        Content_Length='99999999999', **page)[0] == 400
    assert served.ask('/ids.bin', Host='evil.example')[0] == 403
    for bad in ('', '{', '[]', '{"ids": []}', '{"ids": [], "label": "x"}', '{"ids": ["1"], "label": 3}',
        '{"ids": ["1"], "label": "a\\nb"}', '{"ids": [1], "label": "x"}', '{"ids": ["٣"], "label": "x"}'.encode(),
        '"\ud800"'.encode('utf-8', 'surrogatepass')):
        assert served.ask('/labels', 'POST', bad, **page)[0] == 400, bad
    status,said = served.ask('/labels', 'POST', '{"ids": ["77777"], "label": "x"}', **page)
    assert (status, said) == (404, b'synapse 77777 is not on the map')
    assert read_labels(served.labels) == before

@pytest.fixture
def exported(monkeypatch, table):
    "The run's table is the grid"
    monkeypatch.setattr('synapseclr.show.explore.read_results', lambda run: table)

def test_bad_wishes_are_explained(served, run, exported, tmp_path):
    with pytest.raises(ExploreError, match='--port'): serve(run, served.port)
    with pytest.raises(ExploreError, match='--port'): serve(run, 99999)
    with pytest.raises(ExploreError, match="did you mean 'cluster'"): serve(run, 0, 'clustre')
    (tmp_path/'mine').touch()
    with pytest.raises(ExploreError, match='new or empty'): write_static(run, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['mine']

@in_browser
def test_static_copy_needs_no_server_of_ours(page, run, exported, tmp_path, table):
    write_static(run, tmp_path/'copy', slices=4, colour='cleft_um3')
    server = subprocess.Popen([sys.executable, '-u', '-m', 'http.server', '--bind', '127.0.0.1', '--directory',
        str(tmp_path/'copy'), '0'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        home = f"http://127.0.0.1:{server.stdout.readline().split('port ')[1].split()[0]}"
        page.asked()
        page.errors()
        page.open(home)
        assert page.js('document.body.dataset.colour') == 'cleft_um3'
        page.click(0)
        page.wait('document.getElementById("slices").naturalWidth')
        page.label('clean')
        page.wait('explore.labels.size == 1')
        page.open(home)
        assert page.js('explore.labels.get(arguments[0])', str(table.id.iloc[0])) == 'clean'
        assert read_labels(page.download('#download', 'labels.csv')) == {table.id.iloc[0]: 'clean'}
        assert not outside(page.asked(), home) and not page.errors()
        page.click(len(table)-1)
        page.wait('!document.getElementById("nopicture").hidden')
    finally:
        server.terminate()
        server.wait()
    page.browser.get((tmp_path/'copy/index.html').as_uri())
    assert 'Serve this folder' in page.find('body').text
