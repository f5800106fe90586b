"`tables cave` through caveclient, from a server on this machine that answers as CAVE's do."
import io, json, re
from contextlib import ExitStack
from functools import partial
from urllib.parse import parse_qs, urlparse
import numpy as np, pandas as pd, pyarrow as pa, pytest
from conftest import http_server, synapseclr
from synapseclr.data.neurons import read_neurons
from synapseclr.data.synapses import read_synapses
from synapseclr.data.tables import read_metadata

caveclient = pytest.importorskip('caveclient', reason="caveclient is not here: pip install 'synapseclr[cave]'")

def cell(i): return 2**59 + i

voxel_nm = dict(x=4, y=4, z=40)

@pytest.fixture(scope='module')
def tables():
    """A synapse table with positions in voxels of 4 x 4 x 40 nm, and types of cells that refer to nuclei, one of which
    is in no cell"""
    rng = np.random.default_rng(0)
    created = pd.Timestamp('2026-01-01', tz='UTC')
    sizes = rng.integers(50, 500, 300)
    synapses = pd.DataFrame(dict(id=2**60 + rng.permutation(300), valid=True, created=created, size=sizes))
    synapses['pre_pt_root_id'] = cell(rng.integers(0, 20, 300))
    synapses['post_pt_root_id'] = cell(rng.integers(20, 40, 300))
    for point in ('pre_pt', 'post_pt', 'ctr_pt'):
        for axis in 'xyz': synapses[f'{point}_position_{axis}'] = rng.integers(0, 500, 300)
    nuclei = pd.DataFrame(dict(id=range(5), pt_root_id=[cell(0), cell(1), 0, cell(3), cell(20)]))
    for axis in 'xyz': nuclei[f'pt_position_{axis}'] = rng.integers(0, 500, 5)
    words = ['inhibitory', 'excitatory', 'excitatory', 'BC']
    types = pd.DataFrame(dict(id=range(4), target_id=[4, 1, 2, 0], cell_type=words))
    return dict(synapses=synapses, nuclei=nuclei, types=types)

def answer_as_cave(tables, asked, row_limit, forget, method, path, headers, body):
    """Answer of a CAVE server. Of many rows it sends `row_limit` and a warning; `forget` rows are lost on the way"""
    url = urlparse(path)
    here = f'http://{headers["Host"]}'
    as_json = lambda value, status=200: (status, {'Content-Type': 'application/json'}, json.dumps(value).encode())
    if url.path == '/login': return 200,{'Content-Type': 'text/html'},b'<html>Log in</html>'
    if headers.get('Authorization') != 'Bearer 0123abc': return 302,{'Location': f'{here}/login'},b''
    asked.append(url.path)
    if url.path == '/info/api/v2/datastack/full/mouse':
        return as_json(dict(aligned_volume=dict(name='mouse', id=1), local_server=here, synapse_table='synapses',
            soma_table='nuclei', segmentation_source=f'graphene://{here}/segmentation/table/mouse'))
    if url.path.startswith('/info/'): return as_json(dict(message='no such datastack'), 404)
    if url.path == '/materialize/api/versions': return as_json([2, 3])
    if url.path == '/materialize/version': return as_json('5.13.0')
    version,_,rest = url.path.removeprefix('/materialize/api/v3/datastack/mouse/version').lstrip('/s').partition('/')
    if url.path.endswith('/versions'): return as_json([117, 943])
    if version not in ('117', '943'): return as_json(dict(message='no such page'), 404)
    times = dict(time_stamp='2026-01-02T03:04:05.000006', expires_on='2121-01-01T00:00:00.000000')
    if not rest: return as_json(times | dict(version=int(version)))
    [name,what] = re.fullmatch(r'table/(\w+)/(\w+)', rest).groups()
    if name not in tables: return as_json(dict(message=f'analysis table {name} not found'), 404)
    if what == 'metadata':
        about = {f'voxel_resolution_{axis}': size for axis,size in voxel_nm.items()}
        return as_json(about | dict(reference_table=dict(types='nuclei').get(name)))
    rows = answer_query(tables[name], {key: value[name] if isinstance(value, dict) else value for key,value in
        json.loads(body).items()})
    headers = {'Content-Type': 'data.arrow', 'dataframe_resolution': '[1, 1, 1]'}
    if 'count' in parse_qs(url.query): rows = pd.DataFrame(dict(count=[len(rows)]))
    elif len(rows) >= row_limit:
        rows = rows.sample(row_limit, random_state=0)
        headers['Warning'] = f'201 - "Limited query to {row_limit} rows'
    if forget and 'count' not in rows: rows = rows[:-forget]
    batch = pa.RecordBatch.from_pandas(rows.reset_index(drop=True))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer: writer.write_batch(batch)
    return 200,headers,sink.getvalue()

