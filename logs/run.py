"""A run on disk and as a process: what nobody changes who changes the training.

    set_up         device, ranks, and the flags that depend on them
    Ranks          the processes that train together: sums over them, stop signals for all of them
    Run            one run's folder: its log, clocks and checkpoints
    load_weights   for --eval
    plain_errors   ends a script with a sentence where a user can help, not with a traceback

A run writes logs/<data set>/resnet_<depth>x<width>.../<seed>/<stamp>.log, and beside it <stamp>.last.pt (what
--resume goes on from), <stamp>.prev.pt (the one before, should the last be damaged) and <stamp>.best.pt (the
weights of the best validation accuracy). Rank 0 alone writes. logs/table.py reads the logs.
"""
import contextlib
import datetime
import faulthandler
import functools
import hashlib
import io
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from data import SETS, UserError, keep_freed_memory, print_all_names, say

ROOT = Path(__file__).resolve().parent.parent
clock = time.perf_counter


# ---- device and ranks ----

def set_up(args, precision):
    """Checks the flags, finds device and ranks, and fills in --device, --precision and --compile.

    Args:
        args: what a script's parse_args() returns. precision: the default on CUDA.
    Returns:
        Ranks. Raises UserError for flags that do not fit the machine or each other.
    """
    for name in ('data_dir', 'log_dir', 'eval'):
        if path := getattr(args, name):
            setattr(args, name, Path(os.path.expanduser(path)))  # --data-dir=~/data: no shell did it
    if min(args.width, args.batch, args.accum, args.iters) < 1 or args.seed not in range(2 ** 32) or \
            not all(0 <= value < math.inf for value in (args.lr, args.wd, args.workers or 0)):
        raise UserError('--width, --batch, --accum and --iters start at 1; --lr, --wd and --workers at 0; '
                        '--seed goes from 0 to 2^32 - 1.')
    rank, local_rank, world = ranks_of_environment()
    if args.batch % (world * args.accum):
        raise UserError(f'--batch {args.batch} is not divisible by {world} ranks x {args.accum} passes.')
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    native_bf16 = any(getattr(torch.cpu, name, bool)() for name in (  # private, so they may go
        '_is_avx512_bf16_supported', '_is_amx_tile_supported'))
    args.device = args.device or ('cuda' if cuda else 'mps' if mps and world == 1 else 'cpu')
    args.precision = args.precision or (
        precision if args.device == 'cuda' else 'bf16' if args.device == 'cpu' and native_bf16 else 'fp32')
    if args.device == 'cuda':
        usable = torch.cuda.device_count() if cuda else 0  # it counts those of a driver that is too old
        if local_rank >= usable:
            found = f'torch {torch.__version__} finds {usable} usable GPUs'
            raise UserError(f'--device cuda: {found} for local rank {local_rank}. Try --device cpu.')
        torch.cuda.set_device(local_rank)
        try:
            torch.zeros(1, device='cuda')
        except RuntimeError as error:  # it is full, or too old for this torch
            raise UserError(f'--device cuda: {str(error).splitlines()[0]}. Try --device cpu, another GPU, or '
                            'a torch built for this one.') from error
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        torch.set_float32_matmul_precision('high')  # TF32 for the classifier, as convolutions have it
        args.compile = can_compile() if args.compile is None else args.compile
        device, name = torch.device('cuda', local_rank), torch.cuda.get_device_name()
    else:
        if args.device == 'mps' and (not mps or world > 1):
            reason = 'takes one rank only' if mps else f'torch {torch.__version__} finds none'
            raise UserError(f'--device mps: {reason}. Use --device cpu.')
        if args.device == 'mps' and args.precision == 'fp16':  # older torch cannot scale a loss there
            raise UserError('--device mps takes --precision bf16 or fp32 only.')
        args.compile = bool(args.compile)
        keep_freed_memory()  # or activations would get new pages in every step
        device, name = torch.device(args.device), cpu_name() + ', MPS' * (args.device == 'mps')
    ranks = Ranks(rank, local_rank, world, device, name)
    ranks.require_same(f'--device {args.device} --precision {args.precision}', 'say both in the command')
    return ranks


