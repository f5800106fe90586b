"The map of all synapses as a user meets it: in a browser, offline, with the server and as a static copy."
import http.client, json, re, subprocess, sys, threading
from urllib.parse import urlsplit
import numpy as np, pandas as pd, pytest
from conftest import browser_errors, in_browser, open_browser, requested_urls, webdriver
from synapseclr.dev.fixtures import tiny_fetched
from synapseclr.show.explore import ExploreError, ExplorerData, make_server, serve, write_static
from synapseclr.data.store import ChunkStore
from synapseclr.data.synapses import read_ids
from synapseclr.data.tables import TableError, read_labels

side = 14

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with chunks"
    return tiny_fetched(tmp_path_factory.mktemp('explore'))

@pytest.fixture(scope='module')
def table(run):
    """Synapses on a grid, row by row from the upper left. The first ones have chunks; the ids of the others are beyond
    2^53"""
    ids = ChunkStore.open(run/'chunks.zarr').ids
    n = side**2
    y,x = divmod(np.arange(n), side)
    large_ids = 2**53 + 1 + 2*np.arange(n-len(ids))
    return pd.DataFrame(dict(id=np.concatenate([ids, large_ids]), umap_1=x*1., umap_2=-1.*y, cluster=x//5,
        cleft_um3=y/10, pre_root_id=2**60 + y, neuroglancer=[f'https://viewer.example/{i}' for i in range(n)]))

class MapServer:
    "A server of the map that can be stopped and started again at the same port"
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

    def request(self, path, method='GET', body=None, **headers):
        "Status and content of the answer; the path is sent unchanged"
        connection = http.client.HTTPConnection('127.0.0.1', self.port)
        headers = {name.replace('_', '-'): value for name,value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status,answer.read()

    def post_labels(self, body, **headers):
        "Status and content of the answer to new labels"
        return self.request('/labels', 'POST', body, **headers)

@pytest.fixture(scope='module')
def map_server(run, table):
    server = MapServer(run, table)
    yield server
    server.stop()

class Page:
    "A browser that shows the map"
    def __init__(self, folder):
        self.downloads = folder/'downloads'
        self.downloads.mkdir()
        self.browser = open_browser(folder, 'window-size=1200,900', 'screen-info={1600x1200}', downloads=self.downloads)

    def js(self, code, *args): return self.browser.execute_script(f'return {code}', *args)

    def wait(self, condition, *args):
        "Wait until a JavaScript expression, or a Python function, is true"
        from selenium.webdriver.support.ui import WebDriverWait
        def is_true(_): return condition() if callable(condition) else self.js(condition, *args)
        return WebDriverWait(self.browser, 20, .02).until(is_true)

    def open(self, home):
        self.browser.get(home + '/')
        self.wait('document.body.dataset.ready')

    def find(self, css): return self.browser.find_element('css selector', css)

    def text(self, css): return self.find(css).text

    def mouse(self, *points, drag=False):
        "Click at a point of the canvas, or drag from the first point through all others"
        canvas = self.find('#canvas')
        middle = np.array([canvas.size['width'], canvas.size['height']])/2
        actions = webdriver.ActionChains(self.browser, duration=40)
        for i,point in enumerate(points):
            x,y = np.subtract(point, middle)
            actions.move_to_element_with_offset(canvas, int(round(x)), int(round(y)))
            if drag and i == 0: actions.click_and_hold()
        if drag: actions.release()
        else: actions.click()
        actions.perform()

    def screen_position(self, i): return self.js('explore.plot.getScreenPosition(arguments[0])', i)

    def click(self, i):
        "Click at synapse `i`, and wait until its table is shown"
        self.mouse(self.screen_position(i))
        self.wait('document.getElementById("rows").dataset.id == arguments[0]',
            self.js('`${explore.ids[arguments[0]]}`', i))

    def colour_by(self, name):
        from selenium.webdriver.support.ui import Select
        Select(self.find('#colour')).select_by_visible_text(name)
        self.wait('document.body.dataset.colour == document.getElementById("colour").value')

    def find_id(self, synapse_id): self.find('#find').send_keys(f'{synapse_id}\n')

    def label(self, name): self.find(f'#labels [data-label="{name}"]').click()

    def wait_for_label(self, synapse_id, label):
        self.wait('explore.labels.get(arguments[0]) == arguments[1]', str(synapse_id), label)

    def wait_for_message(self, text):
        self.wait('document.getElementById("message").textContent.includes(arguments[0])', text)

    def pixel(self, i):
        "Colour in the middle of a point"
        return np.array(self.js(
            '[...document.getElementById("canvas").getContext("2d").getImageData('
            '...arguments[0].map(x => Math.round(x*devicePixelRatio)), 1, 1).data].slice(0, 3)',
            self.screen_position(i)))

    def download(self, css, name):
        "Path of the file that a button downloads"
        path = self.downloads/name
        path.unlink(missing_ok=True)
        self.find(css).click()
        self.wait(path.exists)
        return path

    def requested_urls(self): return requested_urls(self.browser)

    def errors(self): return browser_errors(self.browser)

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp('browser'))
    yield page
    page.browser.quit()

