"""The files of a run are the same bytes on one core and on two, on a busy machine, shared out among workers, and killed
and resumed."""
import os, re, shutil, signal, subprocess, sys
from contextlib import contextmanager
import pytest
from conftest import command, files, kill_at, python
from synapseclr.dev.fixtures import tiny_phantom
from synapseclr.data.tables import read_metadata

everything = ['chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet', 'train/*.safetensors', 'train/log.jsonl',
    'features*/*.parquet', '*.parquet', 'synapses.h5ad', 'annotations/**/*']
# In front of some code: it gets a single core; where the system cannot bind a process, it is told of one
one_core = """
import os
if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
else: os.environ['OMP_NUM_THREADS'] = '1'
"""

@contextmanager
def load():
    "Keep the cores busy with other work"
    others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count())]
    try: yield
    finally:
        for o in others: o.kill()

class Run:
    """A run on a small phantom, always at the same place: some files name it. Precision is left open, and the number of
    threads of training is stated"""
    def __init__(self, cwd):
        self.cwd = cwd
        self.folder = cwd/'run'
        config,_ = tiny_phantom('phantom')
        self.options = ['--config', config]
        for option in ('run=run', 'cube.size=20', 'train.threads=2', 'train.precision="auto"',
            'extract.precision="auto"'):
            self.options += ['--set', option]

    def do(self, stage, *args, code=command, **how):
        "A command on this run, with as many threads as there are cores unless `how` says otherwise"
        args = args or ['--no-notebook'] # a stage without its report
        return python(code, stage, *self.options, *args, cwd=self.cwd, **dict(OMP_NUM_THREADS=None) | how)

    def succeed(self, stage, *args, **how):
        done = self.do(stage, *args, **how)
        assert done.returncode == 0, done.stderr

    def made(self): return files(self.folder, *everything)

@pytest.fixture(scope='module')
def run(tmp_path_factory): return Run(tmp_path_factory.mktemp('same'))

@pytest.fixture(scope='module')
def quiet(run):
    "What a run makes that nothing disturbs; afterwards only its phantom is there"
    run.succeed('run')
    made = run.made()
    phantom = files(run.folder/'phantom', '**/*')
    said = [read_metadata(p)['provenance'] for p in run.folder.glob('features*/*.parquet')]
    said += [read_metadata(run.folder/f'{name}.parquet')['provenance']['source']
        for name in ('map', 'probe_scores', 'defects', 'retrieval', 'imputed', 'neurites', 'axes')]
    # one for the whole run, and all that is made from features says which
    assert len({o['precision'] for o in said}) == 1 and said[0]['precision'] in ('fp32', 'bf16')
    begin_anew(run)
    return made | {f'phantom/{name}': content for name,content in phantom.items()}

def begin_anew(run):
    "Take away everything but the phantom"
    for o in run.folder.iterdir():
        if o.name == 'phantom': continue
        shutil.rmtree(o) if o.is_dir() else o.unlink()

def assert_same(run, quiet):
    made = run.made() | {f'phantom/{name}': content for name,content in files(run.folder/'phantom', '**/*').items()}
    assert sorted(made) == sorted(quiet)
    assert [name for name in quiet if made[name] != quiet[name]] == []

def test_there_is_something_to_compare(quiet):
    "Of every stage"
    assert {'synapses.parquet', 'map.parquet', 'defects.parquet', 'retrieval.parquet', 'imputed.parquet',
        'neurites.parquet', 'axes.parquet', 'results.parquet', 'evaluation_targets.parquet',
        'train/weights.safetensors', 'phantom/truth.parquet'} <= set(quiet)
    assert len([name for name in quiet if name.startswith('features/')]) > 2

def test_one_core(run, quiet):
    "All stages on a single core, the phantom too, and with another order of sets"
    shutil.rmtree(run.folder)
    run.succeed('run', code=one_core+command, PYTHONHASHSEED='1')
    assert_same(run, quiet)

def test_busy_killed_and_shared_out(run, quiet):
    """On a busy machine: training killed on two cores and resumed on one, features from two workers, and the stages
    that follow side by side in notebooks"""
    begin_anew(run)
    queue = f'fq://{run.cwd}/queue'
    with load():
        killed = run.do('run', code=kill_at.format(module='synapseclr.learn.train', owner='module', name='nt_xent',
            deadly=5))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        run.succeed('train', code=one_core+command)
        run.succeed('extract', '--queue', queue)
        workers = [subprocess.Popen([sys.executable, '-c', code, 'worker', queue], cwd=run.cwd,
            env=os.environ | dict(OMP_NUM_THREADS=n), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for code,n in ((one_core+command, '3'), (command, '1'))]
        counts = [re.search(r'(\d+) tasks done, 0 tasks failed, 0 tasks dead', worker.communicate()[0])
            for worker in workers]
    shards = len(list((run.folder/'features').glob('*.parquet')))
    assert sum(int(o[1]) for o in counts) == shards > 2
    run.succeed('run', '--notebook', OMP_NUM_THREADS='3') # stages side by side
    assert_same(run, quiet)
