"What pages show is what was measured: stored outputs agree with the tables beside them, and pages with each other."
import ast, json, re
import pandas as pd, pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from conftest import root

nbs = root/'nbs'
def is_hidden(path): return any(part.startswith(('.', '_')) for part in path.relative_to(root).parts)
notebooks = [path for path in sorted(nbs.rglob('*.ipynb')) if not is_hidden(path)]

def code_cells(nb):
    "Code cells that run without flags"
    cells = [cell for cell in json.loads(nb.read_text())['cells'] if cell['cell_type'] == 'code']
    return [cell for cell in cells if not re.search(r'^#\| (slow|cuda|eval: false)', ''.join(cell['source']), re.M)]

def names(source):
    "Names that a cell sets and names that it uses"
    tree = ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.M))
    sets, uses = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name): (sets if isinstance(node.ctx, ast.Store) else uses).add(node.id)
        if isinstance(node, ast.FunctionDef | ast.ClassDef): sets.add(node.name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            sets |= {(alias.asname or alias.name).split('.')[0] for alias in node.names}
    return sets, uses

def needed_cells(cells):
    "The cells that read a measured table, those that use what these read, and all that either needs"
    sources = [''.join(cell['source']) for cell in cells]
    reads = ['measured/' in source and '.to_csv(' not in source for source in sources]
    sets, uses = zip(*map(names, sources))
    shown = set()
    tainted = set()
    for i in range(len(cells)):
        if reads[i] or uses[i] & tainted:
            shown.add(i)
            tainted |= sets[i]
    needed = set(shown)
    wanted = set().union(*(uses[i] for i in shown))
    for i in reversed(range(len(cells))):
        stars = 'import *' in sources[i]
        if i not in needed and (sets[i] & wanted or stars): needed.add(i)
        if i in needed: wanted |= uses[i]
    return sorted(needed), shown

def text_of(output):
    "What an output says; pictures are left out"
    if output.get('output_type') == 'stream': return ''.join(output['text'])
    data = output.get('data', {})
    return ''.join(data.get('text/html') or data.get('text/markdown') or data.get('text/plain') or '')

def said(cell):
    "The text that a cell shows, on one line"
    def is_picture(output): return any(kind.startswith('image') for kind in output.get('data', {}))
    shown = [output for output in cell['outputs'] if not is_picture(output)]
    text = ' '.join(map(text_of, shown))
    return re.sub(r'\s+', ' ', re.sub(r'<style.*?</style>', '', text, flags=re.S)).strip()

showing = [nb for nb in notebooks if any('measured/' in ''.join(cell['source']) for cell in code_cells(nb))]

@pytest.mark.parametrize('nb', showing, ids=lambda p: p.relative_to(nbs).with_suffix('').as_posix())
def test_outputs_are_those_of_the_tables(nb):
    "A stored output differs from what the measured table gives now: run `make results`, or the notebook"
    cells = code_cells(nb)
    needed, shown = needed_cells(cells)
    assert shown
    with working_directory(nb.parent):
        shell = CaptureShell(nb, mpl_format='png')
        for i in needed:
            now = shell.run(''.join(cells[i]['source']))
            assert not shell.exc, shell.exc
            if i in shown: assert said(dict(outputs=now)) == said(cells[i])

def test_every_table_is_shown():
    "Each measured table is read by a page, by its name or by a pattern such as `pretrained_{name}`"
    sources = [''.join(cell['source']) for nb in notebooks for cell in code_cells(nb)]
    names_read = {name for source in sources if '.to_csv(' not in source
        for name in re.findall(r"measured/([\w{}]+)\.csv", source) + re.findall(r"read\('(\w+)'\)", source)}
    patterns = [re.sub(r'\{\w+\}', r'\\w+', name) for name in names_read if not re.fullmatch(r'\{\w+\}', name)]
    for path in sorted((nbs/'measured').glob('*.csv')):
        assert any(re.fullmatch(pattern, path.stem) for pattern in patterns), f'{path.name}: no page reads it'

def prose():
    "Markdown of every page, with its name"
    for nb in notebooks:
        for cell in json.loads(nb.read_text())['cells']:
            if cell['cell_type'] == 'markdown': yield nb.relative_to(nbs).as_posix(), ''.join(cell['source'])

# One thing, one number: where several pages state it, they state the same
stated_twice = {
    'minutes of the demo': r'demo[^.|]{0,80}?(?:about )?(\d+|twelve) minutes',
    'newest Python': r'Python 3\.11 to (3\.\d+)',
    'size of the environment': r'`\.venv`[^.]{0,60}\(?(\d\.\d) GB',
}

@pytest.mark.parametrize('thing', stated_twice)
def test_pages_agree(thing):
    texts = [*prose(), ('cli', (root/'synapseclr/cli.py').read_text()), ('Makefile', (root/'Makefile').read_text())]
    stated = re.compile(stated_twice[thing], re.S)
    found = {(page, value.replace('twelve', '12')) for page, text in texts for value in stated.findall(text)}
    assert found, 'no page states it any more'
    assert len({value for _, value in found}) == 1, found

def test_first_page_agrees_with_mouse_cortex():
    "The sentence on real tissue states what the measured table has"
    scores = pd.read_csv(nbs/'measured/ac3_targets.csv').set_index(['target', 'metric', 'features']).value
    sentence = next(text for page,text in prose() if page == 'index.ipynb' and 'On **real tissue**' in text)
    said = [float(number) for number in re.findall(r'(?<![\w])\.\d\d', sentence)]
    density,spine,axon,volume = (('psd_size_px', 'Spearman'), ('on_spine', 'AUC'), ('axon = inhibitory', 'AUC'),
        ('spine_volume_vx', 'Spearman'))
    expected = [scores[*target, 'measured'] for target in (density, spine, axon)]
    expected += [scores[*target, 'here'] for target in (density, spine, axon, volume)] + [scores[*volume, 'measured']]
    assert said == [round(value, 2) for value in expected]
    alone = pd.read_csv(nbs/'measured/ac3_targets.csv').query("subset == 'all' and ~features.str.contains('measured')")
    assert (alone.measured_gain_hi95.dropna() >= 0).all() # no lead over `measured` has an interval that excludes 0
    assert scores['on_spine', 'AUC', 'here']-scores['on_spine', 'AUC', 'untrained'] < .02
    assert scores['vesicle_count', 'Spearman', 'here'] > scores['vesicle_count', 'Spearman', 'measured']