def answer_query(rows, query):
    "Rows of a table that pass the filters of a query, with positions in its resolution"
    for column,values in query.get('filter_in_dict', {}).items(): rows = rows[rows[column].isin(values)]
    for column,smallest in query.get('filter_greater_dict', {}).items(): rows = rows[rows[column] > smallest]
    for column,largest in query.get('filter_less_equal_dict', {}).items(): rows = rows[rows[column] <= largest]
    for point,(lo,hi) in query.get('filter_spatial_dict', {}).items():
        where = rows[[f'{point}_{axis}' for axis in 'xyz']]
        rows = rows[((where >= lo) & (where <= hi)).all(1)]
    rows = rows.copy()
    for i,axis in enumerate('xyz'):
        scale = voxel_nm[axis]/query['desired_resolution'][i]
        for column in rows.filter(regex=f'_position_{axis}$'): rows[column] *= scale
    return rows.head(query.get('limit', len(rows)))

@pytest.fixture
def serve(tables, home):
    "A function that starts such a server. It returns one that runs `tables cave`, and what the server was asked"
    with ExitStack() as servers:
        def start(row_limit=1000, forget=0, token='0123abc'):
            if token: home('cave', token=token)
            asked = []
            answer = partial(answer_as_cave, tables, asked, row_limit, forget)
            address = servers.enter_context(http_server(answer))
            def run(folder, *options):
                return synapseclr('tables', 'cave', 'mouse', '--out', 'synapses.parquet', '--server', address, *options,
                    cwd=folder)
            return run,asked
        yield start

def test_cells_are_complete(serve, tables, tmp_path):
    """Each synapse of two cells is there once, whether the server sends all at once or 7 at a time; ids keep their
    digits, positions are in nm, and the file states version and time"""
    (tmp_path/'cells.txt').write_text(f'{cell(3)}\n{cell(25)}\n')
    synapses = tables['synapses']
    is_wanted = (synapses.pre_pt_root_id == cell(3)) | (synapses.post_pt_root_id == cell(25))
    expected = synapses[is_wanted].sort_values('id', ignore_index=True)
    n_asked = {}
    for row_limit in (1000, 7):
        run,asked = serve(row_limit)
        done = run(tmp_path, '--version', 943, '--cells', 'cells.txt')
        assert done.returncode == 0, done.stderr
        assert f'{len(expected)} synapses of mouse, version 943 of 2026-01-02T03:04:05+00:00' in done.stdout
        n_asked[row_limit] = len(asked)
        found = read_synapses(tmp_path/'synapses.parquet')
        assert found.id.tolist() == expected.id.tolist()
        assert found.pre_root_id.tolist() == expected.pre_pt_root_id.tolist()
        assert found.cleft_vx.tolist() == expected['size'].tolist()
        assert found.ctr_z_nm.tolist() == (expected.ctr_pt_position_z*40).tolist()
        assert found.post_pt_x_nm.tolist() == (expected.post_pt_position_x*4).tolist()
    assert n_asked[7] > n_asked[1000]
    origin = read_metadata(tmp_path/'synapses.parquet')['provenance']
    assert (origin['datastack'], origin['materialization'], origin['table']) == ('mouse', 943, 'synapses')
    assert origin['time'].startswith('2026-01-02T03:04:05')

