"Wrong input is refused before any work, with a message that says what, where and what to do, and harms nothing."
import re, sys
import numpy as np, pandas as pd, pytest
from conftest import files, python, say, synapseclr
from synapseclr.cli import main
from synapseclr.pipeline.stages import stages

def test_help(capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, '--help')
    assert code == 0
    for stage in (*stages, 'run'): assert re.search(rf'^  {stage} ', text, re.M)
    for stage in stages:
        code,text = say(capsys, monkeypatch, stage, '--help')
        assert code == 0 and '--config' in text and '--set' in text and ('--restart' in text) == (stage == 'train')

@pytest.mark.parametrize('args', [['phantom'], ['phantom', '--out', 'a', '--config', 'b'],
    ['phantom', '--out', 'a', '--size', 'huge'], ['phantom', '--out', 'a', '--seed', '-1'], ['fetsh'], ['fetch'],
    ['fetch', '--config'], ['fetch', '--confg', 'a.toml']], ids=' '.join)
def test_wrong_command_line(args, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, *args)
    assert code == 2 and 'Error: ' in text

def test_help_loads_nothing():
    "What does the work takes seconds to import; neither help nor a wrong option waits for it"
    loaded = python("import sys, synapseclr.cli; print(*{o.partition('.')[0] for o in sys.modules} & {'torch', "
        "'numpy', 'pandas', 'scipy', 'cloudvolume', 'matplotlib'})", cwd='.')
    assert (loaded.returncode, loaded.stdout) == (0, '\n')

def test_error_exit(tmp_path):
    "As a shell sees it: no traceback"
    (tmp_path/'empty.toml').touch()
    done = synapseclr('fetch', '--config', 'empty.toml', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, 'error: empty.toml:\n  fetch: Field required\n')

@pytest.mark.parametrize('args', [['train', '--config'], ['phantom', '--config'], ['similar'], ['explore'], ['figures'],
    ['serve']], ids=' '.join)
def test_what_is_not_there(args, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, *args, 'nowhere', *['1'][:args == ['similar']])
    assert code == 2 and "'nowhere' does not exist" in text

@pytest.mark.parametrize('override,said', [
    ('train.batchsize=4', "did you mean 'batch_size'?"), ('fetch.max_blank_fraction=2', 'less than or equal to 1'),
    ('fetch.window_vx=[1,2,3]', 'state the window once'),
    ('data.em.mip=5', 'layer em'), ('data.seg.path="nowhere"', 'layer seg'),
    ('data.table="nowhere.csv"', 'no such file'), ('data.cleft.path="nothing"', 'layer cleft'),
    ('phantom.seed=1', 'or a section [phantom]'), ('train', 'section.key=value'),
    ('train.model=resnet', "'paper' or 'demo'")], ids=str)
def test_wrong_configuration(override, said, tiny, tmp_path, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, 'fetch', '--config', tiny, '--set', override, '--set', f'run={tmp_path/"run"}',
        '--no-notebook')
    assert code == 1 and text.startswith('error: ') and said in text
    assert not (tmp_path/'run/chunks.zarr').exists()

def test_error_in_a_notebook(tiny, tmp_path, capsys, monkeypatch):
    "The message of a stage that fails inside papermill is the command's message"
    code,text = say(capsys, monkeypatch, 'extract', '--config', tiny, '--set', f'run={tmp_path/"run"}')
    assert code == 1 and 'Traceback' not in text and 'not trained yet' in text

def test_unwritable_run_folder(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path/'file').touch()
    code,text = say(capsys, monkeypatch, 'fetch', '--config', tiny, '--set', f'run={tmp_path/"file/run"}')
    assert code == 1 and text.startswith('error: ') and str(tmp_path/'file') in text

@pytest.mark.parametrize('stage', ['annotate', 'query'])
def test_earlier_stage_is_missing(stage, tiny, tmp_path, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, stage, '--config', tiny, '--set', f'run={tmp_path/"run"}', '--no-notebook')
    assert code == 1 and 'synapseclr run' in text

@pytest.mark.parametrize('stage,said', [('phantom', 'its synapses come from [data]'),
    ('evaluate', 'there is no truth to compare with'), ('impute', 'no table of neurons')])
def test_no_phantom(stage, said, tiny, tmp_path, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, stage, '--config', tiny, '--set', f'run={tmp_path/"run"}', '--no-notebook')
    assert code == 1 and said in text