def outside(urls, home):
    "URLs that leave the server"
    return [url for url in urls if urlsplit(url).scheme not in ('data', 'blob') and not url.startswith(home + '/')]

@in_browser
def test_page_requests_nothing_from_elsewhere(page, map_server):
    page.requested_urls()
    page.errors()
    page.open(map_server.home)
    page.click(0)
    page.wait('document.getElementById("slices").naturalWidth')
    urls = page.requested_urls()
    assert f'{map_server.home}/points.bin' in urls
    assert not outside(urls, map_server.home)
    assert not page.errors()
    outcome = page.browser.execute_async_script(
        'fetch("http://127.0.0.1:9/").then(() => arguments[0]("asked"), e => arguments[0]("refused"))')
    assert outcome == 'refused'
    assert any('Content Security Policy' in error for error in page.errors())

@in_browser
def test_click_shows_the_synapse(page, map_server, table):
    page.open(map_server.home)
    for i in (3, len(table)-2):
        page.click(i)
        shown = {}
        for line in page.find('#rows').find_elements('css selector', 'tr'):
            name,value = line.find_elements('css selector', 'td')
            shown[name.text] = value.text
        synapse = table.iloc[i]
        assert page.text('#id') == shown['id'] == str(synapse.id)
        assert shown['pre_root_id'] == str(synapse.pre_root_id)
        assert float(shown['cleft_um3']) == pytest.approx(synapse.cleft_um3)
        assert page.find('#link').get_attribute('href') == synapse.neuroglancer
        page.wait('document.getElementById("slices").complete')
        assert page.find('#nopicture').is_displayed() == (i >= 12)

@in_browser
def test_slices_in_the_frame_of_the_cleft_or_as_sections(page, map_server, table):
    "The frame comes first; the choice stays from synapse to synapse"
    page.errors()
    page.open(map_server.home)
    def shown(kind, i):
        "The picture is that of the server"
        url = f'{map_server.home}/{kind}/{table.id.iloc[i]}.png'
        page.wait('document.getElementById("slices").src == arguments[0]', url)
        page.wait('document.getElementById("slices").complete')
        assert page.js('document.getElementById("slices").naturalWidth') == 360
        assert page.text('#cuts .on') == dict(cleft='frame of the cleft', slices='sections')[kind]
    page.click(3)
    shown('cleft', 3)
    page.find('[data-cut="slices"]').click()
    shown('slices', 3)
    page.click(5)
    shown('slices', 5)
    page.find('body').send_keys('c')
    shown('cleft', 5)
    pictures = [map_server.request(f'/{kind}/{table.id.iloc[5]}.png')[1] for kind in ('cleft', 'slices')]
    assert pictures[0] != pictures[1]
    assert not page.errors()

