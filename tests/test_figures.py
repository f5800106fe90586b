"The paper's figures, drawn from a small run: every notebook, the command, and what is missing said by name."
import shutil
import numpy as np, pandas as pd, pytest
from conftest import say
from PIL import Image
from test_line import Links
from synapseclr.pipeline.figures import FigureError, FigureRun, draw_figures, figure_names
from synapseclr.core import asset

@pytest.fixture(scope='module')
def run():
    "A run on a small phantom, with everything but its evaluation"
    from synapseclr.dev.fixtures import tiny_phantom
    return FigureRun(tiny_phantom('evaluate')[1][0].partition('=')[2])

def drawn(path):
    "That a picture is there and not empty"
    pixels = np.asarray(Image.open(path).convert('L'))
    return pixels.shape[1] > 900 and .01 < (pixels < 250).mean() < .95

@pytest.mark.parametrize('name', figure_names())
def test_notebook_draws(name, run):
    "In this process, which loads libraries once; papermill has its own test"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    (run.folder/'figures').mkdir(exist_ok=True)
    nb = read_nb(asset(f'figures/{name}.ipynb'))
    parameters = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    parameters.source += f'\nrun = {str(run.folder)!r}'
    shell = CaptureShell(asset(f'figures/{name}.ipynb'), mpl_format='png')
    shell.run_all(nb, exc_stop=True)
    if name == 'ledger':
        ledger = pd.read_csv(run.folder/'figures/ledger.csv').set_index('number')
        assert len(ledger) > 15 and abs(ledger.difference['parameters of the projector, thousands']) < .5
    else:
        assert drawn(run.folder/f'figures/{name}.png') and (run.folder/f'figures/{name}.pdf').read_bytes()[
            :5] == b'%PDF-'

def test_command(run, tmp_path, capsys, monkeypatch):
    "A run that was moved and has come as far as its features: what can be drawn is, and the rest is named"
    moved = tmp_path/'moved'
    shutil.copytree(run.folder, moved, ignore=shutil.ignore_patterns('figures', 'axes.parquet', 'report'))
    monkeypatch.setattr('synapseclr.pipeline.figures.figure_names', lambda: ['fig1', 'fig5', 'figS1'])
    done = draw_figures(moved)
    assert done['fig1'] == done['figS1'] == '' and 'run `synapseclr manifold` first' in done['fig5']
    page = Links((moved/'figures/index.html').read_text())
    assert {'fig1.png', 'figS1.png'} == set(page.loads) and all((moved/'figures'/o).exists()
        for o in page.leads) and 'synapseclr manifold' in (moved/'figures/index.html').read_text()
    assert (moved/'figures/fig1.ipynb').exists() and drawn(moved/'figures/fig1.png')
    with pytest.raises(FigureError, match='synapseclr manifold'): draw_figures(moved, ['fig5'])
    code,said = say(capsys, monkeypatch, 'figures', moved, '--only', 'figS1')
    assert code == 0 and said.strip().endswith('index.html')
