"""Faults between a bucket and a store. Afterwards the store is, byte for byte, that of a run without faults, or the
missing synapses are listed with the reason."""
import multiprocessing, os, signal, subprocess, time, zlib
import numpy as np, pandas as pd, pytest, tenacity
from cloudfiles.interfaces import HttpInterface
from conftest import files
from synapseclr.data import volume
from synapseclr.evaluate.speed_fetch import served, served_counts
from synapseclr.ingest.cutout import DataConfig, FetchConfig
from synapseclr.ingest.fetch import fetch, fetch_block, fetch_tasks, finish_fetch, plan_fetch
from synapseclr.ingest.queue import QueueError, dead_letters, enqueue, run_worker
from synapseclr.data.store import ChunkStore
from synapseclr.ingest.maintain import drop, missing, refetch, verify

config = FetchConfig(window_nm=(600, 768, 768), max_per_shard=4, max_blank_fraction=.5)

def source(tiny_config, address=None, **options):
    "The tiny volume, on disk or at the address of a server; `options` of layers by their names"
    folder = f'precomputed://{address}' if address else str(tiny_config.parent)
    layers = {name: dict(path=f'{folder}/{name}') | options.get(name, {}) for name in ('em', 'seg', 'cleft', 'mito')}
    return DataConfig(table=str(tiny_config.parent/'synapses.csv'), **layers)

def fetched_files(run): return files(run, 'chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet')

@pytest.fixture(scope='module')
def clean_run(tiny_config, tmp_path_factory):
    "The run without faults"
    run = tmp_path_factory.mktemp('clean')
    assert (fetch(source(tiny_config), config, run).reject_reason == '').all()
    return run

@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    "No pauses between retries, and a short timeout"
    monkeypatch.setattr(HttpInterface.get_file.retry, 'wait', tenacity.wait_none())
    monkeypatch.setattr(volume, 'http_timeout_s', .5)

def is_affected(path):
    "Whether a fault hits this path: a fixed quarter of all storage chunks"
    return 'info' not in path and zlib.crc32(path.encode()) % 4 == 0

