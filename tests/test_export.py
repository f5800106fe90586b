"What is exported opens in the programs it is meant for: scanpy, and neuroglancer in a browser."
import json, re, shutil, threading
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from conftest import in_browser, open_browser, webdriver
from synapseclr.ingest.annotate import annotate
from synapseclr.learn.views import AugmentConfig, CubeConfig
from synapseclr.dev.fixtures import tiny_fetched
from synapseclr.analyse.embed import EmbedConfig, embed
from synapseclr.show.export import annotation_properties, export, read_anndata
from synapseclr.show.neuroglancer import ExportConfig, layer_server, layer_urls, links, write_annotations
from synapseclr.learn.extract import extract
from synapseclr.learn.model import SynapseNet
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_table, write_table
from synapseclr.data.volume import LayerSource

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run folder with a map of the features of an untrained network, and synthetic cell types"
    run = tiny_fetched(tmp_path_factory.mktemp('export'))
    annotate(run)
    extract(run, SynapseNet('demo'), AugmentConfig(), CubeConfig(size=16, voxel_nm=40.), 'features', device='cpu')
    embed(run, EmbedConfig(n_neighbors=5, umap_n_neighbors=4, n_components=[2], n_epochs=20))
    ids = ChunkStore.open(run/'chunks.zarr').ids
    calls = pd.Categorical.from_codes([i%3 for i in range(len(ids))], ['E', 'I', 'abstain'])
    types = pd.DataFrame(dict(id=ids, call_pre=calls, call_post=calls[::-1], p_inhibitory_pre=.5, p_inhibitory_post=.5))
    write_table(types, run/'synapse_types.parquet', 'synapse types', {})
    return run

@pytest.fixture(scope='module')
def layers(run):
    "Server of the tiny volume and its run: its address, and the requests so far, each with path and status"
    requests = []
    def log_request(handler, code='-', size='-'): requests.append((handler.path, int(code)))
    server = layer_server(run.parent, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('synapseclr.show.neuroglancer._Layers.log_request', log_request)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f'http://127.0.0.1:{server.server_port}', requests=requests)
        server.shutdown()
        server.server_close()

@pytest.fixture(scope='module')
def table(run, layers):
    "The table of results; `export` has written all its files"
    sources = {layer: LayerSource(path=str(run.parent/layer)) for layer in ('em', 'seg', 'cleft')}
    return export(run, sources, (40., 16., 16.), umap_neighbours=4, config=ExportConfig(local_url=layers.address))

@pytest.mark.filterwarnings('error:.*sc.pp.pca')
def test_scanpy_reads_the_results(run, table):
    sc = pytest.importorskip('scanpy')
    adata = read_anndata(run/'synapses.h5ad')
    assert adata.obs_names.tolist() == [str(i) for i in table.id]
    assert adata.obs.id.dtype == 'int64'
    assert adata.obs.id.tolist() == table.id.tolist()
    panels = sc.pl.umap(adata, color=['leiden', 'cleft_um3'], show=False)
    umap = table[['umap_1', 'umap_2']].to_numpy()
    assert (panels[0].collections[0].get_offsets() == umap).all()
    obsm_before = set(adata.obsm)
    sc.tl.leiden(adata, flavor='igraph', n_iterations=2, directed=False, key_added='again')
    sc.tl.umap(adata)
    assert 1 < adata.obs.again.nunique() < len(adata)
    assert set(adata.obsm) == obsm_before
    assert (adata.obsm['X_umap'] != umap).any()

status_messages = """
[...document.querySelectorAll("#neuroglancer-status-container li, #neuroglancer-status-container-modal li")]
    .filter(o => o.checkVisibility()).map(o => o.textContent)
"""
layer_errors = """
viewer.layerManager.managedLayers.flatMap(l => l.layer.dataSources.flatMap(d => [...d.messages].map(m => m.message)
    .concat(d.loadState?.error ? [String(d.loadState.error)] : [])))
"""
panel_properties = """
[...document.querySelectorAll(".neuroglancer-selection-details .neuroglancer-annotation-property")]
    .map(o => [...o.children].map(p => p.textContent))
"""
related_segments = '.neuroglancer-selection-details .neuroglancer-related-segment-list'
panel_segments = f"""
[...document.querySelectorAll("{related_segments}")]
    .map(o => [o.querySelector("[class*=list-title]").textContent, o.querySelector("[class*=entry-id]").textContent])
"""