def cpu_name():
    """'AMD EPYC, 2 threads': the processor, and how many threads compute."""
    cpuinfo = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = re.search(r'model name\s*: (.*)|$', cpuinfo)[1] or platform.machine()
    return f'{name}, {torch.get_num_threads()} threads'


def ranks_of_environment():
    """(rank, local rank, number of ranks) as torchrun says them, or else (0, 0, 1)."""
    said = [os.environ.get(name) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]
    if not any(said):
        for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'):  # of srun, mpirun
            if (count := os.environ.get(name, '')) not in ('', '0', '1'):
                raise UserError(f'{name}={count}: so many copies of this script were started, and each would '
                                'train alone. Start one torchrun on each machine (README.md has an example).')
        return 0, 0, 1
    with contextlib.suppress(TypeError, ValueError):
        rank, local_rank, world = map(int, said)
        if 0 <= local_rank <= rank < world and (world == 1 or os.environ.get('MASTER_ADDR')):
            return rank, local_rank, world
    raise UserError('The environment has some of RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR, but no values '
                    'that fit together. Start several ranks with torchrun; for one, unset the first three.')


def can_compile():
    """torch.compile needs a Python that it knows and Triton; Triton a C compiler, Python.h, no old GPU."""
    try:
        from torch._dynamo import is_dynamo_supported
        from torch.utils._triton import has_triton, triton_backend
        return is_dynamo_supported() and has_triton() and triton_backend() is not None
    except Exception:  # of many kinds, down to those of the C compiler
        return False


def cuda_graphs(args, world, size):
    """Whether torch.compile is to make CUDA graphs: where updates may take less time than their launches.

    args: of set_up. world: ranks; several cannot have them. size: of images, in pixels.
    TORCHINDUCTOR_CUDAGRAPHS=0 in the environment turns them off.
    """
    return args.device == 'cuda' and world == args.accum == 1 and size < 224 and \
        os.environ.get('TORCHINDUCTOR_CUDAGRAPHS') != '0'


