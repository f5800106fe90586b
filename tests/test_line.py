"All stages on a tiny volume: through papermill, as functions, and killed in every stage."
import json, shutil, signal
import pandas as pd, pytest
from conftest import Links, command_code, files, forked, kill_at, synapseclr
from synapseclr.pipeline.stages import open_run, stages, stages_of
from synapseclr.data.features import read_features
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_table

outputs = ['chunks.zarr/**/*', 'fetch/*', 'synapses.parquet', 'train/weights.safetensors', 'train/log.jsonl',
    'features*/*.parquet', 'neighbours.parquet', 'map.parquet', 'probe_scores.parquet', 'retrieval.parquet',
    'axes.parquet', 'axis_correlations.parquet', 'islands.parquet', 'annotations/**/*']

# The stages of a run on a volume without a phantom, a neuron table and labelled defects
volume_stages = [stage for stage in stages if stage not in ('phantom', 'qc', 'impute', 'consensus', 'evaluate')]

@pytest.fixture(scope='module')
def full_run(tiny_config, tmp_path_factory):
    "A run of all stages, with notebooks"
    cwd = tmp_path_factory.mktemp('full')
    done = synapseclr('run', '--config', tiny_config, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert [stage for stage in stages if f'] {stage}: ' in done.stdout] == volume_stages
    assert f'report: {cwd/"_runs/tiny/report/index.html"}' in done.stdout
    assert '12 of 12 synapses kept' in done.stdout
    return cwd/'_runs/tiny'

@pytest.fixture
def command_again(full_run, tiny_config):
    "A function that runs the command once more on the full run, without notebooks"
    def run(stage, *args):
        return forked(command_code, stage, '--config', tiny_config, '--no-notebook', *args,
            cwd=full_run.parent.parent)
    return run

def test_outputs(full_run):
    store = ChunkStore.open(full_run/'chunks.zarr')
    table = read_table(full_run/'synapses.parquet', 'synapses')
    assert len(table) == 12
    assert (table.reject_reason == '').sum() == len(store)
    for folder in ('features', 'features_untrained'):
        for layer in ('backbone', 'hidden', 'projection'):
            ids,x = read_features(full_run/folder, layer)
            assert sorted(ids) == sorted(store.ids)
            assert x.shape == (len(store), 128)
            assert (x.std(0) > 0).any()
    retrieval = read_table(full_run/'retrieval.parquet', 'retrieval')
    assert set(retrieval.features) == {'trained', 'untrained', 'morphometrics', 'intensity',
        'profile', 'measured', 'trained + measured'}
    assert retrieval.mean_average_precision.between(0, 1).all()

def test_zarr_and_pandas_read_the_outputs(full_run):
    "Without this package"
    import zarr
    assert zarr.open(full_run/'chunks.zarr')['em'].shape[1:] == ChunkStore.open(full_run/'chunks.zarr').chunk_shape
    features = pd.concat(map(pd.read_parquet, sorted((full_run/'features').glob('*.parquet'))))
    assert len(pd.read_parquet(full_run/'synapses.parquet').merge(features, on='id')) == 12

def test_report(full_run):
    "Every stage has a page with its figures; pages load nothing from elsewhere; no cell printed a warning"
    pages = {path.stem: path.read_text() for path in (full_run/'report').glob('*.html')}
    assert set(pages) == {'index', *volume_stages}
    for name,page in pages.items():
        loads = Links(page).loads
        assert not [url for url in loads if not url.startswith('data:')], name
        assert 'import(' not in page
        assert '@import' not in page
        assert '%|' not in page.replace('100%|', '') # a progress bar
        if name not in ('index', 'export'): assert any(url.startswith('data:image/png') for url in loads), name
    for path in Links(pages['index']).leads: assert (full_run/'report'/path).exists()
    for path in (full_run/'report').glob('*.ipynb'):
        cells = json.loads(path.read_text())['cells']
        cell_outputs = [output for cell in cells for output in cell.get('outputs', [])]
        noise = [output for output in cell_outputs
            if output.get('name') == 'stderr' or output['output_type'] == 'error']
        assert not noise, path

def test_notebooks_change_nothing(full_run, tiny_config, tmp_path):
    "The functions alone write the same files"
    assert forked(command_code, 'run', '--config', tiny_config, '--no-notebook', cwd=tmp_path).returncode == 0
    assert files(tmp_path/'_runs/tiny', *outputs) == files(full_run, *outputs)

def test_extract_uses_the_network_of_the_weights(full_run, command_again):
    """The untrained network has the architecture of the weights, whatever the configuration says now. Cubes that differ
    from those of training are refused"""
    changes = ['--set', 'train.model=paper', '--set', 'train.seed=5']
    assert command_again('extract', *changes).returncode == 0
    assert read_features(full_run/'features_untrained')[1].shape[1] == 128
    done = command_again('extract', *changes, '--set', 'cube.size=96')
    assert done.returncode == 1
    assert 'trained on other views than are asked for: cube.size = 96' in done.stderr

def test_other_weights(full_run, command_again, tmp_path):
    """MedicalNet's weights give features of the same synapses. If the file of weights is missing, the error says where
    to get it"""
    import torch
    from synapseclr.learn.model import SynapseNet
    state = SynapseNet('medicalnet', 3).backbone.state_dict()
    torch.save({f'module.{name}': tensor for name,tensor in state.items()}, tmp_path/'resnet_18.pth')
    done = command_again('extract', '--weights', tmp_path/'resnet_18.pth')
    assert done.returncode == 0, done.stderr
    ids,x = read_features(full_run/'features_resnet_18')
    trained_ids,_ = read_features(full_run/'features')
    assert x.shape[1] == 512
    assert (ids == trained_ids).all()
    assert x.std(0).mean() > 0
    shutil.rmtree(full_run/'features_resnet_18')
    done = command_again('extract', '--weights', tmp_path/'resnet_10.pth')
    assert done.returncode == 1
    assert 'resnet_10.pth: there is no such file; get the weights from their authors' in done.stderr

def test_second_run_does_nothing(full_run, command_again):
    def modification_times():
        patterns = ('chunks.zarr/**/c/**/*', 'features/*', 'train/checkpoint*')
        paths = [path for pattern in patterns for path in full_run.glob(pattern) if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in paths}
    before = modification_times()
    parts = {part for path in before for part in path.relative_to(full_run).parts}
    assert {'em', 'mask', 'features', 'train'} <= parts
    assert command_again('run').returncode == 0
    assert modification_times() == before

# In the order of the stages. Calls are counted from where the process before was killed
kills = {
    'fetch, before the plan': kill_at('synapseclr.ingest.fetch', 'write_table', 1),
    'fetch, making the store': kill_at('zarr', 'create_array', 3, in_class='Group'),
    'fetch, writing the second shard': kill_at('synapseclr.data.store', 'write_shard', 2, in_class='ChunkStore'),
    'fetch, before the record of a shard': kill_at('synapseclr.ingest.fetch', 'atomic', 1),
    'fetch, before the table': kill_at('synapseclr.ingest.fetch', 'write_table', 1),
    'annotate, before the table': kill_at('synapseclr.ingest.annotate', 'write_table', 1),
    'train, in a step': kill_at('synapseclr.learn.train', 'nt_xent', 7),
    'train, writing a checkpoint': kill_at('safetensors.torch', 'save_file', 2),
    'train, before the weights': kill_at('synapseclr.learn.train', 'save_weights', 1),
    'extract, second shard': kill_at('synapseclr.learn.extract', 'write_feature_file', 2),
    'embed, before the map': kill_at('synapseclr.analyse.embed', 'write_table', 2),
    'export, in the annotations': kill_at('synapseclr.show.neuroglancer', '_write_shards', 3),
    'export, before the table': kill_at('synapseclr.show.export', 'write_table', 1),
}

def test_killed_and_resumed(full_run, tiny_config, tmp_path):
    "A run that was killed in every stage, and resumed each time, has the same files as the uninterrupted run"
    for moment,code in kills.items():
        killed = forked(code, 'run', '--config', tiny_config, '--no-notebook', cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stderr)
    done = forked(command_code, 'run', '--config', tiny_config, '--no-notebook', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path/'_runs/tiny', *outputs) == files(full_run, *outputs)

@pytest.mark.parametrize('voxel_nm', [(40, 7.16, 7.16), (47.5, 9.2, 9.2), (10, 10, 10)], ids=str)
def test_any_voxel(voxel_nm, tmp_path):
    "One configuration in nm works for every voxel size"
    from synapseclr.dev.fixtures import tiny_volume
    overrides = [f'run={tmp_path/"run"}', 'train.batch_size=2', 'train.epochs=1', 'fetch.central_sections=60']
    config = open_run(tiny_volume(tmp_path, n=4, voxel_nm=voxel_nm), overrides)
    for name in stages_of(config): stages[name](config)
    store = ChunkStore.open(tmp_path/'run/chunks.zarr')
    z,y,x = voxel_nm
    assert store.voxel_nm == voxel_nm
    assert store.chunk_shape == (min(60, round(880/z)), round(896/y), round(896/x))
    assert len(read_features(tmp_path/'run/features')[0]) == len(store) == 4
