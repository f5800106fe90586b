"Tables as labs have them go through all stages: each row keeps its own values, whatever its labels, names and types."
import datetime, decimal, json
import anndata, numpy as np, pandas as pd, pytest
from synapseclr.data.results import MORPHOMETRIC_COLUMNS, is_reserved, read_results
from synapseclr.data.store import ChunkStore
from synapseclr.data.synapses import read_synapses
from synapseclr.data.tables import read_table
from synapseclr.ingest.remap import remap
from synapseclr.data.volume import LayerSource, open_layer
from synapseclr.pipeline.stages import open_run, stages
from synapseclr.show.explore import ExplorerData

# Everything that stages write, as columns of a lab
result_names = ['cluster', 'umap_1', 'umap_2', 'umap3_1', 'island', 'leiden', 'removed', 'defect_score', 'defect_fdr',
    'pre_um3', 'cleft_um3', 'cleft_cos_z', 'cleft_angle_z_deg', 'cleft_normal_x', 'n_blank_sections', 'pre_soma_um',
    'pre_soma_reason', 'post_mito', 'blank_fraction', 'reject_reason', 'visible_fraction', 'plan_block', 'plan_row',
    'cleft_um3_mean', 'p_inhibitory_pre', 'p_mito_post', 'pre_call', 'post_call', 'pre_inhibitory', 'pre_cell_type',
    'post_subtype', 'neuroglancer', 'distance', '_index', 'a/b', 'ctr_x_nm']

