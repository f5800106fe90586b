"What is exported, read by those it is meant for: scanpy, and neuroglancer in a browser."
import json, re, shutil, threading
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from conftest import in_browser, open_browser, say, webdriver
from synapseclr.ingest.annotate import annotate
from synapseclr.learn.views import AugmentConfig, CubeConfig
from synapseclr.dev.fixtures import tiny_fetched
from synapseclr.analyse.embed import EmbedConfig, embed
from synapseclr.show.export import annotation_properties, export, read_anndata
from synapseclr.show.neuroglancer import ExportConfig, layer_server, write_annotations
from synapseclr.learn.extract import extract
from synapseclr.learn.model import SynapseNet
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_table, write_table
from synapseclr.data.volume import LayerSource

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with a map of features of an untrained network, and cell types that were made up"
    run = tiny_fetched(tmp_path_factory.mktemp('export'))
    annotate(run)
    extract(run, SynapseNet('demo'), AugmentConfig(), CubeConfig(size=16, voxel_nm=40.), 'features', device='cpu')
    embed(run, EmbedConfig(n_neighbors=5, umap_n_neighbors=4, n_components=[2], n_epochs=20))
    ids = ChunkStore.open(run/'chunks.zarr').ids
    calls = pd.Categorical.from_codes([i%3 for i in range(len(ids))], ['E', 'I', 'abstain'])
    write_table(pd.DataFrame(dict(id=ids, call_pre=calls, call_post=calls[::-1], p_inhibitory_pre=.5,
        p_inhibitory_post=.5)), run/'synapse_types.parquet', 'synapse types', {})
    return run

@pytest.fixture(scope='module')
def layers(run):
    "The tiny volume and its run, served: the address, and paths and status of what was asked for"
    asked = []
    server = layer_server(run.parent, 0)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('synapseclr.show.neuroglancer._Layers.log_request', lambda self, code='-',
            size='-': asked.append((self.path, int(code))))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f'http://127.0.0.1:{server.server_port}', asked=asked)
        server.shutdown()
        server.server_close()

@pytest.fixture(scope='module')
def table(run, layers):
    return export(run, {o: LayerSource(path=str(run.parent/o)) for o in ('em', 'seg', 'cleft')}, (40., 16., 16.),
        umap_neighbours=4, config=ExportConfig(local_url=layers.address))

@pytest.mark.filterwarnings('error:.*sc.pp.pca')
def test_scanpy_takes_it_as_it_is(run, table):
    sc = pytest.importorskip('scanpy')
    a = read_anndata(run/'synapses.h5ad')
    assert a.obs_names.tolist() == [str(i) for i in table.id] and a.obs.id.dtype == 'int64' and a.obs.id.tolist(
        ) == table.id.tolist()
    shown = sc.pl.umap(a, color=['leiden', 'cleft_um3'], show=False)
    assert (shown[0].collections[0].get_offsets() == table[['umap_1', 'umap_2']].to_numpy()).all()
    known = set(a.obsm)
    sc.tl.leiden(a, flavor='igraph', n_iterations=2, directed=False, key_added='again')
    sc.tl.umap(a)
    assert 1 < a.obs.again.nunique() < len(a) and set(a.obsm) == known and (
        a.obsm['X_umap'] != table[['umap_1', 'umap_2']].to_numpy()).any()

class Viewer:
    "Neuroglancer's own client from its Python package, in a browser"
    def __init__(self, folder):
        from selenium.webdriver.support.ui import WebDriverWait
        neuroglancer = pytest.importorskip('neuroglancer')
        self.parse = neuroglancer.parse_url
        self.viewer = neuroglancer.Viewer()
        self.traffic = folder/'net.json'
        self.browser = open_browser(folder, 'window-size=1000,700', f'log-net-log={self.traffic}')
        self.browser.get(self.viewer.get_viewer_url())
        self.until = WebDriverWait(self.browser, 30, .05).until

    def js(self, code, *args): return self.browser.execute_script(f'return {code}', *args)

    def show(self, state):
        """Show a state until all of it is there, and return the picture. It comes through Python: on a slow machine
        neuroglancer 2.41 loses layers of one that it finds in its address"""
        self.viewer.set_state(state)
        self.until(lambda _: self.js('window.viewer && viewer.layerManager.managedLayers.map(l => l.name)')
            == [o['name'] for o in state['layers']])
        self.until(lambda _: self.js('viewer.layerManager.managedLayers.every(l => l.isReady())'))
        return self.viewer.screenshot().screenshot.image_pixels[..., :3].astype(int)

    def errors(self):
        "What the page says went wrong, anywhere"
        said = self.js('[...document.querySelectorAll("#neuroglancer-status-container li, '
            '#neuroglancer-status-container-modal li")].filter(o => o.checkVisibility()).map(o => o.textContent)')
        return said + self.js('viewer.layerManager.managedLayers.flatMap(l => l.layer.dataSources.flatMap(d => '
            '[...d.messages].map(m => m.message).concat(d.loadState?.error ? [String(d.loadState.error)] : [])))')

    def panel(self):
        "What the selection panel says: names and values, and the related cells"
        css = '.neuroglancer-selection-details .neuroglancer-'
        self.until(lambda _: self.js('document.querySelector(arguments[0])', f'{css}related-segment-list'))
        return dict(self.js('[...document.querySelectorAll(arguments[0])].map(o => [...o.children].map(p => '
            'p.textContent))', f'{css}annotation-property')) | dict(self.js(
            '[...document.querySelectorAll(arguments[0])].map(o => '
            '[o.querySelector("[class*=list-title]").textContent, o.querySelector("[class*=entry-id]").textContent])',
            f'{css}related-segment-list'))

    def at_the_centre(self):
        "Id of the annotation in the middle of the section, found with the mouse"
        section = self.browser.find_element('css selector', '.neuroglancer-rendered-data-panel')
        webdriver.ActionChains(self.browser).move_to_element(section).perform()
        return self.until(lambda _: self.js('viewer.mouseState.pickedAnnotationId'))

