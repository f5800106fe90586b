"Real EM: a fly's ventral nerve cord. Needs the data beside the repository."
import numpy as np, pandas as pd, pytest
from conftest import root, synapseclr
from synapseclr.data.store import CLEFT, ChunkStore, POST, PRE
from synapseclr.data.tables import read_table
from synapseclr.data.volume import LayerSource, open_layer, read

data = root.parent/'shared/data/vnc_sstem'
pytestmark = pytest.mark.skipif(not data.exists(), reason='the VNC volume is not at ../shared/data/vnc_sstem')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of all stages, with one epoch of training"
    folder = tmp_path_factory.mktemp('vnc')
    done = synapseclr('run', '--config', root/'configs/vnc.toml', '--set', f'run={folder}', '--set', 'train.epochs=1',
        '--set', 'train.checkpoint_every_steps=5', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder

def test_fetch(run):
    table = read_table(run/'synapses.parquet', 'synapses')
    assert len(table) == 328
    assert table.cleft_id.nunique() == 47
    kept = table[table.reject_reason == '']
    store = ChunkStore.open(run/'chunks.zarr')
    assert len(kept) == len(store)
    assert store.voxel_nm == (47.5, 9.2, 9.2)
    assert .3 < store.attrs['mean'] < .8
    assert .05 < store.attrs['sd'] < .3

def whole_layer(name):
    layer = open_layer(name, LayerSource(path=str(data/'precomputed'/name), mip=1))
    return read(layer, layer.box)

def test_chunks_are_where_the_table_says(run):
    "Compared with windows that numpy cuts from the whole layers"
    padding = 100
    layers = {name: whole_layer(name) for name in ('em', 'seg', 'cleft')}
    assert (layers['em'].max((1, 2)) > 0).all() # no section is lost,
    layers['em'][layers['em'] == 0] = 1 # so black is tissue; 0 means missing in a store
    layers = {name: np.pad(voxels, padding) for name,voxels in layers.items()}
    source = pd.read_csv(data/'synapse_table.csv').set_index('id')
    store = ChunkStore.open(run/'chunks.zarr')
    blank = read_table(run/'synapses.parquet', 'synapses').set_index('id').blank_fraction
    assert len(store) == (blank < .5).sum()
    for i in range(0, len(store), 3):
        synapse_id,em,mask = store[i]
        synapse = source.loc[synapse_id]
        window = []
        for axis,voxel,size in zip('zyx', store.voxel_nm, store.chunk_shape):
            start = int(np.floor(synapse[f'centroid_{axis}_nm']/voxel+.5)) + padding - size//2
            window.append(slice(start, start+size))
        cut = {name: voxels[tuple(window)] for name,voxels in layers.items()}
        assert blank[synapse_id] == (cut['em'] == 0).mean()
        assert np.array_equal(em, cut['em'])
        assert np.array_equal((mask & PRE) > 0, cut['seg'] == synapse.presyn_segid)
        assert np.array_equal((mask & POST) > 0, cut['seg'] == synapse.postsyn_segid)
        assert np.array_equal((mask & CLEFT) > 0, cut['cleft'] == synapse.cleft_segid)

def test_retrieval_report(run):
    retrieval = read_table(run/'retrieval.parquet', 'retrieval').set_index(['synapses', 'features'])
    assert set(retrieval.index.get_level_values(1)) == {'trained', 'untrained', 'morphometrics', 'intensity',
        'profile', 'measured', 'trained + measured'}
    assert (retrieval.n_groups[:3] == 14).all()
    assert retrieval.mean_average_precision.between(retrieval.lo95, retrieval.hi95).all()
    assert (run/'report/query.html').exists()