class Viewer:
    "Neuroglancer's own client from its Python package, in a browser"
    def __init__(self, folder):
        from selenium.webdriver.support.ui import WebDriverWait
        neuroglancer = pytest.importorskip('neuroglancer')
        self.parse = neuroglancer.parse_url
        self.viewer = neuroglancer.Viewer()
        self.network_log = folder/'net.json'
        self.browser = open_browser(folder, 'window-size=1000,700', f'log-net-log={self.network_log}')
        self.browser.get(self.viewer.get_viewer_url())
        self._until = WebDriverWait(self.browser, 30, .05).until

    def js(self, code, *args): return self.browser.execute_script(f'return {code.strip()}', *args)

    def wait(self, code, *args):
        "Value of a JavaScript expression as soon as it is true"
        return self._until(lambda _: self.js(code, *args))

    def show(self, state):
        """Show a state until all of it is loaded, and return the picture. The state is set through Python: on a slow
        machine neuroglancer 2.41 loses layers of a state that is given in its address"""
        self.viewer.set_state(state)
        names = [layer['name'] for layer in state['layers']]
        self._until(lambda _: self.js('window.viewer && viewer.layerManager.managedLayers.map(l => l.name)') == names)
        self.wait('viewer.layerManager.managedLayers.every(l => l.isReady())')
        return self.viewer.screenshot().screenshot.image_pixels[..., :3].astype(int)

    def errors(self):
        "Status messages of the page, and messages of the layers"
        return self.js(status_messages) + self.js(layer_errors)

    def panel(self):
        "Names and values in the selection panel, with the related cells"
        self.wait('document.querySelector(arguments[0])', related_segments)
        return dict(self.js(panel_properties)) | dict(self.js(panel_segments))

    def annotation_in_the_centre(self):
        "Id of the annotation in the middle of the section, as the mouse picks it"
        section = self.browser.find_element('css selector', '.neuroglancer-rendered-data-panel')
        webdriver.ActionChains(self.browser).move_to_element(section).perform()
        return self.wait('viewer.mouseState.pickedAnnotationId')

@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    viewer = Viewer(tmp_path_factory.mktemp('browser'))
    yield viewer
    viewer.browser.quit()

@in_browser
@pytest.mark.parametrize('folder,id_offset,limit', [('annotations', 0, None), ('deep', 2**53, 2)],
    ids=['as exported', 'large ids in many levels'])
def test_neuroglancer_reads_the_annotations(folder, id_offset, limit, run, layers, table, viewer):
    table = table.assign(id=table.id+id_offset)
    if limit: write_annotations(run/folder, table, annotation_properties(table), limit)
    info = json.loads((run/folder/'info').read_text())
    levels = [level['key'] for level in info['spatial']]
    assert bool(limit) == (len(levels) > 1)
    synapse = table.iloc[4]
    state = viewer.parse(synapse.neuroglancer).to_json()
    state['layers'][3]['source'] = f'precomputed://{layers.address}/run/{folder}'
    state['selection'] = dict(layers=dict(synapses=dict(annotationId=str(synapse.id))))
    viewer.show(state)
    panel = viewer.panel()
    assert panel['ID'] == str(synapse.id)
    assert panel['pre'] == str(synapse.pre_root_id)
    assert panel['post'] == str(synapse.post_root_id)
    assert panel['pre_call'] == 'I (2)'
    assert panel['post_call'] == 'I (2)'
    assert panel['cluster'] == str(synapse.cluster)
    assert float(panel['cleft_um3']) == pytest.approx(synapse.cleft_um3, rel=1e-5)
    for level in levels:
        shard = f'/run/{folder}/{level}/[0-9a-f]+.shard'
        statuses = {status for path,status in layers.requests if re.fullmatch(shard, path)}
        assert statuses and statuses <= {200, 206}, level
    assert viewer.annotation_in_the_centre() == str(synapse.id)
    assert not viewer.errors()

def pixels_of_hue(picture, colour):
    "Coloured pixels of the hue of a colour such as `#0072b2`"
    hue = picture - picture.mean(-1, keepdims=True)
    target = np.array(list(bytes.fromhex(colour[1:])))
    target = target - target.mean()
    along = hue@target/np.linalg.norm(target)
    strength = np.linalg.norm(hue, axis=-1)
    return (strength > 20) & (along > .97*strength)

