"The tables of the paper's own volume: ids, duplicates, types, and a wrong column that their README names."
from pathlib import Path
import pandas as pd, pytest
from synapseclr.data.tables import TableError, read_neurons, read_synapses

data = Path(__file__).parent.parent.parent/'shared/data/pinky100_tables'
pytestmark = pytest.mark.skipif(not data.exists(),
    reason='the tables of the paper are not at ../shared/data/pinky100_tables')

def test_wrong_soma_column():
    with pytest.raises(TableError, match='y is 1 times x in every row'): read_neurons(data/'soma_valence_v185.csv')

def test_types_of_neurons():
    "456 somata of 453 cells; three of the cells are merged with glia, and one is uncertain"
    neurons = read_neurons(data/'soma_valence_v185.csv', voxel_nm=(40, 4, 4))
    assert len(neurons) == 453
    assert (neurons.n_somata > 1).sum() == 3
    assert neurons.root_id.dtype == 'int64'
    assert (neurons.inhibitory == 0).sum() == 364
    assert (neurons.inhibitory == 1).sum() == 32
    assert neurons.inhibitory.isna().sum() == 57
    assert neurons.soma_y_nm.corr(neurons.soma_x_nm) < .9
    assert neurons.soma_x_nm.notna().sum() == 450

def test_synapses_join_their_neurons(tmp_path):
    "Both cells of every proofread synapse are found, and both are excitatory; the two autapses are refused"
    with pytest.raises(TableError, match='same cell in 2 rows'):
        read_synapses(data/'soma_subgraph_synapses_spines_v185.csv', (40, 4, 4))
    rows = pd.read_csv(data/'soma_subgraph_synapses_spines_v185.csv')
    rows[rows.pre_root_id != rows.post_root_id].to_csv(tmp_path/'synapses.csv', index=False)
    synapses = read_synapses(tmp_path/'synapses.csv', (40, 4, 4))
    neurons = read_neurons(data/'soma_valence_v185.csv', (40, 4, 4))
    inhibitory = neurons.set_index('root_id').inhibitory
    assert len(synapses) == 1959
    assert (synapses.pre_root_id.map(inhibitory) == 0).all()
    assert (synapses.post_root_id.map(inhibitory) == 0).all()
    # as floating point some ids would not be found
    assert not synapses.pre_root_id.astype(float).astype('int64').isin(inhibitory.index).all()
