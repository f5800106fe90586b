"""What goes wrong between a bucket and a store: afterwards the store is the one without faults, byte for byte, or the
synapses that are not in it are listed with the reason."""
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

def source(tiny, address=None, **options):
    "The tiny volume, on disk or served"
    where = lambda o: f'precomputed://{address}/{o}' if address else str(tiny.parent/o)
    return DataConfig(table=str(tiny.parent/'synapses.csv'),
        **{o: dict(path=where(o)) | options.get(o, {}) for o in ('em', 'seg', 'cleft', 'mito')})

def made(run): return files(run, 'chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet')

@pytest.fixture(scope='module')
def sound(tiny, tmp_path_factory):
    "The fault-free run"
    run = tmp_path_factory.mktemp('sound')
    assert (fetch(source(tiny), config, run).reject_reason == '').all()
    return run

@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "No pauses, and a short patience"
    monkeypatch.setattr(HttpInterface.get_file.retry, 'wait', tenacity.wait_none())
    monkeypatch.setattr(volume, 'http_timeout_s', .5)

def some(path): return 'info' not in path and zlib.crc32(path.encode()) % 4 == 0

flipped = lambda b: b[:len(b)//2] + bytes([b[len(b)//2] ^ 4]) + b[len(b)//2+1:]
first_only = {
    '500': lambda path, n: dict(status=500) if some(path) and n < 3 else None,
    'silence': lambda path, n: dict(silence=20) if some(path) and n == 1 else None,
    'cut short': lambda path, n: dict(change=lambda b: b[:len(b)//2], cut=True) if some(path) and n == 1 else None,
    'shorter than it was': lambda path, n: dict(change=lambda b: b[:len(b)//2]) if '/em/' in path and some(path)
    and n == 1 else None,
    'garbled': lambda path, n: dict(change=flipped) if '/em/' in path and some(path) and n == 1 else None,
}

@pytest.mark.parametrize('fault', first_only.values(), ids=first_only)
def test_passing_fault(fault, tiny, sound, tmp_path):
    plan_fetch(source(tiny), config, tmp_path) # looks at some synapses; the blocks are to meet the fault
    with served(tiny.parent, latency_s=0, fault=fault) as address:
        fetch(source(tiny, address), config, tmp_path)
        assert served_counts(address)['spoilt'] >= 3
    assert made(tmp_path) == made(sound)

def test_busy(tiny, sound, tmp_path):
    "A server that is asked again too early stays busy"
    asked = {}
    def fault(path, n):
        if some(path) and time.time() < asked.setdefault(path, time.time()) + .9:
            return dict(status=429, headers={'Retry-After': '1'})
    with served(tiny.parent, latency_s=0, fault=fault) as address:
        fetch(source(tiny, address), config, tmp_path)
        assert served_counts(address)['spoilt'] >= 3
    assert made(tmp_path) == made(sound)

def chunk_of(sound, tiny, i):
    "Name of the storage chunk of EM at the centre of synapse `i`"
    row = pd.read_parquet(sound/'synapses.parquet').set_index('id').loc[i]
    em = volume.open_layer('em', volume.LayerSource(path=str(tiny.parent/'em')))
    spans = []
    for a,v,size,end in zip('xyz', em.voxel_nm[::-1], em.volume.chunk_size, em.volume.volume_size):
        k = int(row[f'ctr_{a}_nm']/v)//size*size
        spans.append(f'{k}-{min(k+size, end)}')
    return '_'.join(spans)

@pytest.mark.parametrize('fault', [dict(status=500), dict(change=flipped), dict(status=404)],
    ids=['500', 'garbled', '404'])
def test_chunk_is_lost(fault, tiny, sound, tmp_path):
    """The synapses that need it are listed with the reason; all others are there and right; mended, the store is the
    sound one"""
    broken = chunk_of(sound, tiny, 5)
    gap = dict(em=dict(fill_missing=False))
    with served(tiny.parent, latency_s=0, fault=lambda path,
        n: fault if path.endswith(broken) and '/em/' in path else None) as address:
        table = fetch(source(tiny, address, **gap), config, tmp_path).set_index('id')
    lost = table.index[table.reject_reason != '']
    assert 5 in lost and len(lost) < 12 and table.reject_reason[lost].str.contains('unreadable: layer em, voxels').all()
    got,want = (ChunkStore.open(o/'chunks.zarr') for o in (tmp_path, sound))
    assert sorted([*got.ids, *lost]) == sorted(want.ids)
    for i in range(len(got)):
        same = want[int(np.flatnonzero(want.ids == got.ids[i])[0])]
        assert np.array_equal(got[i].em, same.em) and np.array_equal(got[i].mask, same.mask)
    refetch(tmp_path, lost)
    fetch(source(tiny), config, tmp_path)
    assert made(tmp_path) == made(sound)

def test_server_is_gone(tiny, sound, tmp_path):
    """Nothing is made up: blocks are dead letters with their error and their synapses; the same command with a server
    that works ends like the sound run"""
    with served(tiny.parent, latency_s=0, fault=lambda path,
        n: dict(status=500) if '/seg/' in path and n > 1 and 'info' not in path else None) as address:
        with pytest.raises(QueueError, match='3 of 3 blocks are not fetched, 3 of them failed'):
            fetch(source(tiny, address), config, tmp_path)
    listed = pd.read_csv(tmp_path/'fetch/missing.csv')
    assert sorted(listed.id) == list(range(1, 13)) and listed.reason.str.contains('layer seg').all()
    assert len(dead_letters(tmp_path/'fetch')) == 3
    fetch(source(tiny), config, tmp_path)
    assert made(tmp_path) == made(sound) and not (tmp_path/'fetch/missing.csv').exists()

def test_going_on_without(tiny, sound, tmp_path):
    plan_fetch(source(tiny), config, tmp_path)
    for task in fetch_tasks(tmp_path)[1:]: task()
    lost = missing(tmp_path)
    with pytest.raises(QueueError, match='1 of 3 blocks are not fetched, 0 of them failed'): finish_fetch(tmp_path)
    drop(tmp_path, lost)
    table = fetch(source(tiny), config, tmp_path).set_index('id')
    assert (table.reject_reason == 'dropped').sum() == len(lost) == 4 and sorted(
        [*ChunkStore.open(tmp_path/'chunks.zarr').ids, *lost]) == list(range(1, 13))

@pytest.mark.parametrize('name', ['em', 'seg'])
def test_not_allowed(name, tiny, tmp_path):
    "403 reads like an empty volume; it is caught before the first block, and names the layer"
    with served(tiny.parent, latency_s=0, fault=lambda path,
        n: dict(status=403) if f'/{name}/' in path and 'info' not in path else None) as address:
        with pytest.raises(volume.VolumeError, match=f'layer {name}, .* at any of 8 synapses'):
            fetch(source(tiny, address), config, tmp_path)
        with pytest.raises(volume.VolumeError, match='layer cleft: there is no volume at .*/nothing'):
            fetch(source(tiny, address, cleft=dict(path=f'precomputed://{address}/nothing')), config, tmp_path)
    assert not (tmp_path/'fetch').exists() and not (tmp_path/'chunks.zarr').exists()

def test_wrong_bytes_without_a_checksum(tiny, sound, tmp_path):
    "Nobody can see it when it comes; verify does, and fetching again mends it"
    broken = chunk_of(sound, tiny, 5)
    with served(tiny.parent, latency_s=0, fault=lambda path,
        n: dict(bare=True, change=lambda b: b[:7] + b'x' + b[8:]) if path.endswith(broken) and '/em/' in path
        else None) as address:
        fetch(source(tiny, address), config, tmp_path)
    fetch(source(tiny), config, tmp_path) # the plan now names the volume on disk
    got,want = (ChunkStore.open(o/'chunks.zarr').batch(range(12)) for o in (tmp_path, sound))
    differ = ChunkStore.open(sound/'chunks.zarr').ids[(got[0] != want[0]).any((1, 2, 3))]
    problems = verify(tmp_path)
    assert sorted(problems.id) == sorted(differ) and (problems.problem == 'differs from the source').all()
    refetch(tmp_path, problems.id)
    fetch(source(tiny), config, tmp_path)
    assert made(tmp_path) == made(sound)

def fork(function, *args):
    "A process that has imported everything already"
    c = multiprocessing.get_context('forkserver')
    c.set_forkserver_preload(['synapseclr.ingest.fetch'])
    p = c.Process(target=function, args=args)
    p.start()
    return p

def test_killed_at_random(tiny, sound, tmp_path):
    "Workers die, their leases end, others do their blocks"
    rng = np.random.default_rng(int(os.environ.get('FAULT_SEED', 0)))
    queue = f'fq://{tmp_path/"queue"}'
    with served(tiny.parent, latency_s=.02) as address:
        plan_fetch(source(tiny, address), config, tmp_path/'run')
        enqueue(queue, fetch_tasks(tmp_path/'run'))
        killed = 0
        for _ in range(5):
            p = fork(run_worker, queue, 1, .1)
            p.join(rng.uniform(.1, 2))
            if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
            p.join()
            killed += p.exitcode == -signal.SIGKILL
        run_worker(queue, 1, .1)
        fetch(source(tiny, address), config, tmp_path/'run')
    assert killed
    assert made(tmp_path/'run') == made(sound)

def test_two_processes(tiny, sound, tmp_path):
    fetch(source(tiny), config, tmp_path, processes=2)
    assert made(tmp_path) == made(sound)

def test_race(tiny, sound, tmp_path):
    "Two workers do the same block at the same time"
    plan_fetch(source(tiny), config, tmp_path)
    for k in range(3):
        both = [fork(fetch_block, str(tmp_path), k) for _ in range(2)]
        for p in both: p.join()
        assert [p.exitcode for p in both] == [0, 0]
    finish_fetch(tmp_path)
    assert made(tmp_path) == made(sound)

@pytest.fixture
def small_disk(sound, tmp_path):
    "A disk that has room for half of the run"
    folder = tmp_path/'disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={sum(map(len, made(sound).values()))//2}', 'tmpfs',
        str(folder)], capture_output=True).returncode:
        pytest.skip('may not mount a tmpfs here')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)

def test_full_disk(tiny, sound, small_disk):
    "It says so, counts no try, and goes on when there is room"
    for _ in range(4):
        with pytest.raises(OSError, match='No space left'): fetch(source(tiny), config, small_disk/'run')
    assert not dead_letters(small_disk/'run/fetch') and fetch_tasks(small_disk/'run')
    subprocess.run(['mount', '-o', 'remount,size=50m', str(small_disk)], check=True)
    fetch(source(tiny), config, small_disk/'run')
    assert made(small_disk/'run') == made(sound)
