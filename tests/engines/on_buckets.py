"A bucket and a queue of Amazon, as moto answers for them on this machine: layers, results, and tasks that die."
import json, os, signal, subprocess
from urllib.request import urlopen
import boto3, numpy as np, pyarrow.fs, pyarrow.parquet as pq, pytest, tensorstore
from conftest import files, kill_at, python, synapseclr
from engine import daemon, free_port, is_listening, program, versions, wait_for
from synapseclr.ingest.queue import dead_letters

@pytest.fixture(scope='session')
def amazon(tmp_path_factory):
    "Address of a server that answers as S3 and SQS do"
    moto = program('moto_server')
    port = free_port()
    with daemon(moto, '-H', '127.0.0.1', '-p', str(port), log=tmp_path_factory.mktemp('moto')/'log'):
        wait_for('moto', lambda: is_listening(port))
        python_of_moto = os.path.join(os.path.dirname(moto), 'python')
        code = 'from importlib.metadata import version; print(version("moto"))'
        versions['moto (S3, SQS)'] = subprocess.check_output([python_of_moto, '-c', code], text=True).strip()
        yield f'http://127.0.0.1:{port}'

@pytest.fixture
def client(amazon, home, monkeypatch):
    """A function that makes a client of a service. Commands find the credentials in the home folder, and the address of
    the server in the environment"""
    keys = dict(AWS_ACCESS_KEY_ID='ours', AWS_SECRET_ACCESS_KEY='secret')
    home('aws', **keys)
    monkeypatch.setenv('AWS_ENDPOINT_URL', amazon)
    urlopen(f'{amazon}/moto-api/reset', data=b'') # buckets and queues of other tests
    return lambda service: boto3.client(service, region_name='us-east-1', aws_access_key_id='ours',
        aws_secret_access_key='secret', endpoint_url=amazon)

def upload(s3, folder, bucket):
    "Copy a folder to a bucket; gzipped files get the names and the header that CloudVolume gives them"
    s3.create_bucket(Bucket=bucket)
    for path in folder.rglob('*'):
        if not path.is_file(): continue
        options = dict(ContentEncoding='gzip') if path.suffix == '.gz' else {}
        name = path.relative_to(folder).as_posix().removesuffix('.gz')
        s3.put_object(Bucket=bucket, Key=name, Body=path.read_bytes(), **options)

def fetch(volume, layers, run, *options):
    "Fetch the tiny volume; `layers` is the folder or bucket of its layers"
    paths = [f'--set=data.{name}={{path="{layers}/{name}"}}' for name in ('em', 'seg', 'cleft', 'mito')]
    return synapseclr('fetch', '--config', volume/'tiny.toml', *paths, '--set', f'run={run}', '--no-notebook', *options,
        cwd=volume)

chunk_files = 'chunks.zarr/*/c/**/*'

@pytest.fixture(scope='session')
def direct(volume, tmp_path_factory):
    "The run folder of a fetch from a folder"
    run = tmp_path_factory.mktemp('direct')/'run'
    assert fetch(volume, volume, run).returncode == 0
    return run

def test_layers_in_a_bucket(client, amazon, home, volume, direct, tmp_path, monkeypatch):
    """The address of a server other than Amazon's is in AWS_ENDPOINT_URL, or in a name of one's own for it, which
    `cloudfiles alias add` writes: the same chunks as from a folder. A bucket that does not exist is named"""
    upload(client('s3'), volume, 'bucket')
    done = fetch(volume, 's3://bucket', tmp_path/'environment')
    assert done.returncode == 0, done.stderr
    assert files(tmp_path/'environment', chunk_files) == files(direct, chunk_files)
    done = fetch(volume, 's3://absent', tmp_path/'absent')
    assert done.returncode == 1
    assert 'layer em, s3://absent/em' in done.stderr

    monkeypatch.delenv('AWS_ENDPOINT_URL')
    home('ours', AWS_ACCESS_KEY_ID='ours', AWS_SECRET_ACCESS_KEY='secret')
    add_alias = f"from cloudfiles.paths import add_persistent_alias as add; add('ours', 's3://{amazon}/')"
    alias = python(add_alias, cwd=tmp_path)
    assert alias.returncode == 0, alias.stderr
    done = fetch(volume, 'ours://bucket', tmp_path/'alias')
    assert done.returncode == 0, done.stderr
    assert files(tmp_path/'alias', chunk_files) == files(direct, chunk_files)

