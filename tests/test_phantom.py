"Phantoms of version 2, from the command to measurements; version 1 is held by the notebook of the phantom."
import numpy as np, pandas as pd, pytest
from conftest import files
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_table
from synapseclr.data.volume import LayerSource, open_layer
from synapseclr.dev.fixtures import tiny_phantom
from synapseclr.phantom import build
from synapseclr.phantom.build import LATENTS, NUISANCES, PAINTED, make_phantom
from synapseclr.phantom.connectome import PhantomConfig, SIZES
from synapseclr.pipeline.stages import annotate_stage, fetch_stage, open_run, phantom_stage

def test_fetch_and_annotate(tmp_path):
    "A configuration with `version = 2` runs, and its truth joins what was measured"
    config,_ = tiny_phantom('phantom')
    c = open_run(config, [f'run={tmp_path}', 'phantom.version=2'])
    for stage in (phantom_stage, fetch_stage, annotate_stage): stage(c)
    table = read_table(tmp_path/'synapses.parquet', 'synapses')
    truth = pd.read_parquet(tmp_path/'phantom/truth.parquet')
    joined = table.merge(truth, on='id', validate='1:1', suffixes=(None, '_truth'))
    assert len(joined) == len(table) > 40
    kept = joined[(joined.reject_reason == '') & (joined.defect == '')]
    assert len(kept) > 20 and len(ChunkStore.open(tmp_path/'chunks.zarr')) >= len(kept)
    assert kept[LATENTS].notna().all(axis=None) and kept[[*NUISANCES, *PAINTED[4:]]].notna().all(axis=None)
    assert kept.cleft_um3.corr(kept.psd_radius_nm, method='spearman') > .5
    assert not kept.novel.all() and (kept.novel == (kept.pre_kind == 'neurogliaform')).all()

def test_same_seed_same_bytes(tmp_path):
    config = PhantomConfig(seed=7, version=2, shape=(64, 250, 250)) # width is no multiple of the grid of the optics
    first,second = (make_phantom(tmp_path/name, config) for name in 'ab')
    assert files(first, '**/*') == files(second, '**/*')

@pytest.mark.parametrize('size', SIZES)
def test_resolution_of_each_size(size, tmp_path):
    "A small block at the resolution of each size; synapses and vesicles have the same size in nm"
    voxel_nm = PhantomConfig(**SIZES[size]).voxel_nm
    shape = (64, *[round(3660/nm) for nm in voxel_nm[1:]])
    make_phantom(tmp_path, PhantomConfig(seed=5, version=2, shape=shape, voxel_nm=voxel_nm))
    truth = pd.read_parquet(tmp_path/'truth.parquet')
    synapses = pd.read_parquet(tmp_path/'synapses.parquet')
    cleft_um3 = synapses.cleft_vx.median()*np.prod(voxel_nm)/1e9
    assert .0008 < cleft_um3 < .004
    assert 40 < truth.n_vesicles.median() < 400

def test_command(tmp_path, run_command):
    code,text = run_command('phantom', '--out', tmp_path/'p', '--size', 'small', '--version', '2')
    assert code == 0 and 'synapses; layers' in text
    assert 'novel' in pd.read_parquet(tmp_path/'p/truth.parquet')
    code,text = run_command('phantom', '--out', tmp_path/'p', '--size', 'small')
    assert code == 1 and 'other options' in text

def test_last_synapse_is_dropped(tmp_path, monkeypatch):
    "The cleft of a synapse that was painted but is too small belongs to nobody, also if it was the last one"
    paint = build.paint
    monkeypatch.setattr(build, 'paint', lambda *args: paint(*args).iloc[:-1])
    config = PhantomConfig(seed=7, shape=(64, 250, 250))
    make_phantom(tmp_path, config)
    clefts = open_layer('cleft', LayerSource(path=str(tmp_path/'cleft')))
    truth = pd.read_parquet(tmp_path/'truth.parquet')
    labels = np.unique(clefts.volume[:, :, :])
    assert set(labels) - {0} <= set(truth.id)