def test_box(serve, tables, tmp_path):
    run,_ = serve(row_limit=7)
    assert run(tmp_path, '--version', 117, '--box-nm', '4010,400,0,20000,1000,1999').returncode == 0
    where = tables['synapses'][[f'ctr_pt_position_{axis}' for axis in 'zyx']]*[40, 4, 4]
    is_inside = ((where >= (4010, 400, 0)) & (where < (20000, 1000, 1999))).all(1)
    assert 10 < is_inside.sum() < 200
    assert sorted(read_synapses(tmp_path/'synapses.parquet').id) == sorted(tables['synapses'].id[is_inside])

def test_types(serve, tables, tmp_path):
    "Types with the cells and positions of the nuclei that they refer to"
    run,_ = serve(row_limit=2)
    done = run(tmp_path, '--version', 943, '--cells', f'{cell(0)},{cell(99)}', '--types', 'types')
    assert done.returncode == 0, done.stderr
    assert f'hint: 1 of 2 cells have no synapse, such as {cell(99)}' in done.stdout
    neurons = read_neurons(tmp_path/'neurons.csv').set_index('root_id')
    assert neurons.cell_type.to_dict() == {cell(20): 'inhibitory', cell(1): 'excitatory', cell(0): 'BC'}
    assert neurons.soma_z_nm[cell(20)] == tables['nuclei'].pt_position_z[4]*40

@pytest.mark.parametrize('forget', [1, 3])
def test_answer_is_cut_short(forget, serve, tmp_path):
    "A server that loses rows without a word: nothing is written"
    run,_ = serve(forget=forget)
    done = run(tmp_path, '--version', 943, '--cells', cell(3))
    assert done.returncode == 1
    assert re.search(r'error: the server counts \d+ rows, and sends \d+', done.stderr)
    assert not (tmp_path/'synapses.parquet').exists()

refused = {
    'version': (dict(), ['--version', 5, '--cells', '1'],
        'error: mouse: there is no version 5, or not any more; there are 117, 943'),
    'table': (dict(), ['--version', 943, '--cells', '1', '--table', 'absent'], ': 404 analysis table absent not found'),
    'types': (dict(), ['--version', 943, '--cells', cell(3), '--types', 'nuclei'],
        'table nuclei: has no column cell_type'),
    'cells': (dict(), ['--version', 943, '--cells', '12'], 'synapses has no synapse of these cells or in this box'),
    'no token': (dict(token=''), ['--version', 943, '--cells', '1'], '/auth/api/v1/create_token, and save it in '),
    'wrong token': (dict(token='ff'), ['--version', 943, '--cells', '1'], '/auth/api/v1/create_token, and save it in '),
}

@pytest.mark.parametrize('server,options,message', refused.values(), ids=refused)
def test_refusals(server, options, message, serve, tmp_path):
    run,_ = serve(**server)
    done = run(tmp_path, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not list(tmp_path.glob('*.parquet'))

def test_wrong_command(serve, tmp_path):
    "No server; nothing to ask for; half a box"
    run,_ = serve()
    options = ['--version', 943, '--cells', 1]
    done = run(tmp_path, *options, '--server', 'http://127.0.0.1:9')
    assert done.returncode == 1
    assert 'error: http://127.0.0.1:9: ' in done.stderr
    done = run(tmp_path, '--version', 943)
    assert done.returncode == 2
    assert 'give --cells or --box-nm' in done.stderr
    done = run(tmp_path, '--version', 943, '--box-nm', '1,2,3')
    assert done.returncode == 2
    assert "'1,2,3' is not Z,Y,X,Z,Y,X" in done.stderr