def test_frames_need_no_file(map_server, run, table):
    "A run of an older version, or one that cannot be written to"
    (run/'frames.parquet').unlink(missing_ok=True)
    before = set(run.iterdir())
    status,picture = map_server.request(f'/cleft/{table.id.iloc[2]}.png')
    assert status == 200 and picture.startswith(b'\x89PNG')
    assert set(run.iterdir()) == before

@in_browser
def test_find_shows_the_synapse_or_a_message(page, map_server, table):
    page.open(map_server.home)
    page.find_id(777)
    page.wait('document.getElementById("message").textContent == "There is no synapse 777 on this map."')
    page.js('document.getElementById("find").value = ""')
    page.find_id(table.id.iloc[100])
    page.wait('document.getElementById("rows").dataset.id == arguments[0]', str(table.id.iloc[100]))

@in_browser
def test_lasso_exports_what_is_inside(page, map_server, table):
    "An L whose edges run midway between the points"
    page.open(map_server.home)
    position = np.array([page.screen_position(i) for i in range(side**2)]).reshape(side, side, 2)
    def corner(row, column): return (position[row, column] + position[row+1, column+1])/2
    outline = [(1, 1), (1, 9), (4, 9), (4, 5), (10, 5), (10, 1), (1, 1)]
    page.find('#lasso').click()
    page.mouse(*(corner(row, column) for row,column in outline), drag=True)
    page.wait('explore.chosen().length > 1')
    y,x = np.divmod(np.arange(side**2), side)
    inside = (y > 1) & (x > 1) & (((y <= 4) & (x <= 9)) | ((y <= 10) & (x <= 5)))
    exported = read_ids(page.download('#export', 'ids.txt'))
    assert sorted(exported) == sorted(table.id[inside])
    page.find('#pan').click()

@in_browser
def test_labels_survive_reload_and_restart(page, map_server, table):
    page.open(map_server.home)
    first = table.id.iloc[0]
    last = table.id.iloc[-1]
    page.click(0)
    page.label('defect')
    page.wait_for_label(first, 'defect')
    page.click(0)
    page.label('clean')
    page.wait_for_label(first, 'clean')
    page.click(side**2-1)
    page.label('unsure')
    page.wait_for_label(last, 'unsure')
    assert read_labels(map_server.labels) == {first: 'clean', last: 'unsure'}
    for restart in (False, True):
        if restart:
            map_server.stop()
            map_server.start()
        page.open(map_server.home)
        assert dict(page.js('[...explore.labels]')) == {str(first): 'clean', str(last): 'unsure'}
        page.click(0)
        assert page.text('#label') == '· clean'
    log = pd.read_csv(map_server.labels)
    assert log.columns.tolist() == ['id', 'label', 'time']
    assert len(log) == 3

@in_browser
def test_own_label_names_for_many_synapses(page, map_server, table):
    "Names of labels can be changed, and a selection of synapses gets one label"
    page.open(map_server.home)
    page.js('document.querySelector("details").open = true')
    page.click(20)
    page.js('document.getElementById("names").value = ""')
    page.find('#names').send_keys('shaft, "spine"\n')
    page.open(map_server.home)
    page.js('explore.plot.select([30, 31, 32])')
    page.wait('explore.chosen().length == 3')
    page.find('#all').click()
    page.browser.find_elements('css selector', '#labels button')[1].click()
    page.wait_for_label(table.id.iloc[32], '"spine"')
    labels = read_labels(map_server.labels)
    assert [labels[i] for i in table.id.iloc[30:33]] == ['"spine"']*3

