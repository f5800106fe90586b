"Several processes compute what one does, and a run that was killed at any step ends as one that was not."
import json, os, random, signal, socket, subprocess
import numpy as np, pytest, torch
from conftest import files, root
from synapseclr.dev.fixtures import in_processes, tiny_fetched

# Five steps of each objective and optimiser on the same eight synapses, in float64; prints losses, first gradients and
# final parameters
steps = """
import json, torch
from functools import partial
from synapseclr.learn.distributed import *
from synapseclr.learn.loss import nt_xent, vicreg
from synapseclr.learn.model import SynapseNet
from synapseclr.learn.train import cached_gradient_backward
with process_group('cpu'):
    views = torch.randn(2, 8, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    cells = torch.arange(8)[None, :, None].div(torch.tensor([2, 1]), rounding_mode='floor').expand(2, 8, 2) + 2**60
    n = 8//get_world_size()
    own = slice(get_rank()*n, (get_rank()+1)*n)
    objectives = dict(nt_xent=nt_xent, neurites=partial(nt_xent, neurites=cells[:, own], rows=3), vicreg=vicreg)
    found = {}
    for name,objective in objectives.items():
        for optimiser in (torch.optim.Adam, torch.optim.SGD):
            net = convert_sync_batchnorm(SynapseNet('demo')).double()
            o,losses,gradient = optimiser(net.parameters(), lr=1e-3),[],None
            for step in range(5):
                project = lambda part: [net(v[own][part]).projection for v in views]
                o.zero_grad()
                losses.append(all_reduce_sum(cached_gradient_backward(net, [slice(0, n)], project, objective)).item())
                sum_gradients(net)
                if gradient is None: gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
                o.step()
            state = torch.cat([v.double().flatten() for v in net.state_dict().values()])
            found[f'{name} {optimiser.__name__}'] = dict(losses=losses, gradient=gradient, state=state)
    torch.save(found, f'{__import__("sys").argv[1]}/{get_world_size()}-{get_rank()}.pt')
    print(json.dumps(get_rank()))
"""

@pytest.fixture(scope='module')
def computed(tmp_path_factory):
    "What 1, 2 and 4 processes found"
    folder = tmp_path_factory.mktemp('processes')
    for n in (1, 2, 4): assert in_processes(n, steps, folder) == list(range(n))
    return {n: [torch.load(folder/f'{n}-{r}.pt') for r in range(n)] for n in (1, 2, 4)}

@pytest.mark.parametrize('n', [2, 4])
def test_as_one_process(computed, n):
    "Loss, every gradient, and parameters and statistics after five steps; with batch normalisation over all processes"
    one = computed[1][0]
    assert len(one) == 6 and all(len(set(o['losses'])) == 5 for o in one.values())
    for found in computed[n]:
        for name,o in found.items():
            assert o['gradient'].abs().max() > 0
            for what in ('losses', 'gradient', 'state'):
                torch.testing.assert_close(torch.as_tensor(o[what]), torch.as_tensor(one[name][what]), rtol=0,
                    atol=1e-10, msg=lambda m, name=name, what=what: f'{name}, {what}: {m}')

go = """
import json, os, signal, sys
import synapseclr.learn.train as t
from synapseclr.learn.views import AugmentConfig, CubeConfig
deadly,step = int(sys.argv[2]),t.batches
def counted(store, steps, indices):
    for o in step(store, steps, indices):
        if o[0] == deadly: os.kill(os.getpid(), signal.SIGKILL)
        yield o
t.batches = counted
config = t.TrainConfig(model='demo', batch_size=4, epochs=5, restart_epochs=5, lr=1e-3, checkpoint_steps=3, precision='fp32')
t.train(sys.argv[1], config, AugmentConfig(inflation=(1, 2)), CubeConfig(size=16, voxel_nm=45.), device='cpu')
print(json.dumps('done'))
"""

@pytest.fixture(scope='module')
def fetched(tmp_path_factory): return tiny_fetched(tmp_path_factory.mktemp('fetched'))

def copy_of(fetched, folder):
    subprocess.run(['cp', '-r', fetched, folder], check=True)
    return folder

@pytest.fixture(scope='module')
def whole(fetched, tmp_path_factory):
    "Runs that were not killed, of one and of two processes"
    folder = tmp_path_factory.mktemp('whole')
    runs = {n: copy_of(fetched, folder/str(n)) for n in (1, 2)}
    for n,run in runs.items(): assert in_processes(n, go, run, -1) == ['done']*n
    return runs

made = ['train/*.safetensors', 'train/log.jsonl']

def test_processes_train_alike(whole):
    """To rounding, as the sums are taken in another order: a hundred thousandth at first, which every step of Adam on
    this tiny volume makes some times larger"""
    one,two = ([json.loads(line) for line in (whole[n]/'train/log.jsonl').read_text().splitlines()] for n in (1, 2))
    assert [o.get('step') for o in one] == [o.get('step') for o in two] and len(one) == 1+10+5
    one,two = ([o['loss'] for o in log if 'loss' in o] for log in (one, two))
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-4)
    np.testing.assert_allclose(two[:4], one[:4], rtol=1e-3)
    np.testing.assert_allclose(np.mean(two), np.mean(one), rtol=.02)

@pytest.mark.parametrize('n', [1, 2])
def test_killed_three_times(n, whole, fetched, tmp_path):
    """SIGKILL at three random steps, each time the same command again: weights, moments, log and best weights are the
    same to the bit"""
    run = copy_of(fetched, tmp_path/'run')
    for deadly in sorted(random.Random(n).sample(range(10), 3)):
        with pytest.raises(RuntimeError, match=f'ended with (-{signal.SIGKILL.value}{"|1" if n > 1 else ""})'):
            in_processes(n, go, run, deadly)
        assert not (run/'train/weights.safetensors').exists()
    assert in_processes(n, go, run, -1) == ['done']*n
    assert files(run, *made) == files(whole[n], *made)

def test_slurm_script(fetched, tmp_path):
    """configs/train.slurm as it stands, with `srun` and `scontrol` that know one machine: two processes train through
    the command"""
    for name,does in dict(srun='exec "$@"', scontrol='echo 127.0.0.1').items():
        (tmp_path/name).write_text(f'#!/bin/bash\n{does}\n')
        (tmp_path/name).chmod(0o755)
    run = copy_of(fetched, tmp_path/'run')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID='7', SLURM_NNODES='1',
        SLURM_JOB_NODELIST='here', SLURM_GPUS_ON_NODE='2', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    done = subprocess.run(['bash', root/'configs/train.slurm', fetched.parent/'tiny.toml', '--set', f'run={run}',
        '--set', 'train.batch_size=4'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (run/'train/log.jsonl').read_text().splitlines()]
    assert [o['step'] for o in log if 'loss' in o] == list(range(8)) and (run/'train/weights.safetensors').exists()
