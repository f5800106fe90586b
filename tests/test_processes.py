"Several processes compute what one does, and training that was killed at any step ends as training that was not."
import json, os, random, signal, socket, subprocess
import numpy as np, pytest, torch
from conftest import files, root
from synapseclr.dev.fixtures import in_processes, tiny_fetched

# Five steps of each objective and optimiser on the same eight synapses, in float64. Every process writes losses, first
# gradients and final state to `N-RANK.pt` in the folder of the command line
five_steps = """
import json, sys, torch
from functools import partial
from synapseclr.learn.batches import cached_gradient_backward
from synapseclr.learn.distributed import *
from synapseclr.learn.loss import nt_xent, vicreg
from synapseclr.learn.model import SynapseNet
with process_group('cpu'):
    views = torch.randn(2, 8, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    cells = torch.arange(8)[None, :, None].div(torch.tensor([2, 1]), rounding_mode='floor').expand(2, 8, 2) + 2**60
    n = 8//get_world_size()
    my_rows = slice(get_rank()*n, (get_rank()+1)*n)
    neurite_loss = partial(nt_xent, neurites=cells[:, my_rows], rows=3)
    objectives = dict(nt_xent=nt_xent, neurites=neurite_loss, vicreg=vicreg)
    results = {}
    for name,objective in objectives.items():
        for optimiser_class in (torch.optim.Adam, torch.optim.SGD):
            net = convert_sync_batchnorm(SynapseNet('demo')).double()
            optimiser = optimiser_class(net.parameters(), lr=1e-3)
            project = lambda part: [net(view[my_rows][part]).projection for view in views]
            losses = []
            gradient = None
            for step in range(5):
                optimiser.zero_grad()
                loss = cached_gradient_backward(net, [slice(0, n)], project, objective)
                losses.append(all_reduce_sum(loss).item())
                sum_gradients(net)
                if gradient is None: gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
                optimiser.step()
            state = torch.cat([v.double().flatten() for v in net.state_dict().values()])
            results[f'{name} {optimiser_class.__name__}'] = dict(losses=losses, gradient=gradient, state=state)
    torch.save(results, f'{sys.argv[1]}/{get_world_size()}-{get_rank()}.pt')
    print(json.dumps(get_rank()))
"""

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "Results of each of 1, 2 and 4 processes"
    folder = tmp_path_factory.mktemp('processes')
    for n in (1, 2, 4): assert in_processes(n, five_steps, folder) == list(range(n))
    return {n: [torch.load(folder/f'{n}-{rank}.pt') for rank in range(n)] for n in (1, 2, 4)}

@pytest.mark.parametrize('n', [2, 4])
def test_as_one_process(results, n):
    """Losses, every gradient, and parameters and statistics after five steps; batch normalisation is over all
    processes"""
    [expected] = results[1]
    assert len(expected) == 6
    for result in expected.values(): assert len(set(result['losses'])) == 5
    for process in results[n]:
        for name,result in process.items():
            assert result['gradient'].abs().max() > 0
            for quantity in ('losses', 'gradient', 'state'):
                where = f'{name}, {quantity}: '
                torch.testing.assert_close(torch.as_tensor(result[quantity]), torch.as_tensor(expected[name][quantity]),
                    rtol=0, atol=1e-10, msg=lambda message, where=where: where + message)

# Trains on the run folder of the command line, and is killed at the step that follows it (-1: never)
train_or_die = """
import json, os, signal, sys
import synapseclr.learn.train as train
from synapseclr.learn.views import AugmentConfig, CubeConfig
fatal_step = int(sys.argv[2])
batches = train.batches
def counted(read_chunks, steps, indices):
    for batch in batches(read_chunks, steps, indices):
        if batch[0] == fatal_step: os.kill(os.getpid(), signal.SIGKILL)
        yield batch
train.batches = counted
config = train.TrainConfig(model='demo', batch_size=4, epochs=5, cosine_period_epochs=5, lr=1e-3,
    checkpoint_every_steps=3, precision='fp32')
train.train(sys.argv[1], config, AugmentConfig(inflation=(1, 2)), CubeConfig(size=16, voxel_nm=45.), device='cpu')
print(json.dumps('done'))
"""
never = -1

@pytest.fixture(scope='module')
def fetched(tmp_path_factory): return tiny_fetched(tmp_path_factory.mktemp('fetched'))

