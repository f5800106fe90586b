"A graphene server of one's own: supervoxels stay as they are, and cells change with time."
import json, time
from functools import partial
from urllib.parse import parse_qs, urlparse
import numpy as np, pandas as pd, pytest
from conftest import files, http_server, synapseclr
from engine import versions, wait_for
from synapseclr.data.volume import LayerSource, open_layer, read, write_layer

# The highest 8 bits of an id are its level in the graph: 1 for supervoxels, 4 for cells
supervoxel = lambda i: 2**56 + i
cell = lambda i: 2**58 + i

def answer_as_graphene(folder, states, method, path, headers, body):
    """Answer of a server with the supervoxels of layer `folder`. `states` has the cell of each supervoxel, by the time
    from which it was its cell"""
    url = urlparse(path)
    if headers.get('Authorization') != 'Bearer 0123abc': return 401,{},b'no token'
    if url.path == '/segmentation/table/ours/info':
        graph = dict(chunk_size=[64, 64, 32], n_layers=4, cv_mip=0, n_bits_for_layer_id=8,
            spatial_bit_masks={str(level): 10 for level in range(1, 5)})
        info = json.loads((folder/'info').read_text())
        info |= dict(app=dict(supported_api_versions=[0, 1]), graph=graph, data_dir=f'file://{folder}')
        return 200,{'Content-Type': 'application/json'},json.dumps(info).encode()
    if url.path == '/segmentation/api/v1/table/ours/roots_binary':
        asked_time = int(parse_qs(url.query).get('timestamp', [max(states)])[0])
        state = states[max(time for time in states if time <= asked_time)]
        supervoxels = np.frombuffer(body, np.uint64)
        return 200,{},np.array([state[int(i)] for i in supervoxels], np.uint64).tobytes()
    return 404,{},b''

@pytest.fixture
def token(home): home('cave', token='0123abc')

@pytest.fixture
def four_cells(tmp_path, token):
    """Address of a layer of four supervoxels beside one another. At time 1000 each is a cell; at time 2000 the first
    two are one cell, and the fourth is another"""
    voxels = np.zeros((8, 8, 32), np.uint64)
    for i in range(4): voxels[..., 8*i:8*i+8] = supervoxel(i)
    write_layer(tmp_path/'supervoxels', voxels, (40, 8, 8))
    states = {1000: {supervoxel(i): cell(i) for i in range(4)}}
    states[2000] = states[1000] | {supervoxel(0): cell(10), supervoxel(1): cell(10), supervoxel(3): cell(11)}
    with http_server(partial(answer_as_graphene, tmp_path/'supervoxels', states)) as address:
        versions['graphene'] = 'a server of these tests, API v1, with timestamps'
        yield f'graphene://{address}/segmentation/table/ours'