@in_browser
def test_colours_show_the_chosen_column(page, map_server):
    page.open(map_server.home)
    def rgb(colour): return [int(colour[i:i+2], 16) for i in (1, 3, 5)]
    upper_left = 0
    lower_left = side*(side-1)
    np.testing.assert_allclose(page.pixel(upper_left), rgb('#0072B2'), atol=12)
    np.testing.assert_allclose(page.pixel(lower_left), rgb('#0072B2'), atol=12)
    page.colour_by('cleft_um3')
    ramp = map_server.map.about['ramp']
    np.testing.assert_allclose(page.pixel(upper_left), rgb(ramp[0]), atol=12)
    np.testing.assert_allclose(page.pixel(lower_left), rgb(ramp[-1]), atol=12)
    assert 'or more' in page.text('#legend')
    page.colour_by('pre_root_id')
    assert str(2**60) in page.text('#legend')

@in_browser
def test_legend_hides_and_shows(page, map_server, table):
    page.open(map_server.home)
    page.find('#legend div').click()
    n_shown = int((table.cluster != 0).sum())
    page.wait('explore.plot.get("filteredPoints").length == arguments[0]', n_shown)
    page.find_id(table.id[0])
    page.wait_for_message('is hidden')
    page.find('#legend div').click()
    page.wait('!explore.plot.get("isPointsFiltered")')

@pytest.mark.parametrize('path', ['/config.toml', '/labels.csv', '/../config.toml', '/lib/../../config.toml',
    '/%2e%2e/config.toml', '/lib/..%2fexplore.py', '//etc/passwd', '/slices/..%2f..%2fconfig.png', '/slices/-1.png',
    '/slices/99999999.png', '/cleft/99999999.png', '/cleft/1.json', '/column/99.bin', '/column/x.json', '/rows/99.json',
    '/rows/9999999999999999999.json', '/slices/9999999999999999999.png', '/rows/0.bin'])
def test_only_known_paths_are_served(path, map_server, run):
    (run/'config.toml').write_text('secret = 1')
    status,content = map_server.request(path)
    assert status == 404
    assert b'secret' not in content
    assert content.startswith(b'there is no')

def test_only_labels_are_accepted(map_server):
    page_headers = dict(Origin=map_server.home, Content_Type='application/json')
    assert map_server.request('/map.json', 'PUT')[0] == 501
    assert map_server.request('/map.json', 'POST', '{}', **page_headers)[0] == 404

def test_only_the_page_itself_may_label(map_server, table):
    labels_before = read_labels(map_server.labels)
    body = json.dumps(dict(ids=[str(table.id.iloc[0])], label='evil'))
    page_headers = dict(Origin=map_server.home, Content_Type='application/json')
    foreign_headers = [
        dict(Origin='http://evil.example'),
        dict(Origin='null'),
        dict(Origin=f'http://127.0.0.1:{map_server.port+1}'),
        dict(Host='evil.example'),
        dict(Host=f'evil.example:{map_server.port}'),
    ]
    for headers in foreign_headers: assert map_server.post_labels(body, **page_headers | headers)[0] == 403, headers
    assert map_server.post_labels(body, Content_Type='application/json')[0] == 403
    assert map_server.request('/ids.bin', Host='evil.example')[0] == 403
    assert read_labels(map_server.labels) == labels_before

def test_malformed_labels_are_refused(map_server, table):
    labels_before = read_labels(map_server.labels)
    body = json.dumps(dict(ids=[str(table.id.iloc[0])], label='evil'))
    page_headers = dict(Origin=map_server.home, Content_Type='application/json')
    malformed_headers = [
        dict(Content_Type='text/plain'),
        dict(Content_Length='-5'),
        dict(Content_Length='99999999999'),
    ]
    for headers in malformed_headers: assert map_server.post_labels(body, **page_headers | headers)[0] == 400, headers
    malformed_bodies = [
        '',
        '{',
        '[]',
        '{"ids": []}',
        '{"ids": [], "label": "x"}',
        '{"ids": ["1"], "label": 3}',
        '{"ids": ["1"], "label": "a\\nb"}',
        '{"ids": [1], "label": "x"}',
        '{"ids": ["٣"], "label": "x"}'.encode(),
        '"\ud800"'.encode('utf-8', 'surrogatepass'),
    ]
    for malformed in malformed_bodies: assert map_server.post_labels(malformed, **page_headers)[0] == 400, malformed
    status,content = map_server.post_labels('{"ids": ["77777"], "label": "x"}', **page_headers)
    assert (status, content) == (404, b'synapse 77777 is not on the map')
    assert read_labels(map_server.labels) == labels_before