def half(body): return body[:len(body)//2]

def flip_a_bit(body):
    middle = len(body)//2
    return body[:middle] + bytes([body[middle] ^ 4]) + body[middle+1:]

# Name: the fault, which paths it hits, and how many of the first requests for a path
passing_faults = {
    '500': (dict(status=500), is_affected, 2),
    'silence': (dict(silence=20), is_affected, 1),
    'cut short': (dict(change=half, cut=True), is_affected, 1),
    'shorter than it was': (dict(change=half), lambda path: '/em/' in path and is_affected(path), 1),
    'garbled': (dict(change=flip_a_bit), lambda path: '/em/' in path and is_affected(path), 1),
}

@pytest.mark.parametrize('spoil,is_hit,n_times', passing_faults.values(), ids=passing_faults)
def test_passing_fault(spoil, is_hit, n_times, tiny_config, clean_run, tmp_path):
    def fault(path, n): return spoil if is_hit(path) and n <= n_times else None
    plan_fetch(source(tiny_config), config, tmp_path) # it samples some synapses; only blocks should meet the fault
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        fetch(source(tiny_config, address), config, tmp_path)
        assert served_counts(address)['spoilt'] >= 3
    assert fetched_files(tmp_path) == fetched_files(clean_run)

def test_busy(tiny_config, clean_run, tmp_path):
    "The server stays busy if it is asked again too early"
    first_request = {}
    def fault(path, n):
        if is_affected(path) and time.time() < first_request.setdefault(path, time.time()) + .9:
            return dict(status=429, headers={'Retry-After': '1'})
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        fetch(source(tiny_config, address), config, tmp_path)
        assert served_counts(address)['spoilt'] >= 3
    assert fetched_files(tmp_path) == fetched_files(clean_run)

def chunk_name(clean_run, tiny_config, synapse_id):
    "Name of the storage chunk of EM at the centre of a synapse"
    synapse = pd.read_parquet(clean_run/'synapses.parquet').set_index('id').loc[synapse_id]
    em = volume.open_layer('em', volume.LayerSource(path=str(tiny_config.parent/'em')))
    spans = []
    for axis,voxel,size,end in zip('xyz', em.voxel_nm[::-1], em.volume.chunk_size, em.volume.volume_size):
        start = int(synapse[f'ctr_{axis}_nm']/voxel)//size*size
        spans.append(f'{start}-{min(start+size, end)}')
    return '_'.join(spans)

@pytest.mark.parametrize('spoil', [dict(status=500), dict(change=flip_a_bit), dict(status=404)],
    ids=['500', 'garbled', '404'])
def test_chunk_is_lost(spoil, tiny_config, clean_run, tmp_path):
    """The synapses that need the chunk are listed with the reason; all others are fetched correctly. When the chunk is
    back, fetching again completes the store"""
    broken = chunk_name(clean_run, tiny_config, 5)
    def fault(path, n): return spoil if path.endswith(broken) and '/em/' in path else None
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        broken_source = source(tiny_config, address, em=dict(fill_missing=False))
        table = fetch(broken_source, config, tmp_path).set_index('id')
    lost = table.index[table.reject_reason != '']
    assert 5 in lost
    assert len(lost) < 12
    assert table.reject_reason[lost].str.contains('unreadable: layer em, voxels').all()
    store = ChunkStore.open(tmp_path/'chunks.zarr')
    clean_store = ChunkStore.open(clean_run/'chunks.zarr')
    assert sorted([*store.ids, *lost]) == sorted(clean_store.ids)
    for i in range(len(store)):
        same = clean_store[int(np.flatnonzero(clean_store.ids == store.ids[i])[0])]
        assert np.array_equal(store[i].em, same.em)
        assert np.array_equal(store[i].mask, same.mask)
    refetch(tmp_path, lost)
    fetch(source(tiny_config), config, tmp_path)
    assert fetched_files(tmp_path) == fetched_files(clean_run)

def test_server_is_gone(tiny_config, clean_run, tmp_path):
    """Nothing is invented: blocks become dead letters with their error and their synapses. When the server works again,
    the same command completes the run"""
    def fault(path, n): return dict(status=500) if '/seg/' in path and n > 1 and 'info' not in path else None
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        with pytest.raises(QueueError, match='3 of 3 blocks are not fetched, 3 of them failed'):
            fetch(source(tiny_config, address), config, tmp_path)
    listed = pd.read_csv(tmp_path/'fetch/missing.csv')
    assert sorted(listed.id) == list(range(1, 13))
    assert listed.reason.str.contains('layer seg').all()
    assert len(dead_letters(tmp_path/'fetch')) == 3
    fetch(source(tiny_config), config, tmp_path)
    assert fetched_files(tmp_path) == fetched_files(clean_run)
    assert not (tmp_path/'fetch/missing.csv').exists()

def test_missing_synapses_are_dropped(tiny_config, clean_run, tmp_path):
    "A run can be finished without the synapses of a block that was not fetched"
    plan_fetch(source(tiny_config), config, tmp_path)
    for task in fetch_tasks(tmp_path)[1:]: task()
    lost = missing(tmp_path)
    with pytest.raises(QueueError, match='1 of 3 blocks are not fetched, 0 of them failed'): finish_fetch(tmp_path)
    drop(tmp_path, lost)
    table = fetch(source(tiny_config), config, tmp_path).set_index('id')
    assert (table.reject_reason == 'dropped').sum() == len(lost) == 4
    assert sorted([*ChunkStore.open(tmp_path/'chunks.zarr').ids, *lost]) == list(range(1, 13))

@pytest.mark.parametrize('name', ['em', 'seg'])
def test_access_is_denied(name, tiny_config, tmp_path):
    "A layer that answers 403 looks empty. This is noticed before the first block, and the error names the layer"
    def fault(path, n): return dict(status=403) if f'/{name}/' in path and 'info' not in path else None
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        with pytest.raises(volume.VolumeError, match=f'layer {name}, .* at any of 8 synapses'):
            fetch(source(tiny_config, address), config, tmp_path)
        no_cleft = source(tiny_config, address, cleft=dict(path=f'precomputed://{address}/nothing'))
        with pytest.raises(volume.VolumeError, match='layer cleft: there is no volume at .*/nothing'):
            fetch(no_cleft, config, tmp_path)
    assert not (tmp_path/'fetch').exists()
    assert not (tmp_path/'chunks.zarr').exists()

def test_wrong_bytes_without_a_checksum(tiny_config, clean_run, tmp_path):
    "They cannot be noticed on arrival; `verify` finds them, and fetching again repairs them"
    broken = chunk_name(clean_run, tiny_config, 5)
    def invert(body): return bytes(255-grey for grey in body)
    def fault(path, n):
        return dict(bare=True, change=invert) if path.endswith(broken) and '/em/' in path else None
    with served(tiny_config.parent, latency_s=0, fault=fault) as address:
        fetch(source(tiny_config, address), config, tmp_path)
    fetch(source(tiny_config), config, tmp_path) # the plan now names the volume on disk
    em,_ = ChunkStore.open(tmp_path/'chunks.zarr').batch(range(12))
    clean_store = ChunkStore.open(clean_run/'chunks.zarr')
    clean_em,_ = clean_store.batch(range(12))
    differ = clean_store.ids[(em != clean_em).any((1, 2, 3))]
    # so that features of these chunks are computed again after the repair
    assert ChunkStore.open(tmp_path/'chunks.zarr').attrs['records'] != clean_store.attrs['records']
    problems = verify(tmp_path)
    assert len(differ)
    assert sorted(problems.id) == sorted(differ)
    assert (problems.problem == 'differs from the source').all()
    refetch(tmp_path, problems.id)
    fetch(source(tiny_config), config, tmp_path)
    assert fetched_files(tmp_path) == fetched_files(clean_run)

def start_process(function, *args):
    "A process that has imported everything already"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['synapseclr.ingest.fetch'])
    process = context.Process(target=function, args=args)
    process.start()
    return process

