"The whole line on a tiny volume: through papermill, and killed in every stage."
import json, shutil, signal
from html.parser import HTMLParser
import pandas as pd, pytest
from conftest import files, kill_at, python, synapseclr
from synapseclr.pipeline.stages import open_run, stages, stages_of
from synapseclr.data.features import FeatureError, read_features
from synapseclr.data.store import ChunkStore
from synapseclr.data.tables import read_table

everything = ['chunks.zarr/**/*', 'fetch/*', 'synapses.parquet', 'train/weights.safetensors', 'train/log.jsonl',
    'features*/*.parquet', 'neighbours.parquet', 'map.parquet', 'probe_scores.parquet', 'retrieval.parquet',
    'axes.parquet', 'axis_correlations.parquet', 'islands.parquet', 'annotations/**/*']

# of a run on data of one's own
line = [s for s in stages if s not in ('phantom', 'qc', 'impute', 'consensus', 'evaluate')]

@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    "A run of all stages, with notebooks"
    cwd = tmp_path_factory.mktemp('whole')
    done = synapseclr('run', '--config', tiny, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert [s for s in stages if f'] {s}: ' in done.stdout] == line
    assert f'report: {cwd/"_runs/tiny/report/index.html"}' in done.stdout and '12 of 12 synapses kept' in done.stdout
    return cwd/'_runs/tiny'

def test_outputs(whole):
    store = ChunkStore.open(whole/'chunks.zarr')
    table = read_table(whole/'synapses.parquet', 'synapses')
    assert len(table) == 12 and (table.reject_reason == '').sum() == len(store)
    for folder in ('features', 'features_untrained'):
        for layer in ('backbone', 'hidden', 'projection'):
            ids,x = read_features(whole/folder, layer)
            assert sorted(ids) == sorted(store.ids) and x.shape == (len(store), 128) and (x.std(0) > 0).any()
    result = read_table(whole/'retrieval.parquet', 'retrieval')
    assert set(result.features) == {'trained', 'untrained',
        'morphometrics'} and result.mean_average_precision.between(0, 1).all()

def test_others_can_read_it(whole):
    "Without this package"
    import zarr
    assert zarr.open(whole/'chunks.zarr')['em'].shape[1:] == ChunkStore.open(whole/'chunks.zarr').chunk_shape
    features = pd.concat(map(pd.read_parquet, sorted((whole/'features').glob('*.parquet'))))
    assert len(pd.read_parquet(whole/'synapses.parquet').merge(features, on='id')) == 12

class Links(HTMLParser):
    "What a page loads, and where it leads"
    def __init__(self, page):
        super().__init__()
        self.loads = []
        self.leads = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag in ('script', 'img', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') == 'stylesheet': self.loads.append(a['href'])
        if tag == 'a' and a.get('href'): self.leads.append(a['href'])

def test_report(whole):
    "Every stage has a page with its figures; pages load nothing from elsewhere; no cell warned"
    pages = {p.stem: p.read_text() for p in (whole/'report').glob('*.html')}
    assert set(pages) == {'index', *line}
    for name,page in pages.items():
        links = Links(page)
        assert not [o for o in links.loads if not o.startswith('data:')], name
        assert 'import(' not in page and '@import' not in page and '%|' not in page.replace('100%|', '')
        if name not in ('index', 'export'): assert any(o.startswith('data:image/png') for o in links.loads), name
    for o in Links(pages['index']).leads: assert (whole/'report'/o).exists()
    for p in (whole/'report').glob('*.ipynb'):
        outputs = [o for c in json.loads(p.read_text())['cells'] for o in c.get('outputs', [])]
        assert not [o for o in outputs if o.get('name') == 'stderr' or o['output_type'] == 'error'], p

def test_notebooks_change_nothing(whole, tiny, tmp_path):
    "The functions alone make the same files"
    assert synapseclr('run', '--config', tiny, '--no-notebook', cwd=tmp_path).returncode == 0
    assert files(tmp_path/'_runs/tiny', *everything) == files(whole, *everything)

def test_extract_knows_its_network(whole, tiny):
    """The untrained network is that of the weights, whatever the configuration says now; other views than it was
    trained on are refused"""
    extract = ['extract', '--config', tiny, '--set', 'train.model=paper', '--set', 'train.seed=5', '--no-notebook']
    assert synapseclr(*extract, cwd=whole.parent.parent).returncode == 0
    assert read_features(whole/'features_untrained')[1].shape[1] == 128
    done = synapseclr(*extract, '--set', 'cube.size=96', cwd=whole.parent.parent)
    assert done.returncode == 1 and 'trained on other views than are asked for: cube.size = 96' in done.stderr

def test_other_networks(whole, tiny, tmp_path):
    "MedicalNet's weights describe the same synapses; weights that are nowhere are asked for"
    import torch
    from synapseclr.learn.model import SynapseNet
    torch.save({f'module.{k}': v for k,v in SynapseNet('medicalnet', 3).backbone.state_dict().items()},
        tmp_path/'resnet_18.pth')
    extract = ['extract', '--config', tiny, '--no-notebook', '--weights']
    done = synapseclr(*extract, tmp_path/'resnet_18.pth', cwd=whole.parent.parent)
    assert done.returncode == 0, done.stderr
    (ids,x),(same,_) = read_features(whole/'features_resnet_18'),read_features(whole/'features')
    assert x.shape[1] == 512 and (ids == same).all() and x.std(0).mean() > 0
    shutil.rmtree(whole/'features_resnet_18')
    done = synapseclr(*extract, tmp_path/'resnet_10.pth', cwd=whole.parent.parent)
    assert done.returncode == 1 and 'resnet_10.pth: there is no such file; get the weights from their authors' in done.stderr

def test_again_does_nothing(whole, tiny):
    def stamps():
        return {p: p.stat().st_mtime_ns for o in ('chunks.zarr/**/c/**/*', 'features/*', 'train/checkpoint*')
            for p in whole.glob(o) if p.is_file()}
    before = stamps()
    assert {'em', 'mask', 'features', 'train'} <= {part for p in before for part in p.relative_to(whole).parts}
    assert synapseclr('run', '--config', tiny, '--no-notebook', cwd=whole.parent.parent).returncode == 0
    assert stamps() == before

kills = { # in the order of the line; `deadly` is counted from where the one before has left off
    'fetch, before the plan': dict(module='synapseclr.ingest.fetch', owner='module', name='write_table', deadly=1),
    'fetch, making the store': dict(module='zarr', owner='module.Group', name='create_array', deadly=3),
    'fetch, writing the second shard': dict(module='synapseclr.data.store', owner='module.ChunkStore',
    name='write_shard', deadly=2),
    'fetch, before the record of a shard': dict(module='synapseclr.ingest.fetch', owner='module', name='atomic',
    deadly=1),
    'fetch, before the table': dict(module='synapseclr.ingest.fetch', owner='module', name='write_table', deadly=1),
    'annotate, before the table': dict(module='synapseclr.ingest.annotate', owner='module', name='write_table',
    deadly=1),
    'train, in a step': dict(module='synapseclr.learn.train', owner='module', name='nt_xent', deadly=7),
    'train, writing a checkpoint': dict(module='safetensors.torch', owner='module', name='save_file', deadly=2),
    'train, before the weights': dict(module='synapseclr.learn.train', owner='module', name='save_weights', deadly=1),
    'extract, second shard': dict(module='synapseclr.learn.extract', owner='module', name='write_table', deadly=2),
    'embed, before the map': dict(module='synapseclr.analyse.embed', owner='module', name='write_table', deadly=2),
    'export, in the annotations': dict(module='synapseclr.show.neuroglancer', owner='module', name='_write_shards',
    deadly=3),
    'export, before the table': dict(module='synapseclr.show.export', owner='module', name='write_table', deadly=1),
}

def test_killed_and_resumed(whole, tiny, tmp_path):
    "The files of a run that was killed in every stage, and went on each time, are those of the run that was not"
    for when,kill in kills.items():
        dead = python(kill_at.format(**kill), 'run', '--config', tiny, '--no-notebook', cwd=tmp_path)
        assert dead.returncode == -signal.SIGKILL, (when, dead.stderr)
    alive = synapseclr('run', '--config', tiny, '--no-notebook', cwd=tmp_path)
    assert alive.returncode == 0, alive.stderr
    assert files(tmp_path/'_runs/tiny', *everything) == files(whole, *everything)

@pytest.mark.parametrize('voxel_nm', [(40, 7.16, 7.16), (47.5, 9.2, 9.2), (10, 10, 10)], ids=str)
def test_any_voxel(voxel_nm, tmp_path):
    "One configuration in nm serves every anisotropy"
    from synapseclr.dev.fixtures import tiny_volume
    c = open_run(tiny_volume(tmp_path, n=4, voxel_nm=voxel_nm),
        [f'run={tmp_path/"run"}', 'train.batch_size=2', 'train.epochs=1', 'fetch.central_sections=60'])
    for name in stages_of(c): stages[name](c)
    store = ChunkStore.open(tmp_path/'run/chunks.zarr')
    assert store.voxel_nm == voxel_nm and store.chunk_shape == (min(60, round(880/voxel_nm[0])),
        *(round(896/v) for v in voxel_nm[1:]))
    assert len(read_features(tmp_path/'run/features')[0]) == len(store) == 4

def test_phantom_line(tmp_path):
    """A run on a phantom is killed while the phantom is written; the same command then does all stages, and the phantom
    is as if nothing had happened"""
    from synapseclr.dev.fixtures import tiny_phantom
    from synapseclr.phantom.build import make_phantom
    from synapseclr.phantom.connectome import PhantomConfig
    config,overrides = tiny_phantom('phantom')
    command = ['run', '--config', config, '--no-notebook', '--set', f'run={tmp_path/"run"}', '--set',
        'embed.regress_out=["cutting_angle"]']
    kill = dict(module='synapseclr.phantom.build', owner='module', name='write_layer', deadly=3)
    assert python(kill_at.format(**kill), *command, cwd=tmp_path).returncode == -signal.SIGKILL
    assert not (tmp_path/'run/phantom/phantom.json').exists()
    alive = synapseclr(*command, cwd=tmp_path)
    assert alive.returncode == 0, alive.stderr
    whole = make_phantom(tmp_path/'whole', PhantomConfig(seed=2, shape=(96, 384, 384), defects=.3))
    assert files(tmp_path/'run/phantom', '**/*') == files(whole, '**/*')
    targets = read_table(tmp_path/'run/evaluation_targets.parquet', 'evaluation targets')
    assert set(targets.features) == {'trained', 'trained - cutting_angle', 'untrained', 'morphometrics', 'intensity',
        'handcrafted', 'latents'}
    latents = targets[(targets.target == 'presynaptic type') & (targets.within == 'all')].set_index('features').value
    assert latents['latents'] > .9
    refuse_two_networks(tmp_path/'run', tmp_path/'other')

def refuse_two_networks(run, other):
    "One probe reads what one network describes, in several runs; not what two describe"
    from synapseclr.evaluate.truth import load_with_truth
    other.mkdir()
    for o,there in {'chunks.zarr': 'chunks.zarr', 'synapses.parquet': 'synapses.parquet',
        'features': 'features_untrained', 'features_same': 'features'}.items():
        (other/o).symlink_to(run/there)
    (run/'features_same').symlink_to(run/'features')
    runs = [(run, run/'phantom'), (other, run/'phantom')]
    with pytest.raises(FeatureError, match='described by another network, or in another way.*use `evaluate_each`'):
        load_with_truth(runs, {'trained': 'features'})
    table,sets = load_with_truth(runs, {'trained': 'features_same'})
    assert len(table) == len(sets['trained']) == 2*table.id.nunique()