@pytest.fixture
def grid_as_results(monkeypatch, table):
    "The grid is read as the run's table of results"
    monkeypatch.setattr('synapseclr.show.explore.read_results', lambda run: table)

def test_wrong_options_are_explained(map_server, run, grid_as_results, tmp_path):
    with pytest.raises(ExploreError, match='--port'): serve(run, map_server.port)
    with pytest.raises(ExploreError, match='--port'): serve(run, 99999)
    with pytest.raises(ExploreError, match="did you mean 'cluster'"): serve(run, 0, 'clustre')
    (tmp_path/'mine').touch()
    with pytest.raises(ExploreError, match='new or empty'): write_static(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']

@in_browser
def test_without_webgl(map_server, tmp_path):
    "The page says why it is empty"
    browser = open_browser(tmp_path, 'disable-3d-apis')
    try:
        browser.get(map_server.home)
        assert 'drawn with WebGL, which is turned off or missing' in browser.find_element('css selector', 'body').text
    finally: browser.quit()

def test_labels_that_cannot_be_read(map_server, table, grid_as_results, run):
    "The line is named, at the start and on the page, and the file stays as it is"
    before = map_server.labels.read_bytes() if map_server.labels.exists() else b'id,label,time\n'
    spoilt = before + b'1.2E+17,defect,2026\n'
    map_server.labels.write_bytes(spoilt)
    message = f"line {len(spoilt.splitlines())}: '1.2E+17,defect,2026' is not an id and a label"
    try:
        with pytest.raises(TableError, match=re.escape(message)): serve(run, 0)
        assert map_server.request('/labels.json')[0] == 500
        label = json.dumps(dict(ids=[str(table.id.iloc[0])], label='clean'))
        status,content = map_server.post_labels(label, Origin=map_server.home, Content_Type='application/json')
        assert status == 500
        assert message in content.decode()
        assert map_server.labels.read_bytes() == spoilt
    finally: map_server.labels.write_bytes(before)

@in_browser
def test_static_copy_works_with_any_server(page, run, grid_as_results, tmp_path, table):
    write_static(run, tmp_path/'copy', slices=4, colour='cleft_um3')
    python_server = [sys.executable, '-u', '-m', 'http.server', '--bind', '127.0.0.1']
    server = subprocess.Popen([*python_server, '--directory', str(tmp_path/'copy'), '0'], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True)
    try:
        port = server.stdout.readline().split('port ')[1].split()[0]
        home = f'http://127.0.0.1:{port}'
        page.requested_urls()
        page.errors()
        page.open(home)
        assert page.js('document.body.dataset.colour') == 'cleft_um3'
        page.click(0)
        for cut in ('slices', 'cleft'):
            page.find(f'[data-cut="{cut}"]').click()
            page.wait('document.getElementById("slices").src.includes(arguments[0])', f'{home}/{cut}/')
            page.wait('document.getElementById("slices").naturalWidth')
        page.label('clean')
        page.wait('explore.labels.size == 1')
        page.open(home)
        assert page.js('explore.labels.get(arguments[0])', str(table.id.iloc[0])) == 'clean'
        assert read_labels(page.download('#download', 'labels.csv')) == {table.id.iloc[0]: 'clean'}
        assert not outside(page.requested_urls(), home)
        assert not page.errors()
        page.click(len(table)-1)
        page.wait('!document.getElementById("nopicture").hidden')
    finally:
        server.terminate()
        server.wait()
    page.browser.get((tmp_path/'copy/index.html').as_uri())
    assert 'Serve this folder' in page.text('body')