@in_browser
def test_link_of_the_table_opens(layers, table, viewer):
    "Section and cells are shown, in the colours that the link gives them"
    picture = viewer.show(viewer.parse(table.neuroglancer[2]).to_json())
    assert not viewer.errors()
    assert {status for _,status in layers.requests} <= {200, 206}
    for layer in ('em', 'seg', 'cleft'):
        assert any(re.match(rf'/{layer}/\d', path) for path,_ in layers.requests), layer
    for colour in ('#0072b2', '#e69f00', '#009e73'): assert pixels_of_hue(picture, colour).sum() > 50, colour

@in_browser
def test_link_shows_the_cleft_from_its_edge(run, layers, table, viewer):
    "In the section panel the presynaptic cell is above the cleft, and the postsynaptic cell below it"
    sources = {layer: LayerSource(path=str(run.parent/layer)) for layer in ('em', 'seg', 'cleft')}
    urls,_ = layer_urls(sources, layers.address)
    normals = table[['cleft_normal_x', 'cleft_normal_y', 'cleft_normal_z']]
    assert np.ptp(normals.to_numpy(), 0).max() > .5 # not all of them lie alike
    for link in links(table[table.frame_quality > .8][:6], urls, (40., 16., 16.)):
        state = viewer.parse(link).to_json() | dict(layout='xy', showAxisLines=False, crossSectionScale=.1)
        picture = viewer.show(state)
        picture = picture[picture.any((1, 2))] # without the bar above the panel
        middle = np.array(picture.shape[:2])//2
        near = picture[middle[0]-250:middle[0]+250, middle[1]-250:middle[1]+250]
        pre,cleft,post = (np.argwhere(pixels_of_hue(near, colour)) for colour in ('#0072b2', '#009e73', '#e69f00'))
        assert pre[:, 0].mean() < cleft[:, 0].mean() < post[:, 0].mean()
        assert np.ptp(cleft[:, 1]) > np.ptp(cleft[:, 0])
        assert abs(cleft.mean(0)-250).max() < 15 # in the middle, within 24 nm
    assert not viewer.errors()

@in_browser
def test_viewer_requests_nothing_from_elsewhere(layers, table, viewer):
    """Requests of the page and its workers are in the browser's network log. Requests that the browser makes for itself
    have no page as their initiator"""
    viewer.show(viewer.parse(table.neuroglancer[0]).to_json())
    viewer.browser.quit()
    events = json.loads(viewer.network_log.read_text())['events']
    requests = [event['params'] for event in events if 'initiator' in event.get('params', {})]
    urls = [request['url'] for request in requests if request['initiator'].startswith('http')]
    assert any(url.startswith(layers.address) for url in urls)
    assert not [url for url in urls if not re.match(r'(http://127\.0\.0\.1:\d+/|data:|blob:)', url)]

@pytest.mark.parametrize('fault,message', [
    ('map', r'map\.parquet.*synapseclr embed'),
    ('id', r'map\.parquet: no rows for 1 synapses, such as 7;'),
    ('graph', r'neighbours\.parquet: of other synapses'),
])
def test_map_does_not_fit(fault, message, run, tmp_path, run_command):
    """The map is missing, it lacks a synapse, or the graph is of other synapses: the error says so, and nothing is
    written"""
    ignored = shutil.ignore_patterns('annotations', 'deep', 'results.parquet', 'synapses.h5ad')
    copy = shutil.copytree(run, tmp_path/'run', ignore=ignored)
    other_id = dict(id={7: 777})
    if fault == 'map': (copy/'map.parquet').unlink()
    if fault == 'id':
        umap = read_table(copy/'map.parquet', 'map')
        write_table(umap.replace(other_id), copy/'map.parquet', 'map', {})
    if fault == 'graph':
        graph = read_table(copy/'neighbours.parquet', 'neighbours')
        write_table(graph.replace(other_id), copy/'neighbours.parquet', 'neighbours', dict(metric='cosine', recall=1.))
    before = set(copy.iterdir())
    code,text = run_command('export', '--config', run.parent/'tiny.toml', '--set', f'run={copy}', '--no-notebook')
    assert code == 1
    assert text.startswith('error: ')
    assert re.search(message, text)
    assert set(copy.iterdir()) - before <= {copy/'config.toml'}
