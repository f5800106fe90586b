"The tables of the paper's own volume: ids, duplicates, types, and a wrong column that their README names."
from pathlib import Path
import pytest
from synapseclr.data.neurons import read_neurons
from synapseclr.data.synapses import read_synapses
from synapseclr.data.tables import TableError

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

def test_synapses_join_their_neurons():
    "Both cells of every proofread synapse are found, and both are excitatory; the two autapses are rejected"
    synapses = read_synapses(data/'soma_subgraph_synapses_spines_v185.csv', (40, 4, 4))
    assert synapses.reject_reason.value_counts().to_dict() == {'': 1959, 'the same cell on both sides': 2}
    synapses = synapses[synapses.reject_reason == '']
    neurons = read_neurons(data/'soma_valence_v185.csv', (40, 4, 4))
    inhibitory = neurons.set_index('root_id').inhibitory
    assert (synapses.pre_root_id.map(inhibitory) == 0).all()
    assert (synapses.post_root_id.map(inhibitory) == 0).all()
    # as floating point some ids would not be found
    assert not synapses.pre_root_id.astype(float).astype('int64').isin(inhibitory.index).all()
