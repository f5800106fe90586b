"Real EM: mouse cortex with synapses that experts described. Needs the data beside the repository."
import numpy as np, pandas as pd, pytest
from conftest import root, synapseclr
from synapseclr import cleft_frame
from synapseclr.data.store import CLEFT, ChunkStore, POST, PRE
from synapseclr.data.tables import read_table
from synapseclr.evaluate.expert import EvaluateConfig, read_truth, truth_targets
from synapseclr.evaluate.kasthuri import EXPERT_COLUMNS, convert, read_volume

data = root.parent/'shared/data/ac3_mouse_s1'
pytestmark = pytest.mark.skipif(not data.exists(), reason='AC3 is not at ../shared/data/ac3_mouse_s1')

@pytest.fixture(scope='module')
def volume(): return read_volume(data)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "AC3 as layers and tables, fetched at 12 nm and annotated"
    folder = tmp_path_factory.mktemp('ac3')
    layers = convert(data, folder/'ac3')
    config = (root/'configs/ac3.toml').read_text().replace('../_runs/kasthuri/ac3', str(layers))
    (folder/'ac3.toml').write_text(config)
    for stage in ('fetch', 'annotate'):
        done = synapseclr(stage, '--config', 'ac3.toml', '--no-notebook', cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder/'_runs/ac3'

def test_all_described_synapses_are_kept(run, volume):
    table = read_table(run/'synapses.parquet', 'synapses')
    assert len(table) == len(volume.synapses) == 173
    kept = table.id[table.reject_reason == '']
    assert len(kept) == 163
    described = volume.synapses.id[volume.synapses.expert_psd_size_px.notna()]
    assert len(described) == 101
    assert described.isin(kept).all()

def test_chunks_are_where_the_stacks_say(run, volume):
    "At 12 nm: means of 2 x 2 pixels, and every second pixel of the labels"
    store = ChunkStore.open(run/'chunks.zarr')
    assert store.voxel_nm == (30, 12, 12)
    em = volume.em.reshape(150, 512, 2, 512, 2).mean((2, 4), dtype=np.float32).round()
    seg,cleft = volume.seg[:, ::2, ::2],volume.cleft[:, ::2, ::2]
    synapses = volume.synapses.set_index('id')
    padding = np.array([30, 60, 60])
    padded = {name: np.pad(voxels, [(n, n) for n in padding])
        for name,voxels in dict(em=em, seg=seg, cleft=cleft).items()}
    for i in range(0, len(store), 9):
        synapse_id,chunk_em,mask = store[i]
        row = synapses.loc[synapse_id]
        centre = np.floor(row[['ctr_z_nm', 'ctr_y_nm', 'ctr_x_nm']].to_numpy(float)/store.voxel_nm+.5).astype(int)
        start = centre + padding - np.array(store.chunk_shape)//2
        window = tuple(slice(lo, lo+n) for lo,n in zip(start, store.chunk_shape))
        inside = np.pad(np.ones(em.shape, bool), [(n, n) for n in padding])[window]
        assert np.array_equal(chunk_em[inside], np.maximum(padded['em'][window], 1)[inside])
        assert np.array_equal((mask & PRE) > 0, padded['seg'][window] == row.pre_root_id)
        assert np.array_equal((mask & POST) > 0, padded['seg'][window] == row.post_root_id)
        assert np.array_equal((mask & CLEFT) > 0, padded['cleft'][window] == synapse_id)

def test_frames_of_real_clefts(run):
    "Presynaptic voxels are above the cleft, postsynaptic ones below"
    store = ChunkStore.open(run/'chunks.zarr')
    middle = np.array(store.chunk_shape)//2
    frames = [cleft_frame(chunk.mask, store.voxel_nm) for chunk in store]
    quality = np.array([frame.quality for frame in frames])
    assert np.median(quality) > .9
    assert (quality > .4).mean() > .97
    n_right = 0
    for chunk,frame in zip(store, frames):
        depths = {}
        for bit in (PRE, POST):
            offset = (np.argwhere((chunk.mask & bit) > 0)-middle)*store.voxel_nm - frame.centre_nm
            near = (offset**2).sum(1) < 200**2
            depths[bit] = (offset[near]@frame.normal).mean()
        n_right += depths[PRE] < 0 < depths[POST]
    assert n_right >= 160 # of 163

def test_targets(run):
    "What the experts say becomes these targets, with as many synapses as the paper's table has"
    ids = ChunkStore.open(run/'chunks.zarr').ids
    truth = read_truth(run.parent.parent/'ac3/truth.csv', ids)
    assert list(truth) == EXPERT_COLUMNS
    targets,reasons = truth_targets(truth, EvaluateConfig(log=['psd_size_px', 'vesicle_count', 'spine_volume_vx']))
    counts = {(target.name, target.metric): (int(target.known.sum()), int(target.y[target.known].sum())
        if target.metric == 'AUC' else None) for target in targets}
    assert reasons == []
    assert counts == {
        ('psd_size_px', 'EV'): (101, None), ('psd_size_px', 'Spearman'): (101, None),
        ('on_spine', 'AUC'): (101, 82),
        ('axon = inhibitory', 'AUC'): (101, 10),
        ('vesicle_count', 'EV'): (100, None), ('vesicle_count', 'Spearman'): (100, None),
        ('spine_volume_vx', 'EV'): (82, None), ('spine_volume_vx', 'Spearman'): (82, None),
        ('bouton_mitochondrion', 'AUC'): (101, 29)}

def test_neurons_are_partners(run):
    neurons = pd.read_csv(run.parent.parent/'ac3/neurons.csv')
    assert neurons.cell_type.value_counts().to_dict() == {'excitatory': 60, 'inhibitory': 5}
    assert neurons.root_id.is_unique