class Ranks:
    """The processes that train together: this one alone, or those that torchrun has started.

    rank: its number, from 0. local_rank: the same on this machine. world: how many there are.
    device: torch.device of this one. device_name: str.
    """

    def __init__(self, rank=0, local_rank=0, world=1, device=None, device_name=''):
        self.rank, self.local_rank, self.world = rank, local_rank, world
        self.device, self.device_name = device, device_name
        self.control = None  # a process group for flags and for waiting, which keeps off the device
        self.received, self.exchange = [], None  # signal and time when it came; the sum that is under way
        if world > 1:
            nccl = device.type == 'cuda' and dist.is_nccl_available()  # not on Windows
            dist.init_process_group('nccl' if nccl else 'gloo')
            self.control = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=2))
            warnings.filterwarnings('ignore', '.*broadcast_buffers')  # torch 2.6 lacks its new name

    def sum(self, tensor):
        """The sum of a tensor over all ranks, as a new tensor."""
        total = tensor.clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def wait(self):
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier(self.control)

    def from_rank_0(self, value):
        """Rank 0's `value`, on all ranks."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def require_same(self, what, advice):
        """Raises UserError with this advice on a rank whose `what`, a text, is not that of rank 0."""
        if (first := self.from_rank_0(what)) != what:
            raise UserError(f'rank {self.rank} has {what}; rank 0 has {first}: {advice}.')

    def rank_0_first(self, function, *arguments):
        """Calls it on rank 0, then on the first of each other machine, which may have a disk of its own."""
        for my_turn in (self.rank == 0, self.rank > 0 and self.local_rank == 0):
            if my_turn:
                function(*arguments)
            self.wait()

    def catch_signals(self):
        """From now on SIGTERM, SIGINT and SIGUSR1 wait for check_signals.

        Another one, a second later or more, ends the process at once.
        """
        received = self.received  # and not self: the handler lives on, and would keep the process group

        def remember(number, frame):
            if not received:
                received[:] = number, time.monotonic()
            elif time.monotonic() - received[1] > 1:  # at once torchrun repeats what a terminal sent to all
                os._exit(128 + number)
        for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
            if hasattr(signal, name):  # Windows lacks the last
                signal.signal(getattr(signal, name), remember)

    def check_signals(self):
        """Once a signal has come to a rank, raises Stopped in the same call on all.

        Several ranks learn of it one call late, so that none waits for the others.
        """
        number = torch.tensor(self.received[0] if self.received else 0)
        if self.control:
            work = dist.all_reduce(number, dist.ReduceOp.MAX, self.control, async_op=True)
            previous, self.exchange = self.exchange, (number, work)
            if previous is None:
                return
            number, work = previous
            work.wait()
        if number:
            raise Stopped(signal.Signals(number.item()))


class Stopped(Exception):
    """A stop signal came to one of the ranks, and all of them know. The argument is a signal.Signals."""


# ---- a run ----

def run_folder_name(config):
    """'resnet_<depth>x<width>...': what differs from batch 256, lr 0.1 and fp32 is named.

    config: a mapping with depth, width, batch, iters, lr, wd (numbers) and precision (fp32, fp16 or bf16).
    """
    name = f'resnet_{config["depth"]}x{config["width"]}'
    name += f'-batch_{config["batch"]}' if config['batch'] != 256 else ''
    iters, lr, wd = config['iters'], config['lr'], config['wd']
    name += f'-iter_{iters // 1000}k' if iters % 1000 == 0 else f'-iter_{iters}'
    name += f'-lr_{lr:g}' if lr != 0.1 else ''
    name += f'-wd_{wd:.4f}' if round(wd, 4) == wd else f'-wd_{wd:g}'
    return name + (f'-{config["precision"]}' if config['precision'] != 'fp32' else '')


def duration(seconds):
    return str(datetime.timedelta(seconds=int(seconds)))


def header_line(key, value):
    return f'{key:22}: {value}\n'


def evaluation_lines(results, evals):
    """A line for each set; results: {name: (accuracy, nll)}, evals: {name: batches}."""
    return ''.join(f'{name:9} acc {accuracy:.4f}  nll {nll:.4f}  {len(evals[name])} images\n'
                   for name, (accuracy, nll) in results.items())


class Run:
    """A new run or, with --resume, the newest unfinished one of the same settings: log, clocks, checkpoints.

    Args:
        script: path of the script; a copy's runs have a folder of its name, not of its data set's.
        args: its flags. ranks: Ranks.
        config: dict, what the run is: a checkpoint with another config is not resumed.
    """

    def __init__(self, script, args, config, ranks):
        self.script, self.args, self.config, self.ranks = Path(script).resolve(), args, config, ranks
        self.clocks = dict(seconds=0.0, not_training=0.0, waited=0.0)
        self.rows = [(0, *self.clocks.values())]  # (update, *clocks) of each row
        self.log_path, self.shown = None, 0.0
        self.live = ranks.rank == 0 and sys.stdout is not None and sys.stdout.isatty()
        dataset = config['dataset']
        own, kind = re.fullmatch('(.*?)(-synthetic|-incomplete|)', dataset).groups()
        top = dataset
        if self.script != ROOT / f'{own.lower()}.py':  # a copy, be it in another folder
            name = self.script.stem
            top = name + '-copy' * (name.lower() in map(str.lower, SETS)) + kind
        self.folder = args.log_dir / top / run_folder_name(config) / str(args.seed)

    def begin(self, columns, trn, about):
        """Finds the log, reads its last good checkpoint, if any, and starts the clocks and the log: with its
        header, or with a line that the run goes on.

        Args:
            columns: titles of the rows. trn: training batches. about: how many images from where.
        Returns:
            What save() was given for it, on the CPU; None without a checkpoint.
        Raises:
            UserError: the folder cannot be written, another process has the log, or no checkpoint is good,
            though there is one.
        """
        args, ranks, found, size = self.args, self.ranks, None, 0
        if ranks.rank == 0:
            self.log_path = open_log(self.folder, args.resume, self.config)
            say(f'{self.log_path}\n')
            found = read_last_checkpoint(self.path('last'), self.path('prev'), self.config)
        state, note = ranks.from_rank_0(found)
        if state:
            self.clocks, self.rows, size = state['run']
        self.started = clock() - self.clocks['seconds']
        if not self.log_path:
            return state
        # rows after the checkpoint will be written again: all of them without one
        os.truncate(self.log_path, min(size, self.log_path.stat().st_size))
        per_pass = args.batch // ranks.world // args.accum
        passes = f'{ranks.world} ranks x {args.accum} passes x {per_pass} images make a batch'
        devices = f'{ranks.world} x {ranks.device_name}'
        # data.py, resnet.py, and what else a copy has imported
        modules = [file for file in sorted(ROOT.glob('*.py')) if file.stem in sys.modules]
        sources = [*dict.fromkeys([self.script, *modules, ROOT / 'logs' / 'run.py'])]
        digests = {f'sha256 {file.name}': hashlib.sha256(file.read_bytes()).hexdigest() for file in sources}
        if state:
            text = self.log_path.read_text('utf-8', 'replace')
            others = [key.split()[1] for key, value in digests.items() if header_line(key, value) not in text]
            changed = f'; changed since the start: {" ".join(others)}' if others else ''
            self.log(f'resumed at update {state["progress"][0]} on {devices}; torch {torch.__version__}, '
                     f'commit {commit(sources)}{changed}; {passes}; {about}{note}\n')
            say(columns)
            return state
        tf32 = torch.version.cuda and args.device == 'cuda' and torch.cuda.get_device_capability() >= (8, 0)
        graphs = cuda_graphs(args, ranks.world, self.config['image_size'])
        lines = {
            'command': f'{self.script.name} {shlex.join(sys.argv[1:])}',
            'started': time.strftime('%Y-%m-%d %H:%M:%S'),
            'versions': f'torch {torch.__version__}, python {platform.python_version()}, {platform.system()}',
            'devices': devices,
            'commit': commit(sources),
            **digests,
            **self.config,
            **({'fp32 products': 'TF32'} if tf32 else {}),
            'compile': f'{args.compile}{", CUDA graphs" if args.compile and graphs else ""}',
            'images': about,
            'passes': passes,
            'epochs': f'{args.iters / trn.per_epoch:.1f}, of {trn.per_epoch} updates each',
        }
        self.log(''.join(header_line(*item) for item in lines.items()) + f'\n{columns}')

    def path(self, kind):
        return self.log_path.with_suffix(f'.{kind}.pt')

    def log(self, text):
        """Appends to the log, and prints."""
        if self.log_path:
            with open(self.log_path, 'a', encoding='utf-8', errors='backslashreplace') as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # as the next checkpoint is: it will say how long the log is
            say(('\r\033[K' if self.live else '') + text)

    def status(self, text):
        """Shows a line on a terminal until something else is printed."""
        if self.live:
            self.shown = clock()
            say(f'\r{text}\033[K')

    def progress(self, it):
        """Shows twice a second how far it is, and how long it will take."""
        if self.live and clock() - self.shown > 0.5:
            done, seconds, *_ = self.rows[-1]
            rate, iters = (it - done) / (clock() - self.started - seconds), self.args.iters
            self.status(f'{it} of {iters}   {60 * rate:.0f} iter/min   {duration((iters - it) / rate)} left')

    @contextlib.contextmanager
    def timed(self, name, text=''):
        """A block whose time is added to clocks[name]; shows `text` meanwhile."""
        start = clock()
        if text:
            self.status(text)
        try:
            yield
        finally:
            self.clocks[name] += clock() - start

    waiting = functools.partialmethod(timed, 'waited')
    not_training = functools.partialmethod(timed, 'not_training')

    def new_row(self, it):
        """Ends an interval between rows.

        Returns: (updates per minute over the last 5000, evaluation included; images per second of training
        and percent of its time that waited for data, both since the last row; time since the start, h:mm:ss).
        """
        self.clocks['seconds'] = clock() - self.started
        self.rows.append((it, *self.clocks.values()))
        iter_per_s, _, _ = speed(self.rows)
        _, trn_per_s, waited = speed(self.rows[-2:])
        return 60 * iter_per_s, self.args.batch * trn_per_s, 100 * waited, duration(self.clocks['seconds'])

    def check_finite(self, loss, skipped, val_nll, scale, start, end):
        """Ends the run with a FloatingPointError if it has diverged in the updates from `start` to `end`.

        loss: summed over them. skipped: how many fp16 skipped. val_nll: after them. scale: the loss scale.
        """
        # an update that fp16 skips may have had an infinite loss
        diverged = (not math.isfinite(loss) and not skipped) or not math.isfinite(val_nll)
        if diverged or scale < 1:  # below 1 the gradients overflow fp16 by themselves
            text = (f'the loss or its gradients were not finite in updates {start} to {end} (loss scale '
                    f'{scale:g}): try a smaller --lr or, instead of fp16, --precision bf16.')
            self.log(f'{text}\n')
            raise FloatingPointError(text)

    def save(self, **state):
        """Writes <stamp>.last.pt; the one before becomes <stamp>.prev.pt. progress[0]: updates done."""
        self.clocks['seconds'] = clock() - self.started
        if self.log_path:
            run = self.clocks, self.rows, self.log_path.stat().st_size
            write_checkpoint(self.path('last'), self.path('prev'), config=self.config, run=run, **state)

    def save_best(self, it, val_acc, net):
        """Writes <stamp>.best.pt with the weights `net`, a state_dict; nothing if it is empty: no row yet."""
        if self.log_path and net:
            write_checkpoint(self.path('best'), config=self.config, net=net, it=it, val_acc=val_acc)

    def finish(self, best_it, results, evals):
        """The last lines of the log: results are {name: (accuracy, nll)} of the weights of update best_it."""
        keys = 'dataset depth width seed params batch iters lr wd precision'.split()
        fields = {key: self.config[key] for key in keys} | dict(best_iter=best_it)
        fields |= {key: f'{fields[key]:g}' for key in ('lr', 'wd')}
        for name, (accuracy, nll) in results.items():
            key = name.lower().replace('-', '')  # val, tst, inv2
            fields |= {f'{key}_acc': f'{accuracy:.4f}', f'{key}_nll': f'{nll:.4f}'}
        iter_per_s, trn_iter_per_s, _ = speed(self.rows)
        fields |= dict(
            iter_per_min=f'{60 * iter_per_s:.0f}', img_per_s=f'{trn_iter_per_s * self.args.batch:.0f}',
            hours=f'{self.clocks["seconds"] / 3600:.3f}', world=self.ranks.world,
            device=f'"{self.ranks.device_name}"', torch=torch.__version__)
        result = ' '.join(f'{key}={value}' for key, value in fields.items())
        self.log(f'{evaluation_lines(results, evals)}RESULT {result}\n')


def speed(rows):
    """Over the last 5000 updates, or the last interval: (updates per second with evaluation and saving, the
    same without, which part of the time without was waited)."""
    end = rows[-1]
    start = next((row for row in rows[:-1] if end[0] - row[0] <= 5000), rows[-2])
    updates, seconds, not_training, waited = (b - a for a, b in zip(start, end, strict=True))
    training = seconds - not_training
    return updates / seconds, updates / training, waited / training


def commit(sources):
    """The git commit, and whether one of these files is not as it is there; 'unknown' outside of git."""
    def git(*words):
        return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not shutil.which('git') or not (name := git('rev-parse', '--short', 'HEAD')):
        return 'unknown'
    tracked = len(git('ls-files', '--', *sources).splitlines()) == len(sources)
    return name if tracked and not git('status', '--porcelain', '--', *sources) else f'{name}, with changes'


def open_log(folder, resume, config):
    """Path of a new log or, with `resume`, of the newest one that can go on, if any; ours until we end.

    It has to be of this config. One with a checkpoint comes before those without, which have no rows.
    Raises UserError if the folder cannot be written, or if another process has the log.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = []
        for path in sorted(folder.glob('[0-9]*-[0-9]*.log')) if resume else ():
            text = path.read_text(encoding='utf-8', errors='replace')
            # images that are not those of its checkpoint are an error, other settings another run's
            same = not text or all(header_line(*item) in text for item in config.items()
                                   if item[0] not in ('trn_images', 'labels_crc32'))
            if re.search('^RESULT .*\n', text, re.M) or not same:  # a full disk may have cut it short
                continue
            saved = any(path.with_suffix(f'.{kind}.pt').exists() for kind in ('last', 'prev'))
            if re.search(r'^ *\d+ ', text, re.M) and not saved:
                say(f'{path} has no checkpoint beside it: it stays as it is.\n')
                continue
            unfinished.append((saved, path))
        if resume and not unfinished:
            say(f'{folder} has no unfinished run of these settings: a new one begins.\n')
        file = open(max(unfinished)[1], 'a') if unfinished else None
        while file is None:
            try:
                file = open(folder / time.strftime('%Y%m%d-%H%M%S.log'), 'x')
            except FileExistsError:  # two runs began in the same second
                time.sleep(0.1)
    except OSError as error:
        raise UserError(f'{error.filename}: {error.strerror}. Choose another --log-dir.') from error
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # keeps the file open here, but not in loader processes: one that outlives us would keep the lock
        os.register_at_fork(after_in_child=file.close)
    except BlockingIOError as error:
        raise UserError(f'{file.name} is being written by another process. End it, or leave out --resume to '
                        'begin a new run.') from error
    except (ImportError, OSError):
        pass  # on Windows, or on a file system without locks
    return Path(file.name)