def test_killed_at_random(tiny_config, clean_run, tmp_path):
    "Workers are killed; when their leases end, other workers fetch their blocks"
    rng = np.random.default_rng(int(os.environ.get('FAULT_SEED', 0)))
    queue = f'fq://{tmp_path/"queue"}'
    with served(tiny_config.parent, latency_s=.02) as address:
        plan_fetch(source(tiny_config, address), config, tmp_path/'run')
        enqueue(queue, fetch_tasks(tmp_path/'run'))
        killed = 0
        for _ in range(5):
            worker = start_process(run_worker, queue, 1, .1)
            worker.join(rng.uniform(.1, 2))
            if worker.is_alive(): os.kill(worker.pid, signal.SIGKILL)
            worker.join()
            killed += worker.exitcode == -signal.SIGKILL
        run_worker(queue, 1, .1)
        fetch(source(tiny_config, address), config, tmp_path/'run')
    assert killed
    assert fetched_files(tmp_path/'run') == fetched_files(clean_run)

def test_two_processes(tiny_config, clean_run, tmp_path):
    fetch(source(tiny_config), config, tmp_path, processes=2)
    assert fetched_files(tmp_path) == fetched_files(clean_run)

def test_race(tiny_config, clean_run, tmp_path):
    "Two workers fetch the same block at the same time"
    plan_fetch(source(tiny_config), config, tmp_path)
    for block in range(3):
        workers = [start_process(fetch_block, str(tmp_path), block) for _ in range(2)]
        for worker in workers: worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
    finish_fetch(tmp_path)
    assert fetched_files(tmp_path) == fetched_files(clean_run)

@pytest.fixture
def small_disk(clean_run, tmp_path):
    "A disk that has room for half of the run"
    folder = tmp_path/'disk'
    folder.mkdir()
    size = sum(map(len, fetched_files(clean_run).values()))//2
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode: pytest.skip('may not mount a tmpfs here')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)

def test_full_disk(tiny_config, clean_run, small_disk):
    "The error says so; no attempt is counted; the fetch resumes when there is room"
    for _ in range(4):
        with pytest.raises(OSError, match='No space left'): fetch(source(tiny_config), config, small_disk/'run')
    assert not dead_letters(small_disk/'run/fetch')
    assert fetch_tasks(small_disk/'run')
    subprocess.run(['mount', '-o', 'remount,size=50m', str(small_disk)], check=True)
    fetch(source(tiny_config), config, small_disk/'run')
    assert fetched_files(small_disk/'run') == fetched_files(clean_run)
