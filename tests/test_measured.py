"What is measured of synapses: stopped and continued, while synapses come, go and change, without mitochondria."
import numpy as np, pandas as pd, pytest
from synapseclr.data.features import profile_components_path, read_feature_sets, read_profile_components
from synapseclr.data.results import EDGE_COLUMNS, INTENSITY_COLUMNS, read_measurements, read_profiles
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_metadata
from synapseclr.dev.fixtures import tiny_fetched, tiny_volume
from synapseclr.ingest import annotate as annotate_module
from synapseclr.ingest.annotate import annotate
from synapseclr.ingest.cutout import DataConfig, FetchConfig
from synapseclr.ingest.fetch import fetch
from synapseclr.ingest.maintain import append, drop, refetch
from synapseclr.ingest.measure import measure, profile

LAYERS = ('em', 'seg', 'cleft', 'mito')

def fetch_again(folder, layers=LAYERS):
    data = DataConfig(table=str(folder/'synapses.csv'), **{layer: dict(path=str(folder/layer)) for layer in layers})
    fetch(data, FetchConfig(window_nm=(880, 896, 896), max_blank_fraction=1, max_per_shard=5), folder/'run')
    return folder/'run'

def assert_measured(run):
    "Every kept synapse has the measurements of its own chunk, in the table and in the files"
    table = annotate(run)
    store = ChunkStore.open(run/'chunks.zarr')
    kept = table[table.reject_reason == '']
    assert sorted(kept.id) == sorted(store.ids)
    rows = table.set_index('id')
    grey = read_measurements(run, store.ids, INTENSITY_COLUMNS)
    profiles = read_profiles(run, store.ids)
    for i,chunk in enumerate(store):
        measured = measure(chunk.em, chunk.mask, store.voxel_nm)
        for name in ('cleft_um3', 'contact_um2', 'cleft_normal_x', 'cleft_offset_z_nm', *EDGE_COLUMNS):
            np.testing.assert_array_equal(rows.loc[chunk.id, name], measured[name])
        np.testing.assert_array_equal(grey.iloc[i], [measured[name] for name in INTENSITY_COLUMNS])
        np.testing.assert_array_equal(profiles[i], profile(chunk.em, chunk.mask, store.voxel_nm).vector())
    return table

def files(run): return {path.name: path.stat().st_mtime_ns for path in (run/'annotate').iterdir()}

def test_stopped_and_continued(tmp_path, monkeypatch):
    run = tiny_fetched(tmp_path, max_per_shard=5)
    measure_store = annotate_module.measure_store
    measured_ids = []
    def stop_in_second(store, ids, mito_measured, frames):
        if measured_ids: raise RuntimeError('stopped')
        measured_ids.extend(ids)
        return measure_store(store, ids, mito_measured, frames)
    monkeypatch.setattr(annotate_module, 'measure_store', stop_in_second)
    with pytest.raises(RuntimeError, match='stopped'): annotate(run)
    assert list(files(run)) == ['000000.parquet']
    monkeypatch.setattr(annotate_module, 'measure_store', measure_store)
    before = files(run)
    assert_measured(run)
    assert before.items() <= files(run).items() # the first shard was not measured again

def test_synapses_come_go_and_change(tmp_path):
    "Profiles stay on the components that were fitted first; only shards that changed are measured again"
    tiny_volume(tmp_path)
    everything = pd.read_csv(tmp_path/'synapses.csv')
    everything[:7].to_csv(tmp_path/'synapses.csv', index=False)
    run = fetch_again(tmp_path)
    first = assert_measured(run)
    components = read_profile_components(run)
    profiles = read_feature_sets(run, names=['profile'])[1]['profile']
    everything.to_csv(tmp_path/'more.csv', index=False)
    assert append(run, tmp_path/'more.csv') == 5
    fetch_again(tmp_path)
    assert len(assert_measured(run)) == 12
    for before,after in zip(components, read_profile_components(run)): np.testing.assert_array_equal(before, after)
    assert read_metadata(profile_components_path(run))['provenance']['n_synapses'] == 7
    table,sets = read_feature_sets(run, names=['profile'])
    at = pd.Index(table.id).get_indexer(first.id)
    # the same up to the mean and the scale of the set
    assert np.corrcoef(sets['profile'][at, 0], profiles[:, 0])[0, 1] > .9999

    before = files(run)
    refetch(run, [int(everything.cleft_segid[0])])
    fetch_again(tmp_path)
    assert_measured(run)
    assert [name for name,time in before.items() if files(run)[name] != time] == [] # the chunks are what they were

    plan_block = pd.read_parquet(run/'fetch/plan.parquet').set_index('id').plan_block
    last_shard = plan_block.index[plan_block == plan_block.max()]
    drop(run, last_shard.tolist())
    fetch_again(tmp_path)
    table = assert_measured(run)
    assert table.set_index('id').cleft_um3[last_shard].isna().all()
    assert f'{plan_block.max():06d}.parquet' not in files(run)

def test_no_mitochondria_layer(tmp_path):
    "What was not measured is left out of every feature set"
    tiny_volume(tmp_path)
    run = fetch_again(tmp_path, LAYERS[:3])
    table = annotate(run)
    assert table[['pre_mito', 'pre_mito_um3', 'post_mito_um3']].isna().all().all()
    sets = read_feature_sets(run, names=['morphometrics', 'intensity', 'edges', 'profile', 'measured'])[1]
    assert sets['morphometrics'].shape == (12, 5)
    assert sets['measured'].shape[1] == sum(x.shape[1] for name,x in sets.items() if name != 'measured')
    assert np.isfinite(sets['measured']).all()