def test_credentials_in_the_environment(client, volume, direct, tmp_path, monkeypatch):
    "The two variables that permanent credentials have are enough"
    upload(client('s3'), volume, 'bucket')
    for path in (tmp_path/'home/.cloudvolume/secrets').iterdir(): path.unlink()
    for name in ('AWS_SESSION_TOKEN', 'AWS_DEFAULT_REGION'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'ours')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    done = fetch(volume, 's3://bucket', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    assert files(tmp_path/'run', chunk_files) == files(direct, chunk_files)

def test_results_in_a_bucket(client, amazon, volume, direct, tmp_path):
    """A run cannot be in a bucket, where files cannot be renamed, and the error says what to do instead. A finished run
    that was copied to a bucket is read from there by tensorstore and pyarrow"""
    done = fetch(volume, volume, 's3://bucket/run')
    assert done.returncode == 1
    assert 'run: s3://bucket/run is not a folder' in done.stderr
    assert not (volume/'s3:').exists()

    upload(client('s3'), direct, 'bucket')
    code = """
import json, sys, tensorstore
kvstore = dict(driver='s3', bucket='bucket', path='chunks.zarr/em/', endpoint=sys.argv[1], aws_region='us-east-1')
em = tensorstore.open(dict(driver='zarr3', kvstore=kvstore)).result().read().result()
print(json.dumps([em.shape, int(em.sum(dtype='int64'))]))
"""
    done = python(code, amazon, cwd=tmp_path, AWS_ACCESS_KEY_ID='ours', AWS_SECRET_ACCESS_KEY='secret')
    shape,total = json.loads(done.stdout)
    em = tensorstore.open(dict(driver='zarr3', kvstore=dict(driver='file', path=f'{direct}/chunks.zarr/em/'))).result()
    assert (shape, total) == (list(em.shape), int(em.read().result().sum(dtype=np.int64)))
    s3 = pyarrow.fs.S3FileSystem(access_key='ours', secret_key='secret', endpoint_override=amazon, region='us-east-1')
    table = pq.read_table('bucket/synapses.parquet', filesystem=s3)
    assert table.equals(pq.read_table(direct/'synapses.parquet'))

def messages(client, queue):
    "Tasks of a queue: those that wait, and those that are lent"
    sqs = client('sqs')
    names = ['ApproximateNumberOfMessages', 'ApproximateNumberOfMessagesNotVisible']
    found = sqs.get_queue_attributes(QueueUrl=sqs.get_queue_url(QueueName=queue)['QueueUrl'], AttributeNames=names)
    return tuple(int(found['Attributes'][name]) for name in names)

@pytest.fixture
def queued(client, volume, tmp_path):
    "Run folder whose three blocks are in the queue sqs://blocks"
    client('sqs').create_queue(QueueName='blocks')
    done = fetch(volume, volume, tmp_path/'run', '--queue', 'sqs://blocks')
    assert done.returncode == 0, done.stderr
    assert messages(client, 'blocks') == (3, 0)
    return tmp_path/'run'

work = ['worker', 'sqs://blocks', '--lease-seconds', '3']

def test_killed_worker(client, queued, volume, direct):
    """A worker is killed in its second task. When the lease ends, that task is done again, once: three tasks, three
    times done in all, and the store is that of a fetch without a queue"""
    code = kill_at('synapseclr.data.store', 'write_shard', 2, in_class='ChunkStore')
    assert python(code, *work, cwd=volume).returncode == -signal.SIGKILL
    assert messages(client, 'blocks') in ((1, 1), (2, 0))
    assert len(files(queued, 'fetch/0*.json')) == 1
    done = synapseclr(*work, cwd=volume)
    assert done.stdout == '2 tasks done, 0 tasks failed, 0 tasks dead\n', done.stderr
    assert messages(client, 'blocks') == (0, 0)
    assert fetch(volume, volume, queued).returncode == 0
    everything = ['chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet']
    assert files(queued, *everything) == files(direct, *everything)

poison = """
import synapseclr.ingest.fetch as fetch
from synapseclr.cli import main
original = fetch.fetch_rows
def poisoned(layers, rows, *args, **kwargs):
    if (rows.plan_block == 1).any(): {harm}
    return original(layers, rows, *args, **kwargs)
fetch.fetch_rows = poisoned
main()
"""

def test_poisoned_task(client, queued, volume):
    "A task that always fails becomes a dead letter after three attempts; the others are done"
    done = python(poison.format(harm='raise ValueError("bad block")'), *work, cwd=volume)
    assert done.stdout == '2 tasks done, 2 tasks failed, 1 tasks dead\n', done.stderr
    assert dead_letters(queued/'fetch') == {'000001': 'ValueError: bad block'}
    assert messages(client, 'blocks') == (0, 0)

def test_deadly_task(client, queued, volume):
    "So does one that kills its worker"
    code = poison.format(harm='import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    for _ in range(6):
        if python(code, *work, cwd=volume).returncode == 0: break
    assert dead_letters(queued/'fetch') == {'000001': 'the worker died, or was stopped from outside'}
    assert messages(client, 'blocks') == (0, 0)
    assert len(files(queued, 'fetch/0*.json')) == 2

def test_slow_task(client, queued, volume):
    "A task that fails when its lease is over, and was lent to nobody else, is tried again; the worker goes on"
    done = python(poison.format(harm='import time; time.sleep(4); raise ValueError("slow")'), *work, cwd=volume)
    assert done.returncode == 0, done.stderr
    assert dead_letters(queued/'fetch') == {'000001': 'ValueError: slow'}
    assert messages(client, 'blocks') == (0, 0)

def test_unknown_queue(client, volume):
    done = synapseclr('worker', 'sqs://absent', cwd=volume)
    assert done.returncode == 1
    assert 'error: sqs://absent: ' in done.stderr
    assert 'Traceback' not in done.stderr
