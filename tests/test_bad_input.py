"Wrong input is refused before any work. The message says what is wrong, where, and what to do; no file is harmed."
import re
import numpy as np, pandas as pd, pytest
from conftest import files, python, synapseclr
from synapseclr.dev.fixtures import tiny_volume
from synapseclr.pipeline.stages import stages

@pytest.fixture
def run_stage(run_command, tiny_config, tmp_path):
    "A function that runs a stage on the tiny volume, in the run folder `tmp_path/'run'`"
    def run(stage, *args):
        return run_command(stage, '--config', tiny_config, '--set', f'run={tmp_path/"run"}', *args)
    return run

def test_help(run_command):
    code,text = run_command('--help')
    assert code == 0
    for stage in (*stages, 'run'): assert re.search(rf'^  {stage} ', text, re.M)
    for stage in stages:
        code,text = run_command(stage, '--help')
        assert code == 0
        assert '--config' in text
        assert '--set' in text
        assert ('--restart' in text) == (stage == 'train')

@pytest.mark.parametrize('args', [
    ['phantom'],
    ['phantom', '--out', 'a', '--config', 'b'],
    ['phantom', '--out', 'a', '--size', 'huge'],
    ['phantom', '--out', 'a', '--seed', '-1'],
    ['fetsh'],
    ['fetch'],
    ['fetch', '--config'],
    ['fetch', '--confg', 'a.toml'],
], ids=' '.join)
def test_wrong_command_line(args, run_command):
    code,text = run_command(*args)
    assert code == 2
    assert 'Error: ' in text

def test_help_loads_nothing():
    "The libraries that do the work take seconds to import; neither help nor a wrong option waits for them"
    slow = {'torch', 'numpy', 'pandas', 'scipy', 'cloudvolume', 'matplotlib'}
    code = f"""
import sys, synapseclr.cli
loaded = {{name.partition('.')[0] for name in sys.modules}}
print(*loaded & {slow})
"""
    done = python(code, cwd='.')
    assert (done.returncode, done.stdout) == (0, '\n')

def test_error_exit(tmp_path):
    "What a shell gets: an exit code and a message without a traceback"
    (tmp_path/'empty.toml').touch()
    done = synapseclr('fetch', '--config', 'empty.toml', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, 'error: empty.toml:\n  fetch: Field required\n')

@pytest.mark.parametrize('args', [
    ['train', '--config', 'nowhere'],
    ['phantom', '--config', 'nowhere'],
    ['similar', 'nowhere', '1'],
    ['explore', 'nowhere'],
    ['figures', 'nowhere'],
    ['serve', 'nowhere'],
], ids=' '.join)
def test_path_does_not_exist(args, run_command):
    code,text = run_command(*args)
    assert code == 2
    assert "'nowhere' does not exist" in text

@pytest.mark.parametrize('override,message', [
    ('train.batchsize=4', "did you mean 'batch_size'?"),
    ('fetch.max_blank_fraction=2', 'less than or equal to 1'),
    ('fetch.window_vx=[1,2,3]', 'state the window once'),
    ('data.em.mip=5', 'layer em'),
    ('data.seg.path="nowhere"', 'layer seg'),
    ('data.table="nowhere.csv"', 'no such file'),
    ('data.cleft.path="nothing"', 'layer cleft'),
    ('phantom.seed=1', 'or a section [phantom]'),
    ('train', 'section.key=value'),
    ('train.model=resnet', "'paper', 'small', 'lab' or 'demo'"),
], ids=str)
def test_wrong_configuration(override, message, run_stage, tmp_path):
    code,text = run_stage('fetch', '--set', override, '--no-notebook')
    assert code == 1
    assert text.startswith('error: ')
    assert message in text
    assert not (tmp_path/'run/chunks.zarr').exists()

def test_error_in_a_notebook(run_stage):
    "If a stage fails inside papermill, its message is the command's message"
    code,text = run_stage('extract')
    assert code == 1
    assert 'Traceback' not in text
    assert 'not trained yet' in text

def test_unwritable_run_folder(run_command, tiny_config, tmp_path):
    (tmp_path/'file').touch()
    code,text = run_command('fetch', '--config', tiny_config, '--set', f'run={tmp_path/"file/run"}')
    assert code == 1
    assert text.startswith('error: ')
    assert str(tmp_path/'file') in text

@pytest.mark.parametrize('stage', ['annotate', 'query'])
def test_earlier_stage_is_missing(stage, run_stage):
    code,text = run_stage(stage, '--no-notebook')
    assert code == 1
    assert 'synapseclr run' in text

@pytest.mark.parametrize('stage,message', [
    ('phantom', 'its synapses come from [data]'),
    ('evaluate', 'there is no ground truth to compare with'),
    ('impute', 'no table of neurons'),
])
def test_stage_does_not_apply(stage, message, run_stage):
    "Stages that need a phantom or a neuron table refuse a run that has neither"
    code,text = run_stage(stage, '--no-notebook')
    assert code == 1
    assert message in text