# ---- checkpoints ----

def write_checkpoint(path, previous=None, **content):
    """Writes under a temporary name, then renames: whenever we die, there is a whole file, old or new.

    With `previous`, the old file takes that name first.
    """
    buffer, temporary = io.BytesIO(), path.with_suffix('.tmp')
    torch.save(content, buffer)  # to a full disk it would fail without saying that it is full
    try:
        with open(temporary, 'wb') as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())
        if previous and path.exists():
            path.replace(previous)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, config, *parts):
    """What torch.save has written to a file, on the CPU: a dict with these parts, made with this config.

    Weights from elsewhere have no config, and may be read all the same. No code in the file is run. Raises
    UserError if it is damaged, another kind of file, or made with another config.
    """
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UserError(f'{path} cannot be read as a checkpoint ({error.strerror}).') from error
    try:
        if zipfile.is_zipfile(content) and zipfile.ZipFile(content).testzip():  # torch.load checks no CRC
            raise ValueError('a CRC differs')
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a pickle's protocol: what can be said follows in a sentence
            state = torch.load(content, map_location='cpu', weights_only=True)
        if not isinstance(state.get('config'), dict) or 'depth' not in state['config']:
            state.pop('config', None)  # of weights from elsewhere
        state |= {part: state[part] for part in parts}  # a KeyError if one is missing
    except MemoryError:
        raise  # the file may be good
    except Exception as error:  # which errors torch.load raises for other kinds of files is not documented
        reason = 'damaged, or another kind of file'
        if path.suffix == '.safetensors':
            reason = 'a safetensors file: save what safetensors.torch.load_file gives with torch.save'
        elif 'unsupported global' in str(error).lower():  # torch spells it in two ways
            reason = 'it holds objects, whose code is not run: save the state_dict() of a model instead'
        raise UserError(f'{path} cannot be read as a checkpoint ({reason}).') from error
    if differ := differences(state.get('config', {}), config):
        key, theirs, ours = differ[0]
        raise UserError(f'{path} was made with {key} {theirs}, here it is {ours}.')
    return state


