"The paper's figures from a small run: every notebook draws, the command draws all, and missing files are named."
import shutil
import numpy as np, pandas as pd, pytest
from conftest import Links
from PIL import Image
from synapseclr.pipeline.figures import FigureError, FigureRun, draw_figures, figure_names
from synapseclr.core import asset

@pytest.fixture(scope='module')
def run():
    "A run on a small phantom, with all stages but `evaluate`"
    from synapseclr.dev.fixtures import tiny_phantom
    _,overrides = tiny_phantom('evaluate')
    return FigureRun(overrides[0].removeprefix('run='))

def is_drawn(path):
    "Whether a picture is wide enough and not empty"
    pixels = np.asarray(Image.open(path).convert('L'))
    dark_fraction = (pixels < 250).mean()
    return pixels.shape[1] > 900 and .01 < dark_fraction < .95

@pytest.mark.parametrize('name', figure_names())
def test_notebook_draws(name, run):
    "In this process, which loads libraries once; `test_command` runs notebooks with papermill"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    figures = run.folder/'figures'
    figures.mkdir(exist_ok=True)
    notebook = asset(f'figures/{name}.ipynb')
    nb = read_nb(notebook)
    parameters = next(cell for cell in nb.cells if 'parameters' in cell.metadata.get('tags', []))
    parameters.source += f'\nrun = {str(run.folder)!r}'
    CaptureShell(notebook, mpl_format='png').run_all(nb, exc_stop=True)
    if name == 'ledger':
        ledger = pd.read_csv(figures/'ledger.csv').set_index('number')
        assert len(ledger) > 15
        assert abs(ledger.difference['parameters of the projector, thousands']) < .5
    else:
        assert is_drawn(figures/f'{name}.png')
        assert (figures/f'{name}.pdf').read_bytes()[:5] == b'%PDF-'

def test_command(run, tmp_path, run_command, monkeypatch):
    """A run that was moved and has no files of later stages: the command draws the figures it can, and names what is
    missing for the others"""
    moved = tmp_path/'moved'
    shutil.copytree(run.folder, moved, ignore=shutil.ignore_patterns('figures', 'axes.parquet', 'report'))
    figures = moved/'figures'
    monkeypatch.setattr('synapseclr.pipeline.figures.figure_names', lambda: ['fig1', 'fig5', 'figS1'])
    done = draw_figures(moved)
    assert done['fig1'] == done['figS1'] == ''
    assert 'run `synapseclr manifold` first' in done['fig5']
    index = (figures/'index.html').read_text()
    links = Links(index)
    assert {'fig1.png', 'figS1.png'} == set(links.loads)
    assert all((figures/path).exists() for path in links.leads)
    assert 'synapseclr manifold' in index
    assert (figures/'fig1.ipynb').exists()
    assert is_drawn(figures/'fig1.png')
    with pytest.raises(FigureError, match='synapseclr manifold'): draw_figures(moved, ['fig5'])
    code,text = run_command('figures', moved, '--only', 'figS1')
    assert code == 0
    assert text.strip().endswith('index.html')
