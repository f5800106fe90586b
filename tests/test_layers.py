"Layers as labs have them: clefts without ids, lossy or stretched EM, white padding, no mitochondria, no home folder."
import numpy as np, pandas as pd, pytest
from cloudvolume import CloudVolume
from scipy import ndimage
from conftest import synapseclr
from synapseclr.data.volume import LayerSource, VolumeError, open_layer, read, write_layer
from synapseclr.ingest.annotate import annotate
from synapseclr.ingest.cutout import DataConfig, FetchConfig
from synapseclr.ingest.fetch import describe_plan, fetch
from synapseclr.phantom.build import make_phantom
from synapseclr.phantom.connectome import PhantomConfig

layer_names = ('em', 'seg', 'cleft', 'mito')
window = FetchConfig(window_nm=(1200, 1200, 1200), max_blank_fraction=.25)

class Lab:
    "A phantom whose layers can be replaced; its table has no ids of clefts"
    def __init__(self, folder):
        self.folder = folder
        make_phantom(folder/'phantom', PhantomConfig(seed=2, shape=(96, 384, 384), defects=0.))
        self.layers = {name: dict(path=str(folder/'phantom'/name)) for name in layer_names}
        opened = {name: open_layer(name, LayerSource(**self.layers[name])) for name in layer_names}
        self.voxels = {name: read(layer, layer.box) for name,layer in opened.items()}
        self.voxel_nm = opened['em'].voxel_nm

    def write(self, name, voxels):
        "Write a layer, as the configuration names it"
        return dict(path=write_layer(str(self.folder/name), voxels, self.voxel_nm))

    def measured(self, name, config=window, **layers):
        "The measured synapses of a run with some layers replaced"
        layers = {layer: source for layer,source in (self.layers | layers).items() if source}
        data = DataConfig(table=str(self.folder/'phantom/synapses.parquet'), **layers)
        fetch(data, config, self.folder/name)
        return annotate(self.folder/name)

@pytest.fixture(scope='module')
def lab(tmp_path_factory): return Lab(tmp_path_factory.mktemp('lab'))

@pytest.fixture(scope='module')
def base(lab): return lab.measured('base')

def probabilities(cleft_ids, voxel_nm):
    distance_nm = ndimage.distance_transform_edt(cleft_ids == 0, sampling=voxel_nm)
    return (255*np.exp(-distance_nm/100)).astype(np.uint8)

clefts_without_ids = {
    'mask of 1': lambda cleft_ids, voxel_nm: (cleft_ids > 0).astype(np.uint8),
    'mask of 255': lambda cleft_ids, voxel_nm: (cleft_ids > 0)*np.uint8(255),
    'mask as segmentation': lambda cleft_ids, voxel_nm: (cleft_ids > 0).astype(np.uint32),
    'probabilities': probabilities,
}

@pytest.mark.parametrize('name', clefts_without_ids)
def test_clefts_without_ids_are_refused(name, lab):
    "Before any work; a mask can be declared as one"
    source = lab.write(name, clefts_without_ids[name](lab.voxels['cleft'], lab.voxel_nm))
    with pytest.raises(VolumeError, match='layer cleft.* is a mask, probabilities or cells, not ids of clefts'):
        lab.measured(f'{name}, as ids', cleft=source)
    assert not (lab.folder/f'{name}, as ids').exists()
    if name != 'probabilities': return
    with pytest.raises(VolumeError, match='layer cleft.* has to be cut at a threshold first'):
        lab.measured(f'{name}, as a mask', cleft=source | dict(kind='mask'))

def test_the_cells_as_clefts_are_refused(lab):
    with pytest.raises(VolumeError, match='the cleft has the id of one of the two cells'):
        lab.measured('cells', cleft=lab.layers['seg'])

def n_pieces(cleft_ids):
    "Connected pieces of each cleft"
    pieces,_ = ndimage.label(cleft_ids > 0, np.ones((3, 3, 3)))
    pairs = pd.DataFrame(dict(id=cleft_ids[cleft_ids > 0], piece=pieces[cleft_ids > 0])).drop_duplicates()
    assert pairs.piece.is_unique # no two clefts touch
    return pairs.id.value_counts()

def test_a_mask_gives_the_clefts_of_ids(lab, base):
    "Volumes are equal where a cleft is in one piece; a synapse's own id stands for that of its cleft"
    source = lab.write('mask', (lab.voxels['cleft'] > 0).astype(np.uint8)) | dict(kind='mask')
    table = lab.measured('as mask', cleft=source)
    one_piece = base.cleft_id.map(n_pieces(lab.voxels['cleft'])) == 1
    assert one_piece.sum() > 100
    pd.testing.assert_series_equal(table.cleft_um3[one_piece], base.cleft_um3[one_piece])
    assert np.isclose(table.cleft_um3, base.cleft_um3, equal_nan=True).mean() > .95
    assert (table.cleft_id == table.id).all()