def differences(theirs, ours):
    """[(key, their value, our value)] of two configs, where both have the key: older ones lack some."""
    return [(key, theirs[key], value) for key, value in ours.items() if theirs.get(key, value) != value]


def read_last_checkpoint(last, previous, config):
    """(checkpoint, '') from the path `last`, or (checkpoint, a note) from `previous`, which is renamed to it.

    Without these files (None, ''). Raises UserError if neither file is good, though there is one, or if the
    disk does not answer.
    """
    problem = None
    for path in filter(Path.exists, (last, previous)):
        try:
            state = read_checkpoint(path, config, 'net', 'run')
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise  # a disk that does not answer: the file may be good
            problem = problem or error
            continue
        if path == last:
            return state, ''
        previous.replace(last)  # or the damaged one would soon take the place of the good one
        return state, f'; from the previous checkpoint: {last.name} was damaged or missing'
    if problem:
        raise UserError(f'{problem} To begin anew, leave out --resume.')
    return None, ''


def weights_in(content):
    """The state_dict in what a file holds, or {}: the first dict, at any depth, with a conv1.weight.

    Without the prefix that DistributedDataParallel, torch.compile and others put before all names.
    """
    names = [name for name in content if f'.{name}'.endswith('.conv1.weight')]
    if names:
        prefix = min(names, key=len).removesuffix('conv1.weight')
        return {name.removeprefix(prefix): content[name] for name in content if str(name).startswith(prefix)}
    found = (weights_in(value) for value in content.values() if isinstance(value, dict))
    return next(filter(None, found), {})


