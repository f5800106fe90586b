"SLURM on one machine: training that is put back into the queue, and a job array that does the tasks of a queue."
import getpass, glob, os, re, shutil, socket, subprocess
from contextlib import ExitStack
import psutil, pytest
from conftest import files, root, synapseclr
from engine import daemon, free_port, installed, program, versions, wait_for

conf = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={controller_port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:2
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

@pytest.fixture(scope='session')
def slurm(tmp_path_factory):
    "A cluster of this machine alone, with two GPUs that do not exist. A function that submits a job"
    for name in ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'scancel', 'squeue'): program(name)
    folder = tmp_path_factory.mktemp('slurm')
    for name in ('state', 'spool'): (folder/name).mkdir()
    ports = dict(controller_port=free_port(), node_port=free_port())
    libraries = [path.parent for path in (installed/'system').glob('usr/lib/*/libmunge.so.2')]
    plugins = [path/'slurm-wlm' for path in libraries] or glob.glob('/usr/lib*/slurm*') + glob.glob('/usr/lib/*/slurm*')
    (folder/'slurm.conf').write_text(conf.format(host=socket.gethostname(), user=getpass.getuser(), folder=folder,
        plugins=plugins[0], cores=os.cpu_count(), **ports))
    (folder/'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
    (folder/'munge.key').write_bytes(os.urandom(128))
    (folder/'munge.key').chmod(0o400)
    os.environ['SLURM_CONF'] = str(folder/'slurm.conf')
    if libraries: os.environ['LD_LIBRARY_PATH'] = f'{libraries[0]}:{plugins[0]}'
    versions['SLURM'] = command('sbatch', '--version').strip()
    versions['munge'] = command('munged', '--version').strip()
    munge_files = [f'--{name}-file={folder}/munge.{name}' for name in ('key', 'log', 'pid', 'seed')]
    stepd = ['-d', installed/'system/usr/sbin/slurmstepd'] if libraries else []
    with ExitStack() as engines:
        start = lambda name, *args: engines.enter_context(daemon(name, *map(str, args), log=folder/f'{name}.log'))
        start('munged', '--foreground', '--force', *munge_files, f'--socket={folder}/munge.socket')
        wait_for('munged', (folder/'munge.socket').exists)
        start('slurmctld', '-D', '-c')
        start('slurmd', '-D', *stepd)
        wait_for('an idle node', lambda: 'idle' in command('sinfo', '--noheader', '--format=%T'))
        yield submit
        command('scancel', f'--user={getpass.getuser()}')
        wait_for('the end of all jobs', lambda: not command('squeue', '--noheader').strip())

def command(*args):
    "What a command of SLURM printed"
    return subprocess.run(list(map(str, args)), capture_output=True, text=True).stdout

def submit(*args, cwd):
    done = subprocess.run(['sbatch', '--parsable', *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

def job(number):
    "What SLURM says of a job: JobState, Restarts ..."
    return dict(re.findall(r'(\w+)=(\S*)', command('scontrol', 'show', 'job', number)))

def wait_for_end(number, log):
    "Wait until a job has ended well; of an array, all its jobs"
    unfinished = ('PENDING', 'RUNNING', 'COMPLETING', 'REQUEUED', 'CONFIGURING')
    def states(): return re.findall(r'JobState=(\w+)', command('scontrol', 'show', 'job', number))
    wait_for(f'job {number}', lambda: states() and not set(states()) & {*unfinished}, 240)
    assert set(states()) == {'COMPLETED'}, [path.read_text() for path in log.parent.glob(log.name)]

@pytest.fixture(scope='session')
def fetched(volume, tmp_path_factory):
    "Run folder of the tiny volume, fetched"
    run = tmp_path_factory.mktemp('fetched')/'run'
    done = synapseclr('fetch', '--config', volume/'tiny.toml', '--set', f'run={run}', '--no-notebook', cwd=volume)
    assert done.returncode == 0, done.stderr
    return run

epochs = 40

def train(slurm, volume, run):
    "Submit configs/train.slurm unchanged, for two processes of this machine. Returns the job's number and log"
    log = run.parent/'train.log'
    sizes = ['--gpus-per-node=2', '--cpus-per-task=2', '--time=10', '--open-mode=append', f'--output={log}']
    options = ['train.batch_size=4', f'train.epochs={epochs}', f'train.cosine_period_epochs={epochs}', f'run={run}']
    overrides = [f'--set={option}' for option in options]
    os.environ['OMP_NUM_THREADS'] = '1'
    return slurm(*sizes, root/'configs/train.slurm', volume/'tiny.toml', *overrides, cwd=run.parent),log

def n_steps(run):
    "Steps in the log of a training"
    log = run/'train/log.jsonl'
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0

@pytest.fixture(scope='session')
def trained(slurm, volume, fetched, tmp_path_factory):
    "Run folder that was trained without an interruption"
    run = tmp_path_factory.mktemp('trained')/'run'
    shutil.copytree(fetched, run)
    number,log = train(slurm, volume, run)
    wait_for_end(number, log)
    assert n_steps(run) == 2*epochs
    return run

def test_requeued_training(slurm, volume, fetched, trained, tmp_path):
    """In the middle of training the script gets the signal that SLURM sends before the time limit. The job goes back
    into the queue, resumes, and ends with the same bytes as one that was never interrupted"""
    run = tmp_path/'run'
    shutil.copytree(fetched, run)
    number,log = train(slurm, volume, run)
    wait_for('ten steps', lambda: n_steps(run) >= 10, 120)
    assert job(number)['Restarts'] == '0'
    command('scancel', '--batch', '--signal=USR1', number)
    wait_for('the requeue', lambda: job(number)['Restarts'] == '1')
    n_before = n_steps(run)
    assert 10 <= n_before < 2*epochs
    wait_for_end(number, log)
    trained_files = ['train/*.safetensors', 'train/log.jsonl']
    assert files(run, *trained_files) == files(trained, *trained_files)

def test_cancelled_training(slurm, volume, fetched, tmp_path):
    """A job that is cancelled ends, and does not come back. Before that, each of its two processes may use all the
    cores that the job asked for; where SLURM binds tasks to cores, srun gives a task one core unless it asks again"""
    run = tmp_path/'run'
    shutil.copytree(fetched, run)
    number,log = train(slurm, volume, run)
    wait_for('a step', lambda: n_steps(run), 120)
    is_ours = lambda process: f'--set=run={run}' in (process.info['cmdline'] or []) # a zombie has none
    ours = [process for process in psutil.process_iter(['cmdline']) if is_ours(process)]
    cores = {len(process.cpu_affinity()) for process in ours}
    command('scancel', number)
    wait_for('the end', lambda: job(number)['JobState'] == 'CANCELLED')
    wait_for('the end of its processes', lambda: not any(process.is_running() for process in ours))
    assert cores == {2}
    assert job(number)['Restarts'] == '0'

def do_queue(slurm, queue, folder):
    "Do the tasks of a queue in a job array of two workers. Returns how many they did"
    options = ['--array=0-1', f'--output={folder}/worker_%a.log', '--wrap', f'synapseclr worker {queue}']
    number = slurm(*options, cwd=folder)
    wait_for_end(number, folder/'worker_*.log')
    printed = [path.read_text() for path in folder.glob('worker_*.log')]
    assert len(printed) == 2
    return sum(int(re.search(r'(\d+) tasks done, 0 tasks failed, 0 tasks dead', text)[1]) for text in printed)

def test_fetch_in_a_job_array(slurm, volume, fetched, tmp_path):
    queue = f'fq://{tmp_path}/queue'
    stage = ['fetch', '--config', volume/'tiny.toml', '--set', f'run={tmp_path/"run"}', '--no-notebook']
    assert synapseclr(*stage, '--queue', queue, cwd=volume).returncode == 0
    assert do_queue(slurm, queue, tmp_path) == 3
    assert synapseclr(*stage, cwd=volume).returncode == 0
    everything = ['chunks.zarr/**/*', 'fetch/0*.json', 'synapses.parquet']
    assert files(tmp_path/'run', *everything) == files(fetched, *everything)

def test_extract_in_a_job_array(slurm, volume, trained, tmp_path):
    queue = f'fq://{tmp_path}/queue'
    for name in ('array', 'alone'): shutil.copytree(trained, tmp_path/name)
    def stage(name, *options):
        run = ['--set', f'run={tmp_path/name}', '--no-notebook']
        done = synapseclr('extract', '--config', trained/'config.toml', *run, *options, cwd=volume)
        assert done.returncode == 0, done.stderr
    stage('array', '--queue', queue)
    assert do_queue(slurm, queue, tmp_path) == 3
    stage('array')
    stage('alone')
    features = files(tmp_path/'array', 'features*/*.parquet')
    assert len(features) == 6
    assert features == files(tmp_path/'alone', 'features*/*.parquet')
