"""The files of a run are the same bytes on one core and on two, on a busy machine, shared among workers, and killed and
resumed."""
import io, os, re, shutil, signal, subprocess, sys
from contextlib import contextmanager
import pandas as pd, pyarrow.parquet as pq, pytest
from conftest import command_code, files, kill_at, python
from synapseclr.dev.fixtures import tiny_phantom
from synapseclr.data.features import FeatureError
from synapseclr.data.results import is_reserved
from synapseclr.data.synapses import COLUMN_ALIASES, read_synapses
from synapseclr.data.tables import read_metadata

outputs = ['chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet', 'train/*.safetensors', 'train/log.jsonl',
    'features*/*.parquet', '*.parquet', 'synapses.h5ad', 'annotations/**/*']

# In front of other code: binds the process to a single core. Where the system cannot do that, it sets one thread
bind_to_one_core = """
import os
if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
else: os.environ['OMP_NUM_THREADS'] = '1'
"""
command_on_one_core = bind_to_one_core+command_code

@contextmanager
def busy_cores():
    "Keep the cores busy with other work"
    processes = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count())]
    try: yield
    finally:
        for process in processes: process.kill()

class Run:
    """A run on a small phantom, always in the same folder, because some files contain its path. The package chooses the
    precision; the number of training threads is set"""
    def __init__(self, cwd):
        self.cwd = cwd
        self.folder = cwd/'run'
        config,_ = tiny_phantom('phantom')
        self.options = ['--config', config, '--set', 'run=run', '--set', 'cube.size=20', '--set', 'train.threads=2',
            '--set', 'train.precision="auto"', '--set', 'extract.precision="auto"', '--set',
            'embed.regress_out=["cutting_angle"]']

    def do(self, stage, *args, code=command_code, **env):
        """Run a stage with `args`, or without notebooks if there are none. It uses as many threads as there are cores,
        unless `env` says otherwise"""
        env = dict(OMP_NUM_THREADS=None) | env
        return python(code, stage, *self.options, *(args or ['--no-notebook']), cwd=self.cwd, **env)

    def succeed(self, stage, *args, **options):
        "`do`, and check the exit code"
        done = self.do(stage, *args, **options)
        assert done.returncode == 0, done.stderr

    def start_worker(self, queue, code, n_threads):
        return subprocess.Popen([sys.executable, '-c', code, 'worker', queue], cwd=self.cwd,
            env=os.environ | dict(OMP_NUM_THREADS=str(n_threads)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True)

    def outputs(self): return files(self.folder, *outputs)

    def phantom(self):
        phantom = files(self.folder/'phantom', '**/*')
        return {f'phantom/{name}': content for name,content in phantom.items()}

    def remove_all_but_phantom(self):
        for path in self.folder.iterdir():
            if path.name == 'phantom': continue
            if path.is_dir(): shutil.rmtree(path)
            else: path.unlink()

@pytest.fixture(scope='module')
def run(tmp_path_factory): return Run(tmp_path_factory.mktemp('same'))

@pytest.fixture(scope='module')
def undisturbed(run):
    "Files of a run that was killed while it wrote the phantom only; afterwards only the phantom is left"
    killed = run.do('run', code=kill_at('synapseclr.phantom.build', 'write_layer', 3))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run.folder/'phantom/phantom.json').exists()
    run.succeed('run')
    contents = run.outputs() | run.phantom()
    provenance = [read_metadata(path)['provenance'] for path in run.folder.glob('features*/*.parquet')]
    for name in ('map', 'probe_scores', 'defects', 'retrieval', 'axes'):
        provenance.append(read_metadata(run.folder/f'{name}.parquet')['provenance']['source'])
    # the whole run has one precision, and every table made from features states it
    assert len({source['precision'] for source in provenance}) == 1
    assert provenance[0]['precision'] in ('fp32', 'bf16')
    # the features that were chosen for each trait, and what they were made from
    origin = read_metadata(run.folder/'imputed.parquet')['provenance']
    assert set(origin['source']) == {choice['features'] for choice in origin['choices'].values()}
    assert read_metadata(run.folder/'neurites.parquet')['provenance']['source'] == origin['source']
    run.remove_all_but_phantom()
    return contents