def copy_of(fetched, folder):
    subprocess.run(['cp', '-r', fetched, folder], check=True)
    return folder

@pytest.fixture(scope='module')
def uninterrupted(fetched, tmp_path_factory):
    "Runs that were trained without a kill, by one and by two processes"
    folder = tmp_path_factory.mktemp('uninterrupted')
    runs = {n: copy_of(fetched, folder/str(n)) for n in (1, 2)}
    for n,run in runs.items(): assert in_processes(n, train_or_die, run, never) == ['done']*n
    return runs

def read_log(run): return [json.loads(line) for line in (run/'train/log.jsonl').read_text().splitlines()]

trained_files = ['train/*.safetensors', 'train/log.jsonl']

def test_processes_train_alike(uninterrupted):
    """Losses agree to rounding, as two processes add in another order. The first losses agree to a hundred thousandth;
    every step of Adam on this tiny volume multiplies the difference"""
    log = {n: read_log(run) for n,run in uninterrupted.items()}
    steps = {n: [entry.get('step') for entry in log[n]] for n in log}
    assert steps[1] == steps[2]
    assert len(steps[1]) == 1+10+5
    losses = {n: [entry['loss'] for entry in log[n] if 'loss' in entry] for n in log}
    np.testing.assert_allclose(losses[2][:2], losses[1][:2], rtol=1e-4)
    np.testing.assert_allclose(losses[2][:4], losses[1][:4], rtol=1e-3)
    np.testing.assert_allclose(np.mean(losses[2]), np.mean(losses[1]), rtol=.02)

@pytest.mark.parametrize('n', [1, 2])
def test_killed_three_times(n, uninterrupted, fetched, tmp_path):
    """SIGKILL at three random steps, each time followed by the same command. Weights, moments, log and best weights are
    the same to the bit"""
    run = copy_of(fetched, tmp_path/'run')
    exit_code = f'(-{signal.SIGKILL.value}{"|1" if n > 1 else ""})'
    for fatal_step in sorted(random.Random(n).sample(range(10), 3)):
        with pytest.raises(RuntimeError, match=f'ended with {exit_code}'):
            in_processes(n, train_or_die, run, fatal_step)
        assert not (run/'train/weights.safetensors').exists()
    assert in_processes(n, train_or_die, run, never) == ['done']*n
    assert files(run, *trained_files) == files(uninterrupted[n], *trained_files)

# Trains on views that are all the same, and prints the error of this process
collapse = """
import json, sys
from synapseclr.learn.train import TrainConfig, TrainingError, train
from synapseclr.learn.views import AugmentConfig, CubeConfig
config = TrainConfig(model='demo', batch_size=4, epochs=5, cosine_period_epochs=5, precision='fp32')
augment = AugmentConfig(inflation=(1, 2), sd=1e9)
try: train(sys.argv[1], config, augment, CubeConfig(size=16, voxel_nm=45.), device='cpu')
except TrainingError as error: print(json.dumps(str(error)))
"""

def test_all_processes_stop_at_a_collapse(fetched, tmp_path):
    "Not only the first one, which measures it: the other would wait for it"
    run = copy_of(fetched, tmp_path/'run')
    first,second = in_processes(2, collapse, run)
    assert first.startswith('collapse: after epoch 0 all projections point the same way')
    assert second == first

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def test_slurm_script(fetched, tmp_path):
    """configs/train.slurm unchanged, with replacements of `srun` and `scontrol` that know this machine only: two
    processes train through the command"""
    for name,body in dict(srun='exec "$@"', scontrol='echo 127.0.0.1').items():
        (tmp_path/name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/name).chmod(0o755)
    run = copy_of(fetched, tmp_path/'run')
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID='7', SLURM_NNODES='1',
        SLURM_JOB_NODELIST='here', SLURM_GPUS_ON_NODE='2', MASTER_PORT=str(free_port()), OMP_NUM_THREADS='1')
    options = ['--set', f'run={run}', '--set', 'train.batch_size=4']
    done = subprocess.run(['bash', root/'configs/train.slurm', fetched.parent/'tiny.toml', *options], cwd=tmp_path,
        env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [entry['step'] for entry in read_log(run) if 'loss' in entry] == list(range(8))
    assert (run/'train/weights.safetensors').exists()
