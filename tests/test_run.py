"`run` goes on where a stage has nothing to do or fails, and ends with 1 only for a failure."
import shutil
import numpy as np, pandas as pd, pytest
from synapseclr.analyse.query import QueryError
from synapseclr.data.tables import read_table
from synapseclr.data.volume import LayerSource, open_layer, write_layer
from synapseclr.dev.fixtures import tiny_volume
from synapseclr.pipeline.stages import open_run, stages, stages_of

@pytest.fixture(scope='module')
def volume(tmp_path_factory):
    "A configuration on 24 synapses of four axons; with a run of all stages that need no neurons, in `run` beside it"
    config = tiny_volume(tmp_path_factory.mktemp('volume'), n=24)
    c = open_run(config, [f'run={config.parent/"run"}'])
    for name in stages_of(c): stages[name](c)
    return config

@pytest.fixture(scope='module')
def cells(volume):
    "Presynaptic and postsynaptic cells"
    table = pd.read_csv(volume.parent/'synapses.csv')
    return table.presyn_segid.unique().tolist(),table.postsyn_segid.unique().tolist()

@pytest.fixture
def run_all(volume, run_command, tmp_path):
    "A function that does all stages with a table of neurons: exit code, output and run folder"
    def run(neurons, *options, config=volume):
        neurons.to_csv(tmp_path/'neurons.csv', index=False)
        if config == volume and not (tmp_path/'run').exists(): shutil.copytree(volume.parent/'run', tmp_path/'run')
        overrides = [f'run={tmp_path/"run"}', f'data.neurons="{tmp_path/"neurons.csv"}"', *options]
        arguments = [part for override in overrides for part in ('--set', override)]
        code,text = run_command('run', '--config', config, *arguments, '--no-notebook')
        return code,text,tmp_path/'run'
    return run

def types(**cells_of_type):
    "A table of neurons, from the cells of each type"
    rows = [(cell, cell_type) for cell_type,members in cells_of_type.items() for cell in members]
    return pd.DataFrame(rows, columns=['root_id', 'cell_type'])

def assert_complete(run):
    written = {path.name for path in run.iterdir()}
    assert {'results.parquet', 'synapses.h5ad', 'axes.parquet', 'imputed.parquet'} <= written
    assert not {'neurites.parquet', 'synapse_types.parquet'} & written
    assert 'pre_call' not in read_table(run/'results.parquet', 'results')

def test_one_type_only(run_all, cells):
    "What an earlier run of consensus had written, of two types, is gone"
    pre,post = cells
    code,text,run = run_all(types(exc=[*pre[:2], *post[::2]], inh=[*pre[2:], *post[1::2]]))
    assert code == 0
    assert 'consensus: done' in text
    assert {'pre_call', 'post_call'} <= set(read_table(run/'results.parquet', 'results'))
    code,text,run = run_all(types(exc=pre+post))
    assert code == 0
    assert 'inhibitory_pre: 0 for all synapses where it is known' in text
    assert 'consensus: nothing to do: no types were imputed' in text
    assert_complete(run)

def test_one_cell_of_each_type(run_all, cells):
    pre,_ = cells
    code,text,run = run_all(types(exc=pre[:1], inh=pre[1:2]))
    assert code == 0
    assert 'consensus: nothing to do: no types were imputed' in text
    assert_complete(run)

def test_no_trait(run_all, tmp_path):
    "Twelve synapses are too few for any trait: impute has nothing to do, and so has consensus after it"
    config = tiny_volume(tmp_path, n=12)
    table = pd.read_csv(tmp_path/'synapses.csv')
    code,text,run = run_all(types(exc=table.presyn_segid.unique()[::2], inh=table.presyn_segid.unique()[1::2]),
        config=config)
    assert code == 0
    assert 'impute: nothing to do: there is no trait to learn:' in text
    assert 'cleft_um3: known for 12 synapses, at least 20 are needed' in text
    assert 'consensus: nothing to do: no types were imputed' in text
    assert_complete(run)
    assert not (run/'imputation_scores.parquet').exists()

def test_one_presynaptic_cell(run_all, tmp_path):
    config = tiny_volume(tmp_path, n=24)
    layer = open_layer('seg', LayerSource(path=str(tmp_path/'seg')))
    cell_ids = np.asarray(layer.volume[:, :, :])[..., 0].T
    is_axon = (cell_ids >= 2**60) & (cell_ids < 2**61)
    shutil.rmtree(tmp_path/'seg')
    write_layer(tmp_path/'seg', np.where(is_axon, np.uint64(2**60), cell_ids), layer.voxel_nm)
    table = pd.read_csv(tmp_path/'synapses.csv').assign(presyn_segid=2**60)
    table.to_csv(tmp_path/'synapses.csv', index=False)
    post = table.postsyn_segid.tolist()
    code,text,run = run_all(types(exc=[2**60, *post[::2]], inh=post[1::2]), config=config)
    assert code == 0
    assert 'consensus: nothing to do: postsynaptic: 0 typed neurites with 0 synapses are too few' in text
    assert_complete(run)

def test_a_stage_fails(run_all, cells, monkeypatch):
    "What does not read its results is done. The exit code is 1, and the messages of all stages are printed"
    def fails(*args): raise QueryError('cannot be compared')
    monkeypatch.setattr('synapseclr.pipeline.stages.compare_retrieval', fails)
    pre,post = cells
    code,text,run = run_all(types(exc=pre+post))
    assert code == 1
    assert text == 'error: query: cannot be compared'
    assert_complete(run)

def test_a_stage_that_others_read_fails(run_all, cells):
    pre,post = cells
    code,text,run = run_all(types(exc=pre+post), 'qc.prompts=[999]')
    assert code == 1
    assert text.splitlines()[0] == 'error: qc: synapses 999 are not in this run'
    reason = 'not done, because it reads the results of'
    assert text.splitlines()[1:] == [f'  query: {reason} qc', f'  impute: {reason} qc', f'  consensus: {reason} impute',
        f'  manifold: {reason} qc', f'  export: {reason} qc']
    assert not (run/'imputed.parquet').exists()