def load_weights(net, path, shape, fingerprint):
    """Loads a best.pt or last.pt, or a state_dict from elsewhere, bare or in a dict, into a net.

    shape: the part of a config that says which net it is. fingerprint: the part that says which images are
    here. Returns a line on where the weights come from, and whether they were trained on other images, unless
    no training images are here. Raises UserError if they do not fit.
    """
    content = read_checkpoint(path, shape)
    # ours may be of a copy of a script, which may have another net
    if not (weights := content.get('net') if 'config' in content else weights_in(content)):
        raise UserError(f'{path} has no weights of such a net: nothing in it is called conv1.weight.')
    try:
        net.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # the message lists keys and shapes
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path} does not fit --depth and --width ({reason} ...)') from error
    origin = f'weights of {path}'
    if 'it' in content:  # or else a last.pt, or from elsewhere
        origin = (f'weights of {content["config"]["dataset"]}, update {content["it"]}: val acc '
                  f'{content["val_acc"]:.4f} in training')
    differ = differences(content.get('config', {}), fingerprint)
    if differ and fingerprint['trn_images']:
        facts = '; '.join(f'{key} {theirs}, here {ours}' for key, theirs, ours in differ)
        origin += f'; trained on other images, or in another order of images or classes ({facts})'
    return origin