def test_remap_across_two_states(four_cells, tmp_path):
    "Ids of time 1000 become those of time 2000, and back; without a time, those of today"
    pairs = [(0, 2), (1, 3), (2, 0), (3, 1)]
    table = pd.DataFrame(dict(id=range(4), ctr_x_nm=100., ctr_y_nm=20., ctr_z_nm=50.))
    for side,numbers in zip(('pre', 'post'), zip(*pairs)):
        table[f'{side}_root_id'] = [cell(i) for i in numbers]
        for axis,places in dict(x=[8*8*i+30. for i in numbers], y=[20.]*4, z=[80.]*4).items():
            table[f'{side}_pt_{axis}_nm'] = places
    table.to_parquet(tmp_path/'old.parquet', index=False)

    def remapped(source, time, name):
        done = synapseclr('tables', 'remap', source, '--seg', f'{four_cells}{time}', '--out', name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return pd.read_parquet(tmp_path/name),done.stdout
    same,_ = remapped('old.parquet', '@1999', 'same.parquet')
    assert (same[['pre_remap', 'post_remap']] == 'same').all(axis=None)
    new,printed = remapped('old.parquet', '@2000', 'new.parquet')
    assert new.pre_root_id.tolist() == [cell(10), cell(10), cell(2), cell(11)]
    assert new.post_root_id.tolist() == [cell(2), cell(11), cell(10), cell(10)]
    assert printed.startswith('pre: 1 synapses have the same cell, 3 have another one, 0 are where there is no cell')
    assert printed.splitlines()[0].endswith('; 0 cells were split, 1 were merged from several')
    today,_ = remapped('old.parquet', '', 'today.parquet')
    assert today.pre_root_id.equals(new.pre_root_id)
    back,_ = remapped('new.parquet', '@1000', 'back.parquet')
    old_cells,cells = (rows[['pre_root_id', 'post_root_id']].to_numpy().tolist() for rows in (table, back))
    assert cells == old_cells

def test_no_token(four_cells, tmp_path, home):
    home('cave')
    pd.DataFrame(dict(id=[1], pre_root_id=[5], post_root_id=[6], ctr_x_nm=[9.], ctr_y_nm=[9.], ctr_z_nm=[9.])).to_csv(
        tmp_path/'table.csv', index=False)
    done = synapseclr('tables', 'remap', 'table.csv', '--seg', four_cells, '--out', 'new.parquet', cwd=tmp_path)
    assert done.returncode == 1
    assert f'layer seg, {four_cells}' in done.stderr
    assert 'cave-secret.json' in done.stderr

def cut_into_supervoxels(layer, folder):
    "Write the cells of a layer in pieces of at most 16 voxels a side. Returns the cell of each piece"
    cells = read(layer, layer.box)
    blocks = np.ravel_multi_index(np.indices(cells.shape)//16, (64, 64, 64))
    pieces,numbers = np.unique(np.stack([cells.ravel(), blocks.ravel().astype(np.uint64)]), axis=1, return_inverse=True)
    ids = np.where(pieces[0] == 0, 0, supervoxel(np.arange(pieces.shape[1], dtype=np.uint64)))
    write_layer(folder, ids[numbers].reshape(cells.shape), layer.voxel_nm)
    return dict(zip(ids.tolist(), pieces[0].tolist()))

def test_cells_change_during_a_fetch(volume, tmp_path, token):
    """Blocks that are fetched after a correction still read the state in which the run was planned: the chunks are
    those of a fetch of the same cells from a folder. A new run reads the new state, in which the table's cells are
    gone, unless it is told the time"""
    first = cut_into_supervoxels(open_layer('seg', LayerSource(path=str(volume/'seg'))), tmp_path/'supervoxels')
    states = {0: first}
    with http_server(partial(answer_as_graphene, tmp_path/'supervoxels', states)) as address:
        layer = f'"graphene://{address}/segmentation/table/ours"'
        def fetch(run, seg=f'{{path={layer}}}', *options):
            overrides = [f'--set=data.seg={seg}', f'--set=run={run}']
            done = synapseclr('fetch', '--config', volume/'tiny.toml', *overrides, '--no-notebook', *options,
                cwd=tmp_path)
            return done.returncode,done.stderr
        assert fetch('run', f'{{path={layer}}}', '--queue', f'fq://{tmp_path}/queue') == (0, '')
        states[int(time.time())+1] = {piece: root+1000 for piece,root in first.items()}
        assert synapseclr('worker', f'fq://{tmp_path}/queue', cwd=tmp_path).stdout == '3 tasks done, 0 tasks failed, ' \
            '0 tasks dead\n'
        assert fetch('run')[0] == 0
        wait_for('the new state', lambda: time.time() > max(states))
        code,error = fetch('late')
        assert code == 1
        assert 'no presynaptic cell at any of 8 synapses' in error
        assert fetch('earlier', f'{{path={layer}, timestamp=5}}')[0] == 0
    assert fetch('direct', f'{{path="{volume}/seg"}}')[0] == 0
    chunks = {run: files(tmp_path/run, 'chunks.zarr/*/c/**/*') for run in ('run', 'earlier', 'direct')}
    assert len(chunks['direct']) == 9
    assert chunks['run'] == chunks['earlier'] == chunks['direct']