def assert_same(run, undisturbed):
    contents = run.outputs() | run.phantom()
    assert sorted(contents) == sorted(undisturbed)
    assert [name for name in undisturbed if contents[name] != undisturbed[name]] == []

def test_every_stage_is_compared(undisturbed):
    assert {'synapses.parquet', 'map.parquet', 'defects.parquet', 'retrieval.parquet', 'imputed.parquet',
        'neurites.parquet', 'axes.parquet', 'results.parquet', 'evaluation_targets.parquet',
        'train/weights.safetensors', 'phantom/truth.parquet'} <= set(undisturbed)
    assert len([name for name in undisturbed if name.startswith('features/')]) > 2

def test_targets(undisturbed):
    "What each feature set says of the ground truth, also the one from which a nuisance was regressed out"
    targets = pd.read_parquet(io.BytesIO(undisturbed['evaluation_targets.parquet']))
    assert set(targets.features) == {'trained', 'trained - cutting_angle', 'trained + measured', 'untrained',
        'untrained + measured', 'morphometrics', 'intensity', 'profile', 'measured', 'latents', 'painted'}
    type_scores = targets[(targets.target == 'presynaptic type') & (targets.subset == 'all')]
    assert type_scores.set_index('features').value['latents'] > .9

def test_stages_write_reserved_columns_only(run, undisturbed):
    "A new column of a stage has to be in the list, or a lab's column of that name would get in its way"
    columns = pq.read_schema(io.BytesIO(undisturbed['results.parquet'])).names
    source = read_synapses(run.folder/'phantom/synapses.parquet').drop(columns='reject_reason')
    added = [name for name in columns if name not in source and name not in COLUMN_ALIASES]
    assert len(added) > 50
    assert not [name for name in added if not is_reserved(name)]

def test_one_core(run, undisturbed):
    "All stages on a single core, with the phantom, and with sets in another order"
    shutil.rmtree(run.folder)
    run.succeed('run', code=command_on_one_core, PYTHONHASHSEED='1')
    assert_same(run, undisturbed)

def test_busy_killed_and_shared(run, undisturbed):
    """Training is killed on two busy cores and resumed on one, two workers compute the features, and the stages that
    follow run side by side in notebooks"""
    run.remove_all_but_phantom()
    queue = f'fq://{run.cwd}/queue'
    with busy_cores():
        killed = run.do('run', code=kill_at('synapseclr.learn.train', 'nt_xent', 5))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        run.succeed('train', code=command_on_one_core)
    run.succeed('extract', '--queue', queue)
    workers = [run.start_worker(queue, command_on_one_core, 3), run.start_worker(queue, command_code, 1)]
    printed = [worker.communicate()[0] for worker in workers]
    counts = [re.search(r'(\d+) tasks done, 0 tasks failed, 0 tasks dead', text) for text in printed]
    n_shards = len(list((run.folder/'features').glob('*.parquet')))
    assert sum(int(count[1]) for count in counts) == n_shards > 2
    run.succeed('run', '--notebook', OMP_NUM_THREADS='3') # stages side by side
    assert_same(run, undisturbed)
    assert_runs_of_two_networks_are_refused(run.folder, run.cwd/'other')

def assert_runs_of_two_networks_are_refused(run, other):
    "A probe may use features of several runs if one network computed them all, and not otherwise"
    from synapseclr.evaluate.truth import load_with_truth
    other.mkdir()
    for name in ('chunks.zarr', 'synapses.parquet', 'annotate'): (other/name).symlink_to(run/name)
    (other/'features').symlink_to(run/'features_untrained')
    (other/'features_same').symlink_to(run/'features')
    (run/'features_same').symlink_to(run/'features')
    runs = [(run, run/'phantom'), (other, run/'phantom')]
    with pytest.raises(FeatureError, match='described by another network, or in another way.*use `evaluate_each`'):
        load_with_truth(runs, {'trained': 'features'})
    table,feature_sets = load_with_truth(runs, {'trained': 'features_same'})
    assert len(table) == len(feature_sets['trained']) == 2*table.id.nunique()