# ---- errors ----

def in_plain_words(error):
    """One line for an error that users can do something about; '' for a fault of the program."""
    if isinstance(error, (UserError, FloatingPointError, OSError)):
        return ' '.join(str(error).split())
    text = str(error).partition('\n')[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f'out of memory: a higher --accum or a smaller --batch takes less. ({text or "MemoryError"})'
    if 'RANK' in os.environ and re.search('Connection (closed|reset) by peer', text):
        return 'another rank ended, so this one ends too; what was saved is good.'
    if re.search(r'InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler', str(error)):
        return '--compile needs a C++ compiler (g++ or clang): install one, or leave it out.'
    return ''


@contextlib.contextmanager
def plain_errors():
    """Ends a script with one line for an error that users can do something about, without a traceback.

    The exit code is 2 for a UserError, 1 for other errors, 128 + its number for a signal.
    """
    print_all_names()
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or no file
        faulthandler.enable()  # says where, should a mapped data file be cut short under us (SIGBUS)
    code = 0
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    except Exception as error:
        code = 2 if isinstance(error, UserError) else 1
        if os.environ.get('RANK', '') not in ('', '0'):  # which may be no number: that is the error, then
            time.sleep(1)  # torchrun ends all ranks with the first: rank 0 is to speak
        if message := in_plain_words(error):
            print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
        elif dist.is_initialized():
            traceback.print_exc()
        else:
            raise
        if dist.is_initialized():  # or NCCL (torch 2.6) would wait at Python's end for ranks that are gone
            os._exit(code)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)