def test_only_training_works_in_processes(run_stage, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code,text = run_stage('fetch')
    assert code == 1
    assert 'only `train` works in several processes' in text
    assert not (tmp_path/'run/chunks.zarr').exists()

@pytest.mark.parametrize('option,message', [
    ('--precision=fp8', "'auto', 'fp32', 'bf16' or 'fastest'"),
    ('--set=train.compile=maybe', 'should be a valid boolean'),
    ('--set=train.threads=-1', 'greater than or equal to 0'),
], ids=str)
def test_wrong_training_option(option, message, run_stage):
    code,text = run_stage('train', option)
    assert code == 1
    assert message in text

def test_another_phantom_is_there(tmp_path, run_command):
    "The command does not overwrite a phantom of another configuration"
    from synapseclr.phantom.build import make_phantom
    from synapseclr.phantom.connectome import PhantomConfig
    make_phantom(tmp_path, PhantomConfig(shape=(64, 256, 256)))
    before = files(tmp_path, '**/*')
    code,text = run_command('phantom', '--out', tmp_path, '--size', 'small')
    assert code == 1
    assert 'choose another folder' in text
    assert files(tmp_path, '**/*') == before

# Runs the command; the first call of the loss does what Ctrl-C does
interrupt_in_training = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import synapseclr.learn.train as train
from synapseclr.cli import main
loss = train.nt_xent
def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return loss(*args)
train.nt_xent = interrupted
main()
"""

def test_interrupted(run_stage, tiny_config, tmp_path):
    "After Ctrl-C in training the command says how to resume, without a traceback"
    code,_ = run_stage('fetch', '--no-notebook')
    assert code == 0
    done = python(interrupt_in_training, 'train', '--config', tiny_config, '--set', f'run={tmp_path/"run"}',
        '--no-notebook', cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.strip().endswith('give the same command again to resume')
    assert 'Traceback' not in done.stderr

@pytest.fixture
def table(tiny_config): return pd.read_csv(tiny_config.parent/'synapses.csv')

# Name of a fault: a function that puts it into a table, and the messages it causes
table_faults = {
    'missing column': (
        lambda t: t.drop(columns=['presyn_segid', 'centroid_y_nm']),
        ['no column for pre_root_id', 'centre of the cleft']),
    'float ids': (
        lambda t: t.astype(dict(postsyn_segid=float)),
        ['postsyn_segid is float64']),
    'missing id': (
        lambda t: t.assign(presyn_segid=t.presyn_segid.where(t.index != 3)),
        ['presyn_segid is float64']),
    'duplicate ids': (
        lambda t: t.assign(cleft_segid=7),
        ['ids that came before in 11 rows']),
    'out of volume': (
        lambda t: t.assign(centroid_z_nm=t.centroid_z_nm*1000),
        ['outside the volume']),
    'no row of use': (
        lambda t: t.assign(postsyn_segid=t.presyn_segid),
        ['no row can be used: 12 the same cell on both sides']),
    'all at once': (
        lambda t: t.assign(cleft_segid=7, centroid_x_nm='left', postsyn_segid='cell'),
        ['came before', 'not numbers', "not a whole number in 12 rows (row 0, 1, 2 ...), such as 'cell'"]),
}

@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.feather'])
@pytest.mark.parametrize('spoil,messages', table_faults.values(), ids=table_faults)
def test_wrong_table(spoil, messages, suffix, table, run_stage, tmp_path):
    bad = spoil(table)
    path = tmp_path/f'bad{suffix}'
    if suffix == '.csv': bad.to_csv(path, index=False)
    else: getattr(bad.infer_objects(), f'to_{suffix[1:]}')(path)
    code,text = run_stage('fetch', '--set', f'data.table="{path}"', '--no-notebook')
    assert code == 1
    assert str(path) in text
    for message in messages: assert message in text
    assert not (tmp_path/'run/chunks.zarr').exists()

@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.feather'])
def test_wrong_rows(suffix, table, run_stage, tmp_path):
    "Single rows that cannot be used are rejected, and said; the others are fetched"
    bad = table.assign(
        centroid_x_nm=table.centroid_x_nm.where(table.index != 2, np.inf),
        centroid_z_nm=table.centroid_z_nm.where(table.index != 4, 1e9),
        postsyn_segid=table.postsyn_segid.where(table.index != 5, table.presyn_segid))
    path = tmp_path/f'bad{suffix}'
    if suffix == '.csv': bad.to_csv(path, index=False)
    else: getattr(bad, f'to_{suffix[1:]}')(path)
    code,text = run_stage('fetch', '--set', f'data.table="{path}"', '--no-notebook')
    assert code == 0
    for reason in ('no position', 'outside the volume', 'the same cell on both sides'):
        assert f'1 rejected: {reason}' in text
    assert '9 of 12 synapses kept' in text

def test_another_table_harms_nothing(table, run_stage, tmp_path):
    "A run folder belongs to one table. Fetching with another table is refused, and the folder stays as it is"
    code,_ = run_stage('fetch', '--no-notebook')
    assert code == 0
    before = files(tmp_path/'run', 'chunks.zarr/**/*', 'synapses.parquet')
    table[:5].to_csv(tmp_path/'less.csv', index=False)
    code,text = run_stage('fetch', '--no-notebook', '--set', f'data.table="{tmp_path/"less.csv"}"')
    assert code == 1
    assert 'another table, volume or configuration' in text
    assert files(tmp_path/'run', 'chunks.zarr/**/*', 'synapses.parquet') == before

def test_hints_are_printed_in_notebook_mode(tmp_path):
    "What a stage hints at is printed by the command, even if it comes after a progress bar"
    tiny_volume(tmp_path)
    options = ['fetch.window_nm=[880,1000,1000]', 'fetch.max_blank_fraction=0.065', f'run={tmp_path/"run"}']
    done = synapseclr('fetch', '--config', tmp_path/'tiny.toml', *[part for o in options for part in ('--set', o)],
        cwd=tmp_path)
    assert done.returncode == 0 and '3 of 12 synapses kept' in done.stdout
    assert 'hint: most of the 12 synapses are rejected: blank EM' in done.stderr