def test_only_training_works_in_processes(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    code,text = say(capsys, monkeypatch, 'fetch', '--config', tiny, '--set', f'run={tmp_path/"run"}')
    assert code == 1 and 'only `train` works in several processes' in text and not (tmp_path/'run/chunks.zarr').exists()

@pytest.mark.parametrize('option,said', [('--precision=fp8', "'auto', 'fp32', 'bf16' or 'fastest'"),
    ('--set=train.compile=maybe', 'should be a valid boolean'),
    ('--set=train.threads=-1', 'greater than or equal to 0')], ids=str)
def test_wrong_mode(option, said, tiny, tmp_path, capsys, monkeypatch):
    code,text = say(capsys, monkeypatch, 'train', '--config', tiny, '--set', f'run={tmp_path/"run"}', option)
    assert code == 1 and said in text

def test_another_phantom_is_there(tmp_path, capsys, monkeypatch):
    from synapseclr.phantom.build import make_phantom
    from synapseclr.phantom.connectome import PhantomConfig
    make_phantom(tmp_path, PhantomConfig(shape=(64, 256, 256)))
    before = files(tmp_path, '**/*')
    code,text = say(capsys, monkeypatch, 'phantom', '--out', tmp_path, '--size', 'small')
    assert code == 1 and 'choose another folder' in text and files(tmp_path, '**/*') == before

def test_interrupted(tiny, tmp_path):
    "Ctrl-C in training says how to go on, without a traceback"
    run = f'run={tmp_path/"run"}'
    assert synapseclr('fetch', '--config', tiny, '--set', run, '--no-notebook', cwd=tmp_path).returncode == 0
    stop = ("import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); import "
        "synapseclr.learn.train as t; f = t.nt_xent; t.nt_xent = lambda *a: (os.kill(os.getpid(), signal.SIGINT), "
        "f(*a))[1]; ")
    done = python(stop + 'from synapseclr.cli import main; main()', 'train', '--config', tiny, '--set', run,
        '--no-notebook', cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.strip().endswith(
        'give the same command again to resume') and 'Traceback' not in done.stderr

@pytest.fixture
def table(tiny): return pd.read_csv(tiny.parent/'synapses.csv')

spoil = {
    'missing column': (lambda t: t.drop(columns=['presyn_segid', 'centroid_y_nm']),
    ['no column for pre_root_id', 'centre of the cleft']),
    'float ids': (lambda t: t.astype(dict(postsyn_segid=float)), ['postsyn_segid is float64']),
    'missing id': (lambda t: t.assign(presyn_segid=t.presyn_segid.where(t.index != 3)), ['presyn_segid is float64']),
    'duplicate ids': (lambda t: t.assign(cleft_segid=7), ['ids that came before in 11 rows']),
    'not finite': (lambda t: t.assign(centroid_x_nm=t.centroid_x_nm.where(t.index != 2, np.inf)),
    ['not finite in 1 row (row 2)']),
    'out of volume': (lambda t: t.assign(centroid_z_nm=t.centroid_z_nm*1000), ['outside the volume']),
    'pre is post': (lambda t: t.assign(postsyn_segid=t.presyn_segid.where(t.index == 5, t.postsyn_segid)),
    ['same cell in 1 row (row 5)']),
    'all at once': (lambda t: t.assign(cleft_segid=7, centroid_x_nm=np.nan, postsyn_segid=t.presyn_segid),
    ['came before', 'not finite', 'same cell']),
}

@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.feather'])
@pytest.mark.parametrize('change,said', spoil.values(), ids=spoil)
def test_wrong_table(change, said, suffix, table, tiny, tmp_path, capsys, monkeypatch):
    bad = change(table)
    path = tmp_path/f'bad{suffix}'
    if suffix == '.csv': bad.to_csv(path, index=False)
    else: getattr(bad.infer_objects(), f'to_{suffix[1:]}')(path)
    code,text = say(capsys, monkeypatch, 'fetch', '--config', tiny, '--set', f'data.table="{path}"', '--set',
        f'run={tmp_path/"run"}', '--no-notebook')
    assert code == 1 and str(path) in text
    for o in said: assert o in text
    assert not (tmp_path/'run/chunks.zarr').exists()

def test_another_table_harms_nothing(table, tiny, tmp_path, capsys, monkeypatch):
    "A run folder that belongs to one table refuses another, and stays as it is"
    run = ['fetch', '--config', tiny, '--set', f'run={tmp_path/"run"}', '--no-notebook']
    monkeypatch.setattr(sys, 'argv', ['synapseclr', *map(str, run)])
    with pytest.raises(SystemExit) as e: main()
    assert not e.value.code
    before = files(tmp_path/'run', 'chunks.zarr/**/*', 'synapses.parquet')
    table[:5].to_csv(tmp_path/'less.csv', index=False)
    code,text = say(capsys, monkeypatch, *run, '--set', f'data.table="{tmp_path/"less.csv"}"')
    assert code == 1 and 'another table, volume or configuration' in text
    assert files(tmp_path/'run', 'chunks.zarr/**/*', 'synapses.parquet') == before
