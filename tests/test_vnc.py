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
    "The whole line, with one epoch of training"
    folder = tmp_path_factory.mktemp('vnc')
    done = synapseclr('run', '--config', root/'configs/vnc.toml', '--set', f'run={folder}', '--set', 'train.epochs=1',
        '--set', 'train.checkpoint_every_steps=5', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder

def test_fetch(run):
    table = read_table(run/'synapses.parquet', 'synapses')
    assert len(table) == 328 and table.cleft_id.nunique() == 47
    kept = table[table.reject_reason == '']
    store = ChunkStore.open(run/'chunks.zarr')
    assert len(kept) == len(store) and store.voxel_nm == (47.5, 9.2, 9.2)
    assert .3 < store.attrs['mean'] < .8 and .05 < store.attrs['sd'] < .3

def test_chunks_are_where_the_table_says(run):
    "Against the whole layers, cut with numpy"
    layers = {o: (l := open_layer(o, LayerSource(path=str(data/'precomputed'/o), mip=1))) and read(l, l.box)
        for o in ('em', 'seg', 'cleft')}
    source = pd.read_csv(data/'synapse_table.csv').set_index('id')
    store = ChunkStore.open(run/'chunks.zarr')
    blank = read_table(run/'synapses.parquet', 'synapses').set_index('id').blank_fraction
    assert len(store) == (blank < .5).sum()
    padded,(d,h,w) = {k: np.pad(v, 100) for k,v in layers.items()},store.chunk_shape
    for id_,em,mask in (store[i] for i in range(0, len(store), 3)):
        row = source.loc[id_]
        z,y,x = (int(np.floor(row[f'centroid_{a}_nm']/v+.5)) for a,v in zip('zyx', store.voxel_nm))
        cut = {k: v[z+100-d//2:, y+100-h//2:, x+100-w//2:][:d, :h, :w] for k,v in padded.items()}
        assert blank[id_] == (cut['em'] == 0).mean()
        assert np.array_equal(em, cut['em'])
        assert np.array_equal((mask & PRE) > 0, cut['seg'] == row.presyn_segid) and np.array_equal((mask & POST) > 0,
            cut['seg'] == row.postsyn_segid)
        assert np.array_equal((mask & CLEFT) > 0, cut['cleft'] == row.cleft_segid)

def test_retrieval_report(run):
    result = read_table(run/'retrieval.parquet', 'retrieval').set_index(['synapses', 'features'])
    assert set(result.index.get_level_values(1)) == {'trained', 'untrained', 'morphometrics'}
    assert (result.n_groups[:3] == 14).all() and result.mean_average_precision.between(result.lo95, result.hi95).all()
    assert (run/'report/query.html').exists()