@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    o = Viewer(tmp_path_factory.mktemp('browser'))
    yield o
    o.browser.quit()

@in_browser
@pytest.mark.parametrize('folder,beyond,limit', [('annotations', 0, None), ('deep', 2**53, 2)],
    ids=['as exported', 'large ids in many levels'])
def test_neuroglancer_reads_the_annotations(folder, beyond, limit, run, layers, table, viewer):
    table = table.assign(id=table.id+beyond)
    if limit: write_annotations(run/folder, table, annotation_properties(table), limit)
    levels = [o['key'] for o in json.loads((run/folder/'info').read_text())['spatial']]
    assert bool(limit) == (len(levels) > 1)
    row = table.iloc[4]
    state = viewer.parse(row.neuroglancer).to_json()
    state['layers'][3]['source'] = f'precomputed://{layers.address}/run/{folder}'
    viewer.show(state | dict(selection=dict(layers=dict(synapses=dict(annotationId=str(row.id))))))
    said = viewer.panel()
    assert said['ID'] == str(row.id) and said['pre'] == str(row.pre_root_id) and said['post'] == str(row.post_root_id)
    assert said['pre_call'] == 'I (2)' and said['post_call'] == 'I (2)' and said['cluster'] == str(
        row.cluster) and float(said['cleft_um3']) == pytest.approx(row.cleft_um3, rel=1e-5)
    for key in levels:
        status = {s for p,s in layers.asked if re.fullmatch(f'/run/{folder}/{key}/[0-9a-f]+.shard', p)}
        assert status and status <= {200, 206}, key
    assert viewer.at_the_centre() == str(row.id)
    assert not viewer.errors()

@in_browser
def test_link_of_the_table_opens(layers, table, viewer):
    "Section and cells, in the colours that the link gives them"
    picture = viewer.show(viewer.parse(table.neuroglancer[2]).to_json())
    assert not viewer.errors() and {s for _,s in layers.asked} <= {200, 206}
    for o in ('em', 'seg', 'cleft'): assert [p for p,_ in layers.asked if re.match(rf'/{o}/\d', p)], o
    hue = picture - picture.mean(-1, keepdims=True)
    for o in ('#0072b2', '#e69f00', '#009e73'):
        want = np.array(list(bytes.fromhex(o[1:])))
        want = want - want.mean()
        along = hue@want/np.linalg.norm(want)
        strength = np.linalg.norm(hue, axis=-1)
        assert ((strength > 20) & (along > .97*strength)).sum() > 50, o

@in_browser
def test_nobody_else_is_asked(layers, table, viewer):
    """Page and workers alike, as the browser's network log has it; what the browser asks for on its own account has no
    page for its origin"""
    viewer.show(viewer.parse(table.neuroglancer[0]).to_json())
    viewer.browser.quit()
    asked = [o['params'] for o in json.loads(viewer.traffic.read_text())['events']
        if 'initiator' in o.get('params', {})]
    urls = [o['url'] for o in asked if o['initiator'].startswith('http')]
    assert any(o.startswith(layers.address) for o in urls) and not [o for o in urls
        if not re.match(r'(http://127\.0\.0\.1:\d+/|data:|blob:)', o)]

@pytest.mark.parametrize('lost,said', [('map', r'map\.parquet.*synapseclr embed'), ('id', r'map\.parquet: nothing '
    r'about 1 synapses, such as 7;'), ('graph', r'neighbours\.parquet: of other synapses')])
def test_map_that_does_not_fit(lost, said, run, tmp_path, capsys, monkeypatch):
    "And nothing is written"
    copy = shutil.copytree(run, tmp_path/'run', ignore=shutil.ignore_patterns('annotations', 'deep', 'results.parquet',
        'synapses.h5ad'))
    drawn = read_table(copy/'map.parquet', 'map')
    if lost == 'map': (copy/'map.parquet').unlink()
    if lost == 'id': write_table(drawn.replace(dict(id={7: 777})), copy/'map.parquet', 'map', {})
    if lost == 'graph':
        write_table(read_table(copy/'neighbours.parquet', 'neighbours').replace(dict(id={7: 777})),
            copy/'neighbours.parquet', 'neighbours', dict(metric='cosine', recall=1.))
    before = set(copy.iterdir())
    code,text = say(capsys, monkeypatch, 'export', '--config', run.parent/'tiny.toml', '--set', f'run={copy}',
        '--no-notebook')
    assert code == 1 and text.startswith('error: ') and re.search(said,
        text) and set(copy.iterdir()) - before <= {copy/'config.toml'}