def test_contact_stands_in_for_clefts(lab, base):
    "It lies as the cleft does, and grows with it"
    table = lab.measured('contact', cleft=dict(kind='contact'))
    assert (table.reject_reason == '').sum() == (base.reject_reason == '').sum()
    normal = ['cleft_normal_z', 'cleft_normal_y', 'cleft_normal_x']
    cosine = (table[normal].to_numpy()*base[normal].to_numpy()).sum(1)
    angle_deg = np.degrees(np.arccos(np.abs(cosine).clip(0, 1)))
    assert np.nanmedian(angle_deg) < 5
    assert np.log(table.cleft_um3).corr(np.log(base.cleft_um3)) > .4
    assert table.cleft_id.is_unique # no two synapses count as one cleft

def test_lossy_em(lab, base):
    "JPEG turns 0 into small values beside tissue; lost sections are recognised all the same"
    em = lab.voxels['em']
    info = CloudVolume.create_new_info(1, 'image', 'uint8', 'jpeg', lab.voxel_nm[::-1], (0, 0, 0), em.shape[::-1],
        chunk_size=(60, 60, 20))
    path = f'file://{lab.folder/"jpeg"}'
    volume = CloudVolume(path, info=info, progress=False)
    volume.commit_info()
    volume[:, :, :] = np.asfortranarray(em.T)[..., None]
    assert (volume[:, :, :][..., 0].T[em == 0] > 0).any()
    table = lab.measured('jpeg run', em=dict(path=path))
    pd.testing.assert_series_equal(table.n_blank_sections, base.n_blank_sections)
    pd.testing.assert_series_equal(table.blank_fraction, base.blank_fraction)

def stretched(em):
    "A seventh of the tissue becomes black"
    darkest = np.quantile(em[em > 0], .15)
    return np.where(em > 0, ((em-darkest)*255/(220-darkest)).clip(0, 255), 0).astype(np.uint8)

@pytest.mark.parametrize('name,change', {
    'stretched': stretched,
    'white padding': lambda em: np.where(em == 0, 255, em).astype(np.uint8),
}.items(), ids=['stretched', 'white padding'])
def test_dark_is_not_missing(name, change, lab, base):
    table = lab.measured(f'{name} run', em=lab.write(name, change(lab.voxels['em'])))
    assert base.n_blank_sections.max() > 0
    pd.testing.assert_series_equal(table.n_blank_sections, base.n_blank_sections)
    pd.testing.assert_series_equal(table.blank_fraction, base.blank_fraction)
    assert (table.reject_reason == base.reject_reason).all()

mito_columns = ['pre_mito', 'post_mito', 'pre_mito_um3', 'post_mito_um3']

def test_no_mitochondria_layer(lab, base):
    table = lab.measured('no mito', mito=None)
    assert table[mito_columns].isna().all(axis=None)
    others = [column for column in base if column not in (*mito_columns, 'mito_measured')]
    pd.testing.assert_frame_equal(table[others], base[others])

def test_hole_in_the_mitochondria_layer(lab, base):
    "Where the layer ends inside a synapse, its mitochondria are not known"
    table = lab.measured('half mito', mito=lab.write('half', lab.voxels['mito'][:, :, :200]))
    assert (table.reject_reason == base.reject_reason).all()
    known = table.mito_measured
    assert 0 < known.sum() < len(table)
    pd.testing.assert_frame_equal(table.loc[known, mito_columns], base.loc[known, mito_columns])
    assert table.loc[~known, mito_columns].isna().all(axis=None)

@pytest.mark.parametrize('window_nm,message', [
    ((12000, 1200, 1200), 'all synapses would be rejected as blank EM'),
    ((1e7, 1e7, 1e7), r'a synapse would need .* GB'),
], ids=str)
def test_window_larger_than_the_volume(window_nm, message, lab):
    config = FetchConfig(window_nm=window_nm)
    data = DataConfig(table=str(lab.folder/'phantom/synapses.parquet'), **lab.layers)
    for refuse in (lambda: fetch(data, config, lab.folder/'large'), lambda: describe_plan(data, config)):
        with pytest.raises(VolumeError, match=message): refuse()

def test_home_folder_cannot_be_written(tiny_config, tmp_path):
    "CloudVolume and task-queue make folders in the home folder when they are imported"
    (tmp_path/'file').touch()
    home = tmp_path/'file/home'
    done = synapseclr('fetch', '--config', tiny_config, cwd=tmp_path, HOME=str(home))
    assert done.returncode == 1
    assert f'error: the home folder {home} cannot be written to' in done.stderr
    assert 'Set HOME' in done.stderr
    assert 'Traceback' not in done.stderr