def lab_table(table):
    "The same synapses with columns of every type, every name of a result, and the ids as text"
    n = len(table)
    own = {name: 1000*table.cleft_segid + i for i,name in enumerate(result_names)}
    time = pd.Timestamp('2026-11-27 19:19:56')
    odd = dict(
        own=7*table.cleft_segid,
        pre_pt_position=[np.array([i, i+1, i+2]) for i in range(n)],
        partners=[[i]*(i%3) for i in range(n)],
        record=[dict(score=i, parts=np.arange(i%2)) for i in range(n)],
        raw=[b'spine', b'\xff']*(n//2),
        created=[time, pd.NaT]*(n//2),
        zoned=pd.Series([time, None]*(n//2)).dt.tz_localize('Europe/Berlin'),
        day=[datetime.date(2026, 11, 27), None]*(n//2),
        took=[datetime.timedelta(minutes=1), None]*(n//2),
        price=[decimal.Decimal('1.5'), None]*(n//2),
        valid=pd.array([True, None]*(n//2), 'boolean'),
        count=pd.array([2**62+1, None]*(n//2), 'Int64'),
        region=pd.Categorical(['NA', 'S1']*(n//2)),
        nothing=[None]*n)
    table = table.rename(columns=dict(centroid_x_nm='x')).assign(**own, **odd)
    table['presyn_segid'] = table.presyn_segid.astype(str)
    return table

@pytest.fixture(scope='module')
def runs(tiny_config, tmp_path_factory):
    "Two runs of the same synapses: of the plain table, and of a lab's table with labels in another order"
    folder = tmp_path_factory.mktemp('any_table')
    plain = pd.read_csv(tiny_config.parent/'synapses.csv')
    lab = lab_table(plain)
    shuffled = np.random.default_rng(0).permutation(len(lab))
    lab.set_axis(shuffled).to_parquet(folder/'lab.parquet')
    names = [stage for stage in stages if stage in ('fetch', 'annotate', 'train', 'extract', 'embed', 'query',
        'manifold', 'export')]
    runs = []
    lab_options = [f'data.table="{folder/"lab.parquet"}"', 'data.columns.ctr_x_nm="x"']
    for name,options in dict(plain=[], lab=lab_options).items():
        c = open_run(tiny_config, [f'run={folder/name}', 'train.epochs=1', 'train.cosine_period_epochs=1', *options])
        for stage in names: stages[stage](c)
        runs.append(c.folder)
    return runs

def table_of(run):
    "The synapse table of a run"
    return open_run(run).source.table

def test_results_are_the_same(runs):
    "Chunks, measurements and features do not depend on the columns of the lab"
    plain,lab = (read_table(run/'results.parquet', 'results') for run in runs)
    pd.testing.assert_frame_equal(lab[list(plain)].drop(columns='neuroglancer'), plain.drop(columns='neuroglancer'))
    stores = [ChunkStore.open(run/'chunks.zarr') for run in runs]
    assert all((stores[0][i].em == stores[1][i].em).all() for i in range(len(stores[0])))

def test_own_columns_stay_with_their_synapse(runs):
    "Also those that have the name of a result"
    table = read_table(runs[1]/'results.parquet', 'results')
    assert (table.own == 7*table.id).all()
    for i,name in enumerate(result_names):
        own = table[f"table_{name.replace('/', '_')}"]
        assert (own == 1000*table.id + i).all(), name
    assert (table.pre_pt_position_y - table.pre_pt_position_x == 1).all()
    assert table['count'].dropna().tolist() == [2**62+1]*6
    assert table.region.tolist() == ['NA', 'S1']*6
    assert table.created.dropna().unique().tolist() == ['2026-11-27 19:19:56']
    doubled = [name for name in table if name.endswith(('_x', '_y')) and not is_reserved(name)]
    assert doubled == ['table_cleft_normal_x', 'pre_pt_position_x', 'pre_pt_position_y']

def test_stages_write_reserved_columns_only(runs):
    "A new column of a stage has to be in the list, or a lab's column of that name would get in its way"
    source = read_synapses(table_of(runs[0])).drop(columns='reject_reason')
    added = [name for name in read_table(runs[0]/'results.parquet', 'results') if name not in source]
    assert len(added) > 20
    assert not [name for name in added if not is_reserved(name)]

def test_outputs_open(runs):
    "AnnData reads back, with the map of this run; the explorer answers for every column and row"
    adata = anndata.read_h5ad(runs[1]/'synapses.h5ad')
    positions = read_table(runs[1]/'map.parquet', 'map')
    np.testing.assert_allclose(adata.obsm['X_umap'], positions[['umap_1', 'umap_2']], rtol=1e-6)
    assert set(adata.obs.own) == set(7*adata.obs.id)
    table = read_results(runs[1])
    data = ExplorerData(table, ChunkStore.open(runs[1]/'chunks.zarr'))
    for k in range(len(data.columns)):
        assert json.loads(data.file(f'column/{k}.json'))['kind'] in ('category', 'number')
        assert data.file(f'column/{k}.bin')
    assert json.loads(data.file('rows/0.json'))[0]['created'] == '2026-11-27 19:19:56'

def test_results_as_the_table_of_a_new_run(runs, tiny_config, tmp_path):
    "A run on the table of an earlier run measures anew, in its own windows"
    options = ['fetch.window_nm=[400, 480, 480]']
    tables = {}
    for name,table in dict(original=table_of(runs[0]), earlier=runs[0]/'synapses.parquet').items():
        c = open_run(tiny_config, [f'run={tmp_path/name}', f'data.table="{table}"', *options])
        stages['fetch'](c)
        tables[name] = stages['annotate'](c)
    before = read_table(runs[0]/'synapses.parquet', 'synapses')
    pd.testing.assert_frame_equal(tables['earlier'][MORPHOMETRIC_COLUMNS], tables['original'][MORPHOMETRIC_COLUMNS])
    assert (tables['earlier'].pre_um3 < before.pre_um3).mean() > .5
    assert (tables['earlier'].table_pre_um3 == before.pre_um3).all()

def test_remap_of_a_labelled_table(tiny_config, tmp_path):
    "Each synapse gets the partners at its own points, whatever the labels of its row"
    plain = pd.read_csv(tiny_config.parent/'synapses.csv')
    points = {f'{side}_pt_{axis}_nm': plain[f'centroid_{axis}_nm'] for side in ('pre', 'post') for axis in 'xyz'}
    plain = plain.assign(**points)
    seg = open_layer('seg', LayerSource(path=str(tiny_config.parent/'seg')))
    plain.to_parquet(tmp_path/'plain.parquet', index=False)
    plain.set_axis(np.random.default_rng(1).permutation(len(plain))).to_parquet(tmp_path/'labelled.parquet')
    tables = [remap(read_synapses(tmp_path/f'{name}.parquet'), seg)[0] for name in ('plain', 'labelled')]
    pd.testing.assert_frame_equal(*tables)
    assert (tables[0].pre_remap != 'same').any()
