"""The tests: `python -m pytest test_smoke.py`, on Linux, four minutes on two cores, no network, no GPU.

    python test_smoke.py --sync        copies imports and tail of cifar10_x32.py into the other scripts
    python test_smoke.py --kill 20     kills runs at 20 random moments each and resumes them, minutes
    python test_smoke.py --fuzz 500    reads 500 damaged files of each kind, some seconds
"""
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import importlib
import io
import itertools
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch._subclasses import FakeTensorMode

import data
import resnet
from logs import run as runs
from logs import table as tables

try:
    import resource
except ImportError:  # Windows lacks it
    resource = None
pytestmark = [
    pytest.mark.skipif(
        sys.platform != 'linux', reason='the tests look into /proc and limit processes as Linux does'),
    # Python 3.12 and newer say so of every loader process; outside of tests they keep it to themselves
    pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')]

HERE = Path(__file__).resolve().parent
SCRIPTS = [name.lower() for name in data.SETS]
SHORT = ['cifar10_x32.py', '--batch', 32, '--lr', 0.05, '--iters', 24, '--precision', 'fp32', '--device',
         'cpu']
os.environ[data.INCOMPLETE] = '1'  # a part of a data set will do; `refused` takes it away where it is tested
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
# each restart gets a store of its own: else it may meet addresses of the processes before it
os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
os.environ['PYTHON_COLORS'] = '0'  # of tracebacks, where FORCE_COLOR is set
# a proxy that nobody serves: no test reaches the network
os.environ |= dict.fromkeys(('http_proxy', 'https_proxy'), 'http://127.0.0.1:9')
for name in [name for name in os.environ if name.startswith('GIT_')]:
    del os.environ[name]  # a hook's: the repository of a test is another one
LAUNCH = ['-m', 'torch.distributed.run', '--standalone']


# ---- helpers: runs ----

def run(*command, ok=0, timeout=600):
    """Runs `python command...` in the repository and returns its output, both streams together."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == ok, f'exit code {done.returncode}, not {ok}:\n{done.stdout}'
    return done.stdout


def main(*command, **env):
    """Runs the main() of a script as `run` does, but in this process: quicker by the imports."""
    script, *argv = map(str, command)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as locks:
        patch.setattr(sys, 'argv', [script, *argv])
        for name, value in env.items():
            patch.setenv(name, str(value))
        # a process would give back the lock of its log when it ends
        patch.setattr(os, 'register_at_fork', lambda **hooks: locks.callback(hooks['after_in_child']))
        try:  # as it is, with what is patched in it, if it is imported already
            module = sys.modules.get(script.removesuffix('.py').replace('/', '.'))
            module.main() if module else runpy.run_path(str(HERE / script), run_name='module')['main']()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def says(text, *words):
    """One or two sentences that hold these words, and no traceback."""
    assert 'Traceback' not in text and len(text.strip().splitlines()) <= 2, text
    for word in words:
        assert str(word) in text, f'{word!r} is not in: {text}'


def refused(words, function, *args, whole=False, **options):
    """A UserError, or what a program prints that exits with 2: a sentence or two in which `words`, a regular
    expression, is found.

    whole: nothing says that a part of a data set will do.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setenv(data.INCOMPLETE, '' if whole else '1')
        try:
            function(*args, **options)
        except data.UserError as error:  # pytest.raises would keep it, and what is open in its frames
            text = str(error)
        except SystemExit as ended:
            text = printed.getvalue()
            assert ended.code == 2, ended
        else:
            raise AssertionError(f'not refused: {words}')
    says(text)
    assert re.search(words, text), f'{words!r} is not in: {text}'


def rows(text):
    return [line.split() for line in text.splitlines() if line[:7].strip().isdigit()]


def result(text):
    lines = re.findall(r'^RESULT (.*)$', text, re.M)
    assert len(lines) == 1, text
    return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', lines[0]))


class Trial:
    """A run with a log folder of its own: start it, do something to it, look at what it left."""

    def __init__(self, logs, *command):
        self.logs, self.command = Path(logs), [*command, '--log-dir', logs]

    def but(self, *flags, script=None, logs=None):
        """A trial that differs in script, flags or log folder."""
        return Trial(logs or self.logs, script or self.command[0], *self.command[1:], *flags)

    def main(self, *flags, at=()):
        """Runs it in this process. at: {update: function, called while this update waits for its batch}."""
        batches = data.TrainBatches.batches

        def watched(self, start):
            for it, batch in enumerate(batches(self, start), start):
                if it in at:
                    at[it]()
                yield batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.TrainBatches, 'batches', watched)
            main(*self.command, *flags)

    def stop(self, it, *flags, wait=0):
        """Runs it in this process and sends a SIGTERM in update `it`, which is the last that is done."""
        with pytest.raises(runs.Stopped):
            self.main(*flags, at={it: lambda: (time.sleep(wait), os.kill(os.getpid(), signal.SIGTERM))})

    def start(self, *flags, launch=()):
        """Starts it as a process; what it prints comes line by line from .stdout."""
        return subprocess.Popen([sys.executable, *map(str, [*launch, *self.command, *flags])], cwd=HERE,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def watch(self, at, *flags, launch=(), limit=None):
        """Runs it as a process, under a `limit` for resource.prlimit. Returns its exit code and output.

        at: {start of a line, as the number of a row: function, called with the process at that line}.
        """
        process, text = self.start(*flags, launch=launch), ''
        if limit:
            resource.prlimit(process.pid, *limit)
        timer = threading.Timer(200, process.kill)  # if it hangs
        timer.start()
        try:
            for line in process.stdout:
                text += line
                if action := at.pop(line[:7].strip(), None):
                    action(process)
            code = process.wait()
        finally:
            process.kill(), timer.cancel()
        assert not at, f'{[*at]} never came:\n{text}'
        return code, text

    @property
    def log(self):
        log, = self.logs.rglob('*.log')  # the only one
        return log

    text = property(lambda self: self.log.read_text())
    rows = property(lambda self: rows(self.text))
    resumed = property(lambda self: [int(it) for it in re.findall('\nresumed at update (\\d+)', self.text)])

    def path(self, kind):
        return self.log.with_suffix(f'.{kind}.pt')

    def checkpoint(self, kind='last'):
        return torch.load(self.path(kind), weights_only=True)

    @property
    def weights(self):
        """The state of network and optimizer, and the best weights."""
        state, best = self.checkpoint(), self.checkpoint('best')['net']
        return state['net'] | {f'best {name}': value for name, value in best.items()} | {
            (i, key): value for i, values in state['optimizer']['state'].items()
            for key, value in values.items()}

    def same_as(self, other):
        """The same weights, bit for bit, and the same rows and result, each once; the times differ."""
        a, b = self.weights, other.weights
        assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
        assert [row[:6] for row in self.rows] == [row[:6] for row in other.rows]
        times = dict.fromkeys(('iter_per_min', 'img_per_s', 'hours'))
        assert {**result(self.text), **times} == {**result(other.text), **times}


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    """--data-dir with a CIFAR10_x32 of 250 + 50 images: what a subprocess trains on in seconds."""
    folder = tmp_path_factory.mktemp('data') / 'CIFAR10_x32'
    (images, labels), (test_images, test_labels) = data.synthetic_arrays('CIFAR10_x32', 1)
    save_arrays(folder, 'train', images[:250], labels[:250])
    save_arrays(folder, 'test', test_images[:50], test_labels[:50])
    return folder.parent


@pytest.fixture
def trial(small, tmp_path):
    """A run of 24 updates with a row after every second."""
    return Trial(tmp_path / 'logs', *SHORT, '--data-dir', small)


@pytest.fixture(scope='session')
def whole(small, tmp_path_factory):
    """The same, uninterrupted."""
    trial = Trial(tmp_path_factory.mktemp('logs'), *SHORT, '--data-dir', small)
    trial.main()
    return trial


@pytest.fixture
def killed(trial, whole):
    """A copy of the whole run, as if it had been killed while it wrote the last row."""
    shutil.copytree(whole.logs, trial.logs)
    trial.log.write_text(trial.text.split('\ntst ')[0] + '\n     24  1.0')
    return trial


@pytest.fixture
def mine():
    """A function that makes a copy of a script with something replaced, and gives its name."""
    path = HERE / f'mine_for_test_{os.getpid()}.py'

    def copy(*replacements, script='cifar10_x32'):
        text = (HERE / f'{script}.py').read_text()
        for old, new in replacements:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text)
        return path.name
    yield copy
    path.unlink(missing_ok=True)


# ---- helpers: data ----

def arrays(n, size=32, classes=10):
    rng = np.random.default_rng(1)
    return (torch.from_numpy(rng.integers(256, size=(n, size, size, 3), dtype=np.uint8)),
            torch.from_numpy(rng.integers(classes, size=n)))


def save_arrays(folder, which, images, labels):
    folder.mkdir(exist_ok=True)
    np.save(folder / f'{which}_images.npy', images)
    np.save(folder / f'{which}_labels.npy', labels)


def load(folder, rank=0, world=1, name='imagenet2012', seed=7, batch=8, eval_batch=4, device='cpu', workers=0,
         **options):
    """(training batches, {name: evaluation batches}, their origin, their fingerprint)"""
    return data.load(name, folder, batch, eval_batch, seed, device, rank, world, workers=workers, **options)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def encoded(image, kind='JPEG', **options):
    """The bytes of a file with this image, an array or an Image."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def picture(rng, height, width):
    """A smooth random image: what JPEG and resizing are made for."""
    coarse = rng.integers(256, size=(6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def write_tree(root, files):
    """Files below a folder; files: {path: content, or a Path that a link leads to}."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            (root / name).symlink_to(content)
        else:
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def below(folder, files):
    return {f'{folder}/{name}': content for name, content in files.items()}


def clutter(root):
    """What systems leave behind in every folder."""
    for folder in [root, *(path for path in root.rglob('*') if path.is_dir())]:
        write_tree(folder, dict.fromkeys(
            ('.DS_Store', 'Thumbs.db', '._a.JPEG', '@eaDir/a.JPEG', '__MACOSX/._b.JPEG'), 'clutter'))


def zipped(files):
    with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def class_folders(root, names, count, suffix='.JPEG'):
    rng, sizes = np.random.default_rng(len(names)), ((120, 160), (200, 150), (300, 400))
    write_tree(root, {f'{name}/{name}_{j}{suffix}': encoded(picture(rng, *sizes[(i + j) % 3]), quality=90)
                      for i, name in enumerate(names) for j in range(count)})


ALL_WNIDS = [f'n{i:08}' for i in range(1000)]
WNIDS = ALL_WNIDS[:11]


def meta_mat(wnids):
    """As MATLAB writes it: a header of 128 bytes, a tag of 8, compressed data with 16-bit letters."""
    letters = b'\1\2\0\3'.join(wnid.encode('utf-16-le') for wnid in wnids)
    return b'x' * 128 + b'\x0f\0\0\0\0\0\0\0' + zlib.compress(letters)


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory):
    """--data-dir with a small imagenet2012 and test sets: integer folders, and a few classes only."""
    folder = tmp_path_factory.mktemp('imagenet')
    class_folders(folder / 'imagenet2012/train', WNIDS, 5)
    class_folders(folder / 'imagenet2012/val', WNIDS, 2)
    class_folders(folder / 'imagenetv2-matched-frequency-format-val', ['0', '1', '10', '2'], 1)
    class_folders(folder / 'imagenet-r', WNIDS[1:3], 2, suffix='.jpg')
    (folder / 'meta.mat').write_bytes(meta_mat(ALL_WNIDS))  # what puts few classes among all
    return folder


def tiny_files():
    """tiny-imagenet-200 with the official layout and a few images, some of them grey."""
    rng, wnids = np.random.default_rng(0), ['n02', 'n01', 'n03']
    files = {'wnids.txt': '\n'.join(wnids), 'words.txt': 'n01\tone, first\nn02\ttwo'}
    for i, wnid in enumerate(wnids):
        for j in range(4):
            image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
            files[f'train/{wnid}/images/{wnid}_{j}.JPEG'] = encoded(image[:, :, 0] if j == 3 else image)
        files[f'val/images/val_{i}.JPEG'] = encoded(image)
    files['val/val_annotations.txt'] = ''.join(f'val_{i}.JPEG\t{w}\t0\t0\n' for i, w in enumerate(wnids))
    return files


TINY = tiny_files()
TINY_ZIP = zipped(below('tiny-imagenet-200', TINY))


@pytest.fixture
def tiny(tmp_path):
    """--data-dir with a small tiny-imagenet-200.zip."""
    write_tree(tmp_path, {'tiny-imagenet-200.zip': TINY_ZIP})
    return tmp_path


def batch_file(rng, n, size):
    return {'data': rng.integers(256, size=(n, 3 * size * size), dtype=np.uint8),
            'labels': rng.integers(1, 1001, size=n).tolist(), 'mean': np.zeros(3 * size * size)}


def npz(**content):
    np.savez(buffer := io.BytesIO(), **content)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, ('touch evil',)


# ---- killed and resumed ----

# dumps the stack of Python functions at SIGUSR2: where a run is when it is killed
TALKATIVE = ('-c', 'import faulthandler, runpy, signal, sys; sys.argv[:1] = []; sys.path[:0] = [""]; '
             'faulthandler.register(signal.SIGUSR2); runpy.run_path(sys.argv[0], run_name="__main__")')


def stack(process):
    """What a TALKATIVE process is doing: its functions, as text."""
    process.send_signal(signal.SIGUSR2)
    lines = iter(process.stdout.readline, '')
    return ''.join(itertools.takewhile(lambda line: 'File "<string>"' not in line, lines))


def children(process):
    return map(int, Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split())


def kill_all(process):
    for pid in [*children(process), process.pid]:
        os.kill(pid, signal.SIGKILL)


def kill(trial, aims, launch=TALKATIVE):
    """Kills a run again and again, each time after two new rows, so that it went on from somewhere. An aim is
    'row', right after one, 'any time' or, if it is TALKATIVE, the function that it is in."""
    rng = np.random.default_rng(len(aims))
    for aim in aims:
        process = trial.start('--resume', launch=launch)  # the first time it begins
        for _ in range(3 if aim == 'row' else 2):
            next((line for line in process.stdout if line[:7].strip().isdigit()), None)
        if aim == 'any time':
            time.sleep(rng.uniform(0, 0.2))
        while aim not in ('row', 'any time') and f' in {aim}\n' not in stack(process):
            assert process.poll() is None, f'it ended before it was killed: {aim}'
            time.sleep(rng.uniform(0, 0.003))
        kill_all(process)
        assert process.wait() == -signal.SIGKILL, f'it ended before it was killed: {aim}'


def kill_test(trial, imagenet, mine, tmp_path):
    """The long form, with $LONG_FORM kills: a row after every update, four ways to run it."""
    kills = int(os.environ['LONG_FORM'])
    few, turns = max(1, kills // 4), ['write_checkpoint', 'row', 'evaluate', 'any time'] * kills
    for way, script, aims, launch, flags in (
            ('one rank', 'cifar10_x32', turns[:kills], TALKATIVE, ()),
            ('two passes', 'cifar10_x32', turns[:kills], TALKATIVE, ('--accum', 2)),
            ('two ranks', 'cifar10_x32', turns[1::2][:few], (*LAUNCH, '--nproc_per_node=2'), ()),
            ('image files', 'imagenet2012', turns[:few], TALKATIVE,
             ('--depth', 20, '--batch', 8, '--workers', 2, '--data-dir', imagenet))):
        copy, begin = mine(('EVAL_EVERY = 1000', 'EVAL_EVERY = 1'), script=script), time.monotonic()
        whole = trial.but(*flags, '--iters', 20 + 5 * len(aims), script=copy, logs=tmp_path / way / 'whole')
        killed = whole.but(logs=tmp_path / way / 'killed')
        assert whole.watch({}, launch=launch)[0] == 0
        kill(killed, aims, launch)
        assert killed.watch({}, '--resume', launch=launch)[0] == 0
        killed.same_as(whole)
        print(f'{way}: killed {len(aims)} times, all weights and rows those of an uninterrupted run, '
              f'{time.monotonic() - begin:.0f} s', flush=True)


def test_killed_and_resumed_weights_are_bit_identical(trial, whole, capsys):
    kill(trial, ['write_checkpoint', 'row'])
    capsys.readouterr()
    trial.main('--resume')
    path, resumed, titles, row, *_ = capsys.readouterr().out.splitlines()  # a terminal shows where, and what
    assert path == str(trial.log) and all(line in trial.text for line in (resumed, titles, row))
    assert titles.split()[0] == 'iter'
    assert 0 < trial.resumed[-1] < 24
    changed = 'changed since the start: test_smoke.py'  # which the killed process had not imported
    assert re.search(rf'\nresumed .* on 1 x [^;]+; .*, commit [^;]+; {changed}; 1 ranks x 1 passes x 32 .*; '
                     r'204 trn, .*\n', trial.text)
    trial.same_as(whole)


def test_a_run_on_image_files_is_killed_and_resumed(imagenet, trial, monkeypatch):
    once, evaluated = data.JpegEvalBatches.__iter__, []
    monkeypatch.setattr(data.JpegEvalBatches, '__iter__', lambda x: evaluated.append(x) or once(x))
    trial = trial.but('--depth', 20, '--batch', 8, '--iters', 6, '--data-dir', imagenet, '--workers', 2,
                      script='imagenet2012.py')
    whole = trial.but('--workers', 0, logs=trial.logs.with_name('whole'))
    whole.main()
    assert len(evaluated) == 6 + 2  # val after each update, then IN-V2 and IN-R
    fields = result(whole.text)
    assert {'val_acc', 'inv2_acc', 'inr_acc'} <= fields.keys() and 'in_acc' not in fields
    assert trial.watch({'3': kill_all})[0] == -signal.SIGKILL
    trial.main('--resume')
    assert trial.resumed
    trial.same_as(whole)


def rank_1(process):
    return next(pid for pid in children(process) if '\0RANK=1\0' in Path(f'/proc/{pid}/environ').read_text())


def test_one_rank_two_ranks_and_one_again(trial, mine):
    """A run on one rank in two passes, then on two, of which one is killed and later one gets a signal, gives
    what one rank gives; so does its end on one rank. All ranks evaluate with the same running statistics."""
    script = mine(('    net.eval()\n', """    net.eval()
    if ranks.world > 1:
        import torch.distributed as dist
        for mine in net.buffers():
            dist.all_reduce(highest := mine.clone(), dist.ReduceOp.MAX)
            assert torch.equal(highest, mine)
"""))
    folder = trial.logs.parent
    two, one, end = (trial.but('--accum', accum, script=script, logs=folder / name)
                     for accum, name in ((1, 'two'), (2, 'one'), (2, 'end')))
    two.stop(0, '--accum', 2)
    code, text = two.watch({'6': lambda process: os.kill(rank_1(process), signal.SIGKILL),
                            '10': lambda process: os.kill(rank_1(process), signal.SIGTERM)},  # both stop
                           '--resume', launch=[*LAUNCH, '--nproc_per_node=2', '--max-restarts=2'])
    assert code == 0 and '\nstopped by SIGTERM' in text and 'another rank ended' in text, text
    assert 'destroy_process_group' not in text, text
    shutil.copytree(two.logs, end.logs)
    end.log.write_text(end.text.split('\ntst ')[0])
    end.path('last').unlink()
    end.main('--resume')
    one.main()
    assert [re.findall(r'resumed at update (\d+) on (\d) x', end.text)[i] for i in (0, -1)] == [
        ('1', '2'), ('22', '1')] and len(end.resumed) == 4
    assert result(two.text)['world'] == '2' and result(end.text)['world'] == '1' and len(two.rows) == 12
    for others, near in ((one.rows, range(6)), (end.rows, range(25))):
        for a, b in zip(two.rows, others, strict=True):  # training loss and accuracy, validation loss
            assert float(a[2]) == pytest.approx(float(b[2]), abs=2e-4 if int(a[0]) in near else 2e-2), text
            assert float(a[3]) == pytest.approx(float(b[3]), abs=0 if int(a[0]) in near else 0.04), text
            assert float(a[5]) == pytest.approx(float(b[5]), abs=0.01), text


def test_a_log_without_rows_and_checkpoint_begins_anew(trial):
    trial.stop(0)
    trial.path('last').unlink()
    trial.stop(0, '--resume')
    assert not trial.resumed and trial.text.count('command ') == 1
    assert '\nstopped by SIGTERM at update 1;' in trial.text


def test_the_newest_run_of_these_settings_goes_on(tmp_path, capsys):
    """Other settings, as of a copy that has changed, make another run. A log without a checkpoint has nothing
    yet; with rows, but without a checkpoint, it is history: it stays as it is, and a new one begins. A RESULT
    line that a full disk has cut short ends no run."""
    for stamp, momentum in enumerate((0.9, 0.9, 0.9, 0.95, 0.9), 1):
        header = runs.header_line('momentum', momentum)
        write_tree(tmp_path, {f'{stamp}-0.log': header + '\n   1000  0.1\nRESULT data' * (stamp != 3)})
        if stamp not in (3, 5):
            write_tree(tmp_path, {f'{stamp}-0.last.pt': ''})
    kept, found = f'{tmp_path}/5-0.log has no checkpoint beside it: it stays as it is.\n', []
    for _ in range(4):
        found.append(log := runs.open_log(tmp_path, True, dict(momentum=0.9, trn_images=1, labels_crc32='x')))
        log.with_suffix('.last.pt').unlink(missing_ok=True)
        log.write_text('\nRESULT dataset=x\n')
    assert [log.stem for log in found[:3]] == ['2-0', '1-0', '3-0']
    assert re.fullmatch(r'\d{8}-\d{6}', found[3].stem)  # a new one
    assert capsys.readouterr().out == 4 * kept + (
        f'{tmp_path} has no unfinished run of these settings: a new one begins.\n')


def test_a_copy_never_logs_where_the_original_does():
    config = dict(dataset='CIFAR10_x32', depth=20, width=1, batch=256, iters=9, lr=0.1, wd=0.1, precision='')
    args = SimpleNamespace(log_dir=Path('logs'), seed=1)
    for script, top in (('cifar10_x32.py', 'CIFAR10_x32'), ('mine.py', 'mine'),
                        ('CIFAR10_x32.py', 'CIFAR10_x32-copy'), ('mine/cifar10_x32.py', 'cifar10_x32-copy')):
        assert runs.Run(HERE / script, args, config, runs.Ranks()).folder.parts[1] == top


def test_a_log_is_never_used_twice(tmp_path, monkeypatch):
    write_tree(tmp_path, {'notes.log': 'mine'})
    stamps = iter('112')
    monkeypatch.setattr(time, 'strftime', lambda pattern: f'{next(stamps)}-0.log')
    first, second = (runs.open_log(tmp_path, resume, {}) for resume in (True, False))
    assert (first.name, second.name) == ('1-0.log', '2-0.log')
    second.write_text('done\nRESULT dataset=CIFAR10_x32\n')
    refused('1-0.log is being written by another process', runs.open_log, tmp_path, True, {})  # by us

    def loader():  # does not keep the lock
        files = [os.path.realpath(f'/proc/self/fd/{number}') for number in os.listdir('/proc/self/fd')]
        os._exit(str(first) in files)
    process = multiprocessing.get_context('fork').Process(target=loader)
    process.start(), process.join()
    assert process.exitcode == 0


# ---- the same images, every image once ----

@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('kind,others', [  # ranks and loader processes
    ('arrays', [(2, 0), (4, 0)]), ('files', [(1, 1), (1, 3), (2, 0), (4, 0)])])
def test_same_images_for_any_number_of_ranks_and_workers_and_any_resume_point(
        imagenet, monkeypatch, kind, others):
    monkeypatch.setattr(data, 'PIECE', 3)  # several pieces a batch, the last a smaller one
    images = data.Arrays(arrays(55)[0], torch.arange(55))

    def sequence(rank=0, world=1, start=0, count=14, workers=0, seed=7):  # two epochs of six, and more
        trn = data.TrainBatches(images, 8, seed, 'cpu', rank, world) if kind == 'arrays' else \
            load(imagenet, rank, world, seed=seed, workers=workers)[0]
        return take(trn.batches(start), count)

    def same(ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, a, b))
    whole = sequence()
    for world, workers in others:
        ranks = [sequence(rank, world, workers=workers) for rank in range(world)]
        same(whole, [map(torch.cat, zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)])
    for start in (1, 5, 6, 13):
        same(whole[start:], sequence(start=start, count=14 - start))
    first, second = (torch.cat([labels for _, labels in whole[i:i + 6]]) for i in (0, 6))
    other_seed = torch.cat([labels for _, labels in sequence(count=6, seed=8)])
    for epoch in (first, second):  # an image at most once, of those that have this label
        assert epoch.bincount().max() <= (1 if kind == 'arrays' else 5)
    assert not torch.equal(first, second) and not torch.equal(first, other_seed)
    assert whole[0][0].dtype == torch.uint8 and whole[0][0].shape[:2] == (8, 3)
    assert len({x.numpy().tobytes() for batch, _ in whole for x in batch}) == 14 * 8  # other crops each time


def evaluated(batch, ranks):
    """(images, labels) in the batches of all ranks, without what fills them up."""
    ranks = [list(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1  # or the ranks would wait for each other
    pairs = [pair for batches in ranks for pair in batches]
    assert all(len(x) == batch and x.is_contiguous(memory_format=torch.channels_last) for x, _ in pairs)
    images, labels = map(torch.cat, zip(*pairs, strict=True))
    return images[labels != data.IGNORE], labels[labels != data.IGNORE]


@pytest.mark.parametrize('n,batch,world', [(50, 8, 1), (50, 8, 4), (7, 8, 4), (64, 8, 2), (1, 4, 2)])
def test_every_evaluation_image_once(n, batch, world):
    images, _ = arrays(n)
    whole = data.Arrays(images, torch.arange(n))
    x, y = evaluated(batch, [data.EvalBatches(whole, batch, 'cpu', rank, world) for rank in range(world)])
    assert torch.equal(x.permute(0, 2, 3, 1), images[y]) and sorted(y.tolist()) == list(range(n))


@pytest.mark.parametrize('batch,world,workers', [(4, 1, 0), (4, 2, 2), (64, 1, 1), (2, 4, 0)])
def test_every_evaluation_file_once(imagenet, batch, world, workers):
    given = dict(eval_batch=batch, workers=workers)
    ranks = [load(imagenet, rank, world, **given)[1]['val'] for rank in range(world)]
    images, labels = evaluated(batch, ranks)
    assert labels.bincount().tolist() == [2] * 11 and len({x.numpy().tobytes() for x in images}) == 22
    assert [len(val) for val in ranks] == [22] * world


def test_augment_against_a_plain_loop():
    images, _ = arrays(162)
    draws = torch.arange(162)
    fast = data.augment(images, draws)
    assert fast.is_contiguous(memory_format=torch.channels_last) and fast.dtype == torch.uint8
    for image, draw, out in zip(images.numpy(), draws.tolist(), fast, strict=True):
        top, left, flip = draw // 18, draw // 2 % 9, draw % 2
        crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top:top + 32, left:left + 32]
        assert np.array_equal(out.permute(1, 2, 0).numpy(), crop[:, ::-1] if flip else crop)


def test_half_of_the_images_are_flipped_and_all_crops_are_equally_likely():
    order, draws = data.augmentation_plan(3, 0, 162 * 500)
    counts = torch.bincount(draws, minlength=162)
    assert len(counts) == 162 and 380 < counts.min() and counts.max() < 620  # 500 +- 5.4 standard deviations
    assert order.sort().values.equal(torch.arange(162 * 500))


def test_training_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for height, width in ((375, 500), (100, 400), (500, 120)):
        image = torch.empty(3, height, width)
        boxes = [data.random_box(height, width, rng.random((10, 4))) for _ in range(4000)]
        usual = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
        ours, theirs = (np.array(x, float) for x in (boxes, usual))
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
        for column, side in enumerate((height, width, height, width)):  # of top, left, height, width
            deciles = [np.quantile(x[:, column], np.linspace(0, 1, 11)) for x in (ours, theirs)]
            assert np.abs(deciles[0] - deciles[1]).max() < 0.05 * side, (column, deciles)


def test_training_crops_are_cut_resized_and_mirrored_as_by_pillow(imagenet):
    image, draws = picture(np.random.default_rng(0), 300, 400), np.random.default_rng(1).random((10, 4))
    top, left, height, width = data.random_box(300, 400, draws)
    box = left, top, left + width, top + height
    usual = np.asarray(Image.fromarray(image).resize((224, 224), Image.BILINEAR, box))
    for flip in (False, True):
        crop = data.random_crop(torch.from_numpy(image.copy()).permute(2, 0, 1), draws, flip).permute(1, 2, 0)
        assert np.abs(crop.numpy().astype(int) - usual[:, ::-1 if flip else 1]).max() <= 4
    trn = load(imagenet)[0]
    flips = [crop.keywords['flip'] for number in range(60) for _, crop in trn.crops(number, 0, 8)]
    assert 0.4 < np.mean(flips) < 0.6


def test_evaluation_crop_against_torchvision():
    from torchvision import transforms
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for height, width in ((375, 500), (500, 333), (256, 256), (200, 700), (600, 601)):
        image = np.random.default_rng(height).integers(256, size=(height, width, 3), dtype=np.uint8)
        ours = data.center_crop(torch.from_numpy(image.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        error = np.abs(ours.astype(int) - np.asarray(usual(Image.fromarray(image))).astype(int))
        assert ours.shape == (224, 224, 3) and error.mean() < 0.3 and error.max() <= 2, (height, width)


def test_facts_of_the_sets():
    """Splits as in the table of README.md; constants of the pixels, red, green, blue, as they are known."""
    page, found = (HERE / 'README.md').read_text(), {}
    for names, counts in re.findall(r'^\| ([\w, ]+) \| (\d+(?: / \d+)+) \|', page, re.M):
        first, *more = names.split(', ')
        for name in (first, *(first.rsplit('_', 1)[0] + name if name[0] == '_' else name for name in more)):
            found[name] = [int(count) for count in counts.split(' / ')]
    pixels = {'CIFAR10_x32': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
              'CIFAR100_x32': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
    assert found.keys() == data.SETS.keys()
    for name, facts in data.SETS.items():
        assert found[name] == [facts[key] for key in ('train', 'val', 'test') if facts[key]]
        assert (facts['mean'], facts['std']) == pixels.get(
            name, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.mark.parametrize('name,files,labels,names', [
    ('CIFAR10_x32', ([f'data_batch_{i}' for i in range(1, 6)], ['test_batch'], 'batches.meta'), 'labels',
     'label_names'), ('CIFAR100_x32', (['train'], ['test'], 'meta'), 'fine_labels', 'fine_label_names')])
def test_cifar_is_taken_as_it_is(name, files, labels, names, tmp_path, monkeypatch):
    for module in ('utils', 'cifar'):  # other MD5s
        monkeypatch.setattr(f'torchvision.datasets.{module}.check_integrity', lambda *path_and_md5: True)
    rng, (*parts, meta), classes = np.random.default_rng(0), files, data.SETS[name]['classes']
    folder = tmp_path / ('cifar-10-batches-py' if classes == 10 else 'cifar-100-python')
    folder.mkdir()
    (folder / meta).write_bytes(pickle.dumps({names: [f'class {i}' for i in range(classes)]}))
    expected = []
    for part in parts:
        batches = [(rng.integers(256, size=(20, 3, 32, 32), dtype=np.uint8), rng.integers(classes, size=20))
                   for _ in part]
        for file, (images, truth) in zip(part, batches, strict=True):
            content = {'data': images.reshape(20, -1), labels: truth.tolist(), 'coarse_labels': [0] * 20}
            (folder / file).write_bytes(pickle.dumps(content))
        expected.append([np.concatenate(arrays) for arrays in zip(*batches, strict=True)])
    data.prepare(name, tmp_path)
    for (images, truth), found in zip(expected, data.read_arrays(name, tmp_path / name)[:2], strict=True):
        assert np.array_equal(images.transpose(0, 2, 3, 1), found.images)
        assert np.array_equal(truth, found.labels)
    assert data.class_names(tmp_path / name)[-1] == f'class {classes - 1}'


@pytest.mark.parametrize('name,missing', [('torchvision', ()), ('torchcodec', ('torchvision.io',)),
                                          ('pillow', ('torchvision.io', 'torchcodec.decoders'))])
def test_all_kinds_of_files_are_decoded_as_pillow_does(name, missing, monkeypatch, recwarn):
    if name == 'torchcodec':
        pytest.importorskip('torchcodec.decoders')
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(data, 'jpeg_decoder', functools.cache(data.jpeg_decoder.__wrapped__))
    assert data.jpeg_decoder()[0] == name

    def decoded(file, path='x'):
        return data.decode_tensor(file, path).permute(1, 2, 0)
    image, turned = Image.fromarray(picture(np.random.default_rng(0), 90, 120)), Image.Exif()
    turned[0x0112] = 6  # the EXIF tag of orientation: to be ignored
    photo, _, _, png, *_ = files = [encoded(image.convert(mode), kind) for mode, kind in (
        ('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGB', 'PNG'), ('P', 'PNG'), ('LA', 'PNG'))]
    for file in [*files, encoded(image, exif=turned), encoded(image, progressive=True)]:
        assert np.array_equal(decoded(file), np.asarray(Image.open(io.BytesIO(file)).convert('RGB')))
    assert not recwarn.list  # torchvision has a DeprecationWarning for each image
    deep = encoded(np.arange(0, 65536, 16, np.uint16).reshape(64, 64), 'PNG')
    assert np.array_equal(decoded(deep)[..., 1].flatten(), np.arange(4096) // 16)
    for damaged in (photo[:600], png[:300], b'', bytes(99)):
        refused('some/where.JPEG is damaged', decoded, damaged, 'some/where.JPEG')


def test_decoding_in_threads_warns_of_nothing_and_leaves_warnings_as_they_are(
        monkeypatch, recwarn):
    monkeypatch.setattr(data, 'usable_cores', lambda: 8)
    filters, cut_short = warnings.filters[:], b'Exif\0\0MM\0*\0\0\0\x08\0\xff'
    file = encoded(picture(np.random.default_rng(0), 200, 300), exif=cut_short)
    images = list(data.on_all_cores(functools.partial(data.decode, path='x'), [file] * 400))
    assert len(images) == 400 and not recwarn.list and warnings.filters == filters


def test_prefetching_gives_the_same_batches_and_hands_over_errors():
    def broken():
        for i in range(5):
            yield [torch.tensor(i), torch.tensor(-i)]
        raise OSError('disk gone')
    chunks = data.ahead(broken())
    assert take(chunks, 5) == take(broken(), 5)
    with pytest.raises(OSError, match='disk gone'):
        next(chunks)


def test_the_thread_that_reads_ahead_stays_on_the_gpu_of_its_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)
    chunks = data.ahead(itertools.repeat([torch.ones(1)]))
    assert next(chunks) == [1] and chosen == [3]
    chunks.close()


@pytest.mark.parametrize('files,ranks,workers', [
    ({}, 1, 64), ({}, 32, 8), ({}, 512, 1), ({'cpu.max': 'max 100000\n'}, 8, 32), ({'cpu.max': ''}, 8, 32),
    ({'cpu.max': '400000 100000\n'}, 1, 4), ({'cpu.max': '50000 100000'}, 1, 1),
    ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 8, 32),
    ({'cpu/cpu.cfs_quota_us': '300000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 1, 3)])
def test_cores_are_shared_among_the_ranks_of_a_machine(tmp_path, monkeypatch, files, ranks, workers):
    write_tree(tmp_path, files)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: range(256))
    monkeypatch.setattr(data, 'CGROUPS', tmp_path)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    assert data.default_workers() == workers


def test_arrays_larger_than_memory_are_mapped(tmp_path, recwarn):
    """ImageNet1k_x64 has 15 GB; a mapping that Linux counts as memory would fail."""
    memory = re.findall(r'(?:MemTotal|SwapTotal): +(\d+)', Path('/proc/meminfo').read_text())  # kB
    count, folder = min(sum(map(int, memory)), 10 ** 8) // 10, tmp_path / 'TinyImageNet200_x64'
    save_arrays(folder, 'test', *arrays(50, 64))
    np.save(folder / 'train_labels.npy', np.arange(count) * 7 % 200)
    with open(folder / 'train_images.npy', 'wb') as file:  # a hole, which takes no disk
        np.lib.format.write_array_header_1_0(
            file, dict(descr='|u1', fortran_order=False, shape=(count, 64, 64, 3)))
        file.truncate(file.tell() + count * 64 * 64 * 3)
    trn, evals, *_ = load(tmp_path, name=folder.name, device='meta')  # not CUDA, so it has room for 2 GiB
    assert trn.arrays.images.device.type == 'cpu' and not recwarn.list
    folder = folder.rename(folder.with_name('CIFAR10_x32'))
    for which, n in (('train', 250), ('test', 50)):
        save_arrays(folder, which, *arrays(n))
    for weights, where in ((False, 'meta'), (True, 'cpu')):  # an evaluation needs no training images
        trn, evals, *_ = load(tmp_path, name=folder.name, device='meta', trained_elsewhere=weights)
        assert trn.arrays.images.device.type == where and evals['val'].arrays.images.is_meta


def test_memory_does_not_grow_with_mapped_arrays(tmp_path):
    def resident():
        status = Path('/proc/self/status').read_text()  # the second is for a file in memory, as of tmpfs
        return sum(int(kb) for kb in re.findall(r'(?:RssFile|RssShmem):\s+(\d+)', status)) / 1024
    np.lib.format.open_memmap(tmp_path / 'x.npy', 'w+', np.uint8, (20000, 64, 64, 3)).flush()  # 245 MB
    array = np.load(tmp_path / 'x.npy', mmap_mode='r+')
    mapped = data.Arrays(torch.from_numpy(array), torch.zeros(20000, dtype=torch.long), array.base)
    batches = data.TrainBatches(mapped, 256, 0, 'cpu').batches(0)
    take(batches, 20)
    before = resident()  # torch's own code has been read from its files by now
    take(batches, 55)
    assert resident() - before < 20  # MB
    batches.close()


# ---- signals ----

def test_a_signal_saves_and_exits(trial, whole, mine):
    """One run is stopped by each signal, in the middle of an interval, and resumed each time."""
    signals = {3: 'SIGTERM', 9: 'SIGINT', 15: 'SIGUSR1'}
    trial = trial.but(script=mine(('            it += 1\n', f"""            it += 1
            if name := {signals}.get(it):
                import signal
                signal.raise_signal(signal.Signals[name])
""")))
    for it, name in signals.items():
        code, text = trial.watch({}, '--resume')
        assert code == 128 + signal.Signals[name]
        assert text.endswith(f'\nstopped by {name} at update {it}; --resume continues\n')
    trial.main('--resume')
    assert trial.resumed == [3, 9, 15]
    trial.same_as(whole)


def test_a_signal_in_an_evaluation(trial, whole, monkeypatch):
    """Of val after update 4, then, in the resumed run, of the test set."""
    batches, evaluations = data.EvalBatches.__iter__, itertools.count(1)

    def signalled(self):
        if next(evaluations) in (2, 14):
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(self)
    monkeypatch.setattr(data.EvalBatches, '__iter__', signalled)
    for update, rows_done in ((4, 1), (24, 12)):
        with pytest.raises(runs.Stopped):
            trial.main('--resume')
        assert trial.text.endswith(f'\nstopped by SIGTERM at update {update}; --resume continues\n')
        assert len(trial.rows) == rows_done
    trial.main('--resume')
    trial.same_as(whole)


@pytest.mark.parametrize('number,ranks', [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_in_the_preparation(tmp_path, number, ranks):
    """A pipe stands for a file that is read for hours."""
    pipe = tmp_path / 'Imagenet32_train' / 'train_data_batch_1'
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    launch = [*LAUNCH, f'--nproc_per_node={ranks}'] if ranks > 1 else []
    trial = Trial(tmp_path / 'logs', 'imagenet1k_x32.py', '--data-dir', tmp_path, '--device', 'cpu')
    process = trial.start(launch=launch)
    while not list(tmp_path.glob('*.part*')):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.1)
    process.send_signal(number)
    # -15 is the 143 of a shell
    assert process.wait(30) == (1 if ranks > 1 else 130 if number == signal.SIGINT else -signal.SIGTERM)
    pipe.unlink()
    for part in tmp_path.glob('*.part.*'):  # what a SIGTERM has left
        os.utime(part, (0, 0))
    refused('not found', data.prepare, 'ImageNet1k_x32', tmp_path)  # removes it, a day later
    assert not list(tmp_path.glob('*.part*'))


def test_a_second_signal_ends_the_run_at_once(trial, mine):
    def twice(process):
        process.terminate()
        time.sleep(1.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == 143
    script = mine(('            it += 1\n',
                   "            print('stuck', flush=True)\n            __import__('time').sleep(60)\n"))
    trial.but(script=script).watch({'stuck': twice})


def test_what_was_waited_before_a_stop_counts_in_the_next_row(trial):
    trial.stop(2, wait=1)
    trial.stop(4, '--resume')
    assert [int(row[0]) for row in trial.rows] == [2, 4] and trial.resumed == [3]
    assert float(trial.rows[1][8]) > 30, trial.text  # percent


@pytest.mark.parametrize('error,code,leaves', [
    (None, 0, True), (runs.Stopped(signal.SIGUSR1), 138, True), (data.UserError('x'), 2, False),
    (FloatingPointError('x'), 1, False), (KeyError('x'), 1, False), (KeyboardInterrupt(), 130, False)])
@pytest.mark.parametrize('stream', [None, io.StringIO()])  # closed, and no file
def test_how_a_process_ends(monkeypatch, error, code, leaves, stream):
    """With which code, and whether it leaves the group of ranks: after an error it might wait for them, as
    NCCL might at Python's end."""
    left, at_once = [], []
    monkeypatch.setattr(os, '_exit', lambda code: at_once.append(code) or sys.exit(code))
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: left.append(True))
    monkeypatch.setattr(sys, 'stdout', stream)
    monkeypatch.setattr(sys, 'stderr', stream)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended, runs.plain_errors():
        runs.say('\udcff')
        if error:
            raise error
    assert bool(left) == leaves and (not code or ended.value.code == code)
    assert at_once == [code] * (code in (1, 2))


# ---- a full disk, a deleted folder, damaged checkpoints, dead processes ----

@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk of so many kB at .folder, or gives the mounted one that size."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(size):
        options = f'size={size}k' + (',remount' if os.path.ismount(folder) else '')
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder]
        if not shutil.which('mount') or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            pytest.skip('may not mount a file system')
    mount.folder = folder
    yield mount
    if os.path.ismount(folder):
        subprocess.run(['umount', '--lazy', folder], check=True)


def test_a_full_disk_leaves_what_was_saved(trial, whole, disk, capsys):
    """A disk that is full from the start grows: room for one checkpoint, for two, for all there is."""
    disk(40)
    (disk.folder / 'filling').write_bytes(bytes(40 * 1024))
    trial = trial.but('--resume', logs=disk.folder)
    for size, saved in ((40, 0), (6000, 1), (10000, 2)):
        disk(size)
        with pytest.raises(OSError, match='No space left'):
            trial.main()
        assert bool(rows(capsys.readouterr().out)) == bool(saved)  # nothing is computed that cannot be logged
        assert sum(trial.path(kind).exists() for kind in ('last', 'prev')) == saved
        assert not list(disk.folder.rglob('*.tmp'))
    disk(32000)
    trial.main()
    trial.same_as(whole)
    assert trial.text.startswith('command ') and len(trial.resumed) == 2


def test_a_full_disk_in_the_preparation(tiny, disk):
    disk(80)
    (disk.folder / 'tiny-imagenet-200.zip').symlink_to(tiny / 'tiny-imagenet-200.zip')
    refused('could not be prepared .*No space left', data.prepare, 'TinyImageNet200_x64', disk.folder)
    assert not list(disk.folder.glob('TinyImageNet*'))


def test_log_folder_deleted_during_the_run(trial):
    with pytest.raises(FileNotFoundError, match='No such file or directory: .*[.]log'):
        trial.main(at={5: lambda: shutil.rmtree(trial.logs)})


def test_data_file_cut_short_during_the_run(small, trial):
    """The system ends a process that reads a mapped file which is no longer there (SIGBUS)."""
    copy = trial.logs.with_name('data')
    shutil.copytree(small, copy)
    code, text = trial.but('--data-dir', copy).watch(
        {'6': lambda process: os.truncate(copy / 'CIFAR10_x32' / 'train_images.npy', 4096)})
    # the line goes on 'Bus error', unless a second thread meets it too, which ends the process at once
    assert code == -signal.SIGBUS and 'Fatal Python error' in text


def test_a_checkpoint_is_never_half_written(trial, whole):
    """A limit on the size of files ends the run in the middle of its first one."""
    size = whole.path('last').stat().st_size // 2
    code, text = trial.watch({}, limit=(resource.RLIMIT_FSIZE, (size, size)))
    assert code == 1 and len(trial.rows) == 1 and 'Traceback' not in text
    says(text.splitlines()[-1], 'File too large')
    assert not list(trial.logs.rglob('*.pt')) and not list(trial.logs.rglob('*.tmp'))


def test_the_log_is_on_the_disk_before_the_checkpoint_that_knows_its_length(trial, monkeypatch):
    """Or a power cut could leave a checkpoint of rows that the log does not have."""
    synced, fsync = [], os.fsync

    def watched(number):
        synced.append(os.readlink(f'/proc/self/fd/{number}')[-4:])
        fsync(number)
    monkeypatch.setattr(os, 'fsync', watched)
    trial.main('--iters', 4)
    assert re.fullmatch('.log(.log(.tmp){1,2}){4}.log', ''.join(synced))  # the header, four rows, the results


def flip_a_bit(path):
    """In the middle of the file: of a checkpoint it is in the numbers of a tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [
    lambda last: os.truncate(last, 100_000), lambda last: os.truncate(last, 30_000),
    flip_a_bit, lambda last: last.unlink(),
    lambda last: shutil.copy(last.with_name(last.name.replace('.last', '.best')), last)])
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(killed, whole, monkeypatch, damage):
    """Which it never replaces, even if a kill comes between the two renames of the next checkpoint."""
    damage(killed.path('last'))
    killed.path('best').write_text('damaged too')
    rename = Path.replace

    def dies(path, target):
        if path.suffix == '.tmp' and target.name.endswith('.last.pt'):
            raise InterruptedError
        rename(path, target)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Path, 'replace', dies)
        killed.main('--resume')
    assert re.search(r'^resumed at update 22 on 1 x .* previous checkpoint: .*last.pt', killed.text, re.M)
    killed.main('--resume')
    killed.same_as(whole)


def test_a_disk_that_does_not_answer_destroys_no_checkpoint(tmp_path, monkeypatch):
    """Nor does a lack of memory: the one before could be read, but the last may be good, and stays."""
    def full(path, **options):
        raise MemoryError
    last, previous = tmp_path / 'a.last.pt', tmp_path / 'a.prev.pt'
    last.symlink_to('/proc/self/mem')  # what a disk may do when it is read
    runs.write_checkpoint(previous, config={}, net={}, run=0)
    refused('Input/output error', runs.read_last_checkpoint, last, previous, {})
    assert last.is_symlink()
    last.unlink()
    shutil.copy(previous, last)
    monkeypatch.setattr(torch, 'load', full)
    with pytest.raises(MemoryError):
        runs.read_last_checkpoint(last, previous, {})
    assert last.exists() and previous.exists()


def test_no_good_checkpoint_is_an_error(killed):
    for kind in ('last', 'prev'):
        flip_a_bit(killed.path(kind))
    before = killed.text
    refused(r'last.pt cannot .*damaged.* To begin anew, leave out --resume', killed.main, '--resume')
    assert killed.text == before


def test_damaged_files_and_killed_loader_processes(imagenet, tmp_path, monkeypatch):
    root = tmp_path / 'imagenet2012'
    shutil.copytree(imagenet / 'imagenet2012', root)
    batches = load(tmp_path, workers=1)[0].batches(0)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(OSError, match='A loader process died .*--workers'):
        take(batches, 99)

    def full(*key):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left')
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r'\(R.*No space left\).*--shm-size'):
        patch.setattr(data.JpegBatches, '__getitem__', full)
        next(load(tmp_path, workers=1)[0].batches(0))
    with monkeypatch.context() as patch:  # what is put there later can be lost without a word
        patch.setattr('torch.utils.data._utils.worker._worker_info', 'as in a loader process')
        assert [t.is_shared() for t in load(tmp_path)[0][0, 0]] == [True, True]

    file = next((root / 'train').rglob('*_3.JPEG'))
    file.unlink()
    file.symlink_to('/proc/self/mem')  # what a disk may do when it is read
    refused('_3.JPEG: Input/output error. Mend that', take, load(tmp_path)[0].batches(0), 6)
    refused('Input/output error', data.pack_imagenet, tmp_path, None)
    shutil.copy(imagenet / file.relative_to(tmp_path), file.with_name('x'))
    file.with_name('x').replace(file)

    def broken(tensor, device):
        raise RuntimeError('device-side assert')
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='^device-side assert$'):
        patch.setattr(data, 'to_device', broken)  # this is no loader's fault
        next(load(tmp_path)[0].batches(0))
    for file in (root / 'train').rglob('*_4.JPEG'):
        os.truncate(file, 900)
    for workers in (0, 2):
        refused('_4.JPEG is damaged', take, load(tmp_path, workers=workers)[0].batches(0), 6)
        assert not multiprocessing.active_children()  # they would keep the program from ending
    refused('_4.JPEG is damaged', data.pack_imagenet, tmp_path, 256)
    val = load(tmp_path)[1]['val']
    next((root / 'val').rglob('*_0.JPEG')).unlink()
    refused('_0.JPEG: No such file', list, val)
    shutil.rmtree(root / 'val')
    refused('no images of imagenet2012 for val', load, tmp_path)


@pytest.mark.parametrize('where', ['loader', 'main'])
def test_an_error_ends_the_program_and_its_loader_processes(imagenet, where):
    """In a loader process, or in the loop, whose traceback keeps the batches. They are forked (on Linux):
    Python 3.14 would do otherwise."""
    text = run('-c', f'''if True:
        import data, multiprocessing
        multiprocessing.set_start_method('forkserver')
        def broken(*images, **draws):
            raise RuntimeError('a crop of a wrong shape')
        def main():
            trn = data.load('imagenet2012', {str(imagenet)!r}, 8, 4, 0, 'cpu', workers=2)[0]
            for _ in (batches := trn.batches(0)):
                print('pids', *[process.pid for process in multiprocessing.active_children()])
                broken()
        if {where!r} == 'loader':
            data.random_crop = broken
        main()''', ok=1, timeout=60)
    assert 'RuntimeError: a crop of a wrong shape' in text and 'process died' not in text
    assert 'in broken' in text and ('pids' in text) == (where == 'main')
    for pid in re.findall(r'\d+', text.partition('pids')[2].partition('\n')[0]):
        assert not Path('/proc', pid).exists()


def test_a_signal_to_data_py_leaves_nothing(tmp_path, monkeypatch):
    def killed(data_dir, short_side):
        with data.new_folder(data_dir / 'pack'):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
    monkeypatch.setattr(data, 'pack_imagenet', killed)
    with pytest.raises(SystemExit) as ended:
        main('data.py', 'pack', 'imagenet2012', '--as-is', '--data-dir', tmp_path)
    assert ended.value.code == 143 and not list(tmp_path.iterdir())


def test_a_preparation_goes_on_when_nobody_listens(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, 'stdout', closed := open(write, 'w'))
    data.write_arrays(tmp_path, 'train', 32, [(x.numpy() for x in arrays(9))], 9)
    assert len(np.load(tmp_path / 'train_images.npy')) == 9
    with contextlib.suppress(BrokenPipeError):
        closed.close()


def test_a_download_does_not_wait_for_ever(tmp_path, monkeypatch):
    def unanswered(url, folder, *rest):  # a folder of its own: another process may be at it, too
        raise TimeoutError(f'{Path(folder).name}: {socket.getdefaulttimeout()} s')
    monkeypatch.setattr('torchvision.datasets.utils.download_url', unanswered)
    refused(r'download failed .CIFAR10_x32\.part\.\w+: 60.0 s', data.prepare, 'CIFAR10_x32', tmp_path)
    assert socket.getdefaulttimeout() is None


def test_a_preparation_leaves_those_of_others_alone(tmp_path):
    final = tmp_path / 'CIFAR10_x32'
    with data.new_folder(final) as first:
        (first / 'a').touch()
        left_over = first.with_name(first.name + 'x')
        left_over.mkdir()
        os.utime(left_over, (0, 0))  # more than a day ago
        data.remove_left_over(tmp_path, 'CIFAR10_x32')
        with data.new_folder(final) as second:
            assert first != second and (first / 'a').exists() and not left_over.exists()
        (second := final / 'of the second').touch()
    assert list(tmp_path.iterdir()) == [final] and second.exists()


def test_out_of_memory_gets_a_sentence(trial, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # or the stacks of many threads alone would take it all
    code, text = trial.watch({}, '--batch', 200, '--width', 8, limit=(resource.RLIMIT_AS, (2 ** 32, 2 ** 32)))
    assert code == 1 and 'Traceback' not in text, text
    says(text.splitlines()[-1], 'out of memory', '--accum', '--batch')


def test_errors_in_plain_words(monkeypatch):
    no_compiler = RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler")
    for error, words in ((data.UserError('two\n lines'), 'two lines'), (MemoryError(), 'a higher --accum'),
                         (no_compiler, '--compile needs a C++ compiler')):
        says(runs.in_plain_words(error), words)
    monkeypatch.setattr(runs.faulthandler, 'enable', lambda: None)  # it is pytest's here
    monkeypatch.setenv('RANK', 'x')
    with pytest.raises(SystemExit, match='2'), runs.plain_errors():  # not a traceback of its own
        raise data.UserError('RANK is no number')
    monkeypatch.delenv('RANK')
    for fault in (TimeoutError(), KeyError('loss'), RuntimeError('Connection reset by peer')):
        with pytest.raises(type(fault)), runs.plain_errors():  # these keep their tracebacks
            raise fault


@pytest.mark.parametrize('shell', ['exec "$@" >&- 2>&-', '("$@"; echo $? >&2) | head -1 >&2'])
def test_a_run_whose_output_nobody_reads_goes_on(trial, shell):
    """Also in a log folder whose name is not UTF-8."""
    trial = trial.but('--iters', 2, logs=trial.logs.with_name(os.fsdecode(b'lo\xffgs')))
    done = subprocess.run(['sh', '-c', shell, 'sh', sys.executable, *map(str, trial.command)], cwd=HERE,
                          capture_output=True)
    assert done.returncode == 0 and len(trial.rows) == 2 and result(trial.text)
    assert 'head' not in shell or re.fullmatch(rb'/.*log\n0\n', done.stderr), done.stderr


# ---- wrong input, losses that are not finite ----

def test_bad_input_gets_a_sentence(small, whole, tmp_path, monkeypatch):
    text, file, model = (tmp_path / name for name in ('text', 'x.safetensors', 'model.pt'))
    for path in (text, file):
        path.write_text('no checkpoint')
    torch.save(torch.nn.Linear(2, 2), model)
    (tmp_path / 'home').symlink_to(small)
    monkeypatch.chdir(tmp_path)
    here = '--data-dir', small
    for flags, env, words in (  # flags, environment, what the message says
            (['--workers', -1], {}, '--workers at 0'), (['--iters', 0], {}, 'start at 1'),
            (['--seed', 2 ** 32], {}, '--seed goes from 0 to 2.32 - 1'),
            (['--depth', 19], {}, 'choose from 18, 20, 32'),
            (['--iter', 9], {}, 'unrecognized arguments: --iter'),  # no guessing
            (['--batch', 10, '--accum', 3], {}, '--batch 10 is not divisible .* 3 passes'),
            ([], dict(WORLD_SIZE=2), 'RANK, LOCAL_RANK, WORLD_SIZE.* torchrun'),
            *(([], dict(RANK=r, LOCAL_RANK=local, WORLD_SIZE=world, MASTER_ADDR=''), 'unset the first three')
              for r, local, world in ((0, 0, 0), (-1, 0, 1), (5, 0, 1), (0, 1, 1), (0, 0, 2), (0, 0, 'x'))),
            ([], dict(SLURM_STEP_NUM_TASKS=8), 'SLURM_STEP_NUM_TASKS=8.* train alone.* torchrun'),
            ([*here, '--eval', whole.path('best'), '--depth', 32], {}, 'depth 20.* 32'),
            ([*here, '--eval', text], {}, 'as a checkpoint .*another kind of file'),
            ([*here, '--eval', model], {}, r'as a checkpoint .*save the state_dict\(\)'),
            ([*here, '--eval', file], {}, 'as a checkpoint .*a safetensors file'),
            ([*here, '--eval', tmp_path / 'none'], {}, 'No such file'),
            ([*here, '--log-dir', text], {}, 'text.*--log-dir'),
            (here, {data.INCOMPLETE: ''}, 'holds 250 images, not 50000'),
            ([*here, '--batch', 512], {}, '512.* 204 training images'),
            # no shell has replaced this ~; and what is empty in the environment is not there
            (['--data-dir=~/home', '--batch', 512], dict(HOME=tmp_path, WORLD_SIZE=''), '204')):
        refused(words, main, *SHORT, '--log-dir', tmp_path, *flags, **env)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # with a driver that is too old
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    refused('mps takes --precision bf16 or fp32', main, SHORT[0], '--device', 'mps', '--precision', 'fp16')
    refused('finds 0 usable GPUs.*--device cpu', main, *SHORT, '--log-dir', tmp_path, '--device', 'cuda')
    with monkeypatch.context() as patch:  # a GPU that is too old for this torch
        patch.setattr(torch.cuda, 'is_available', lambda: True)
        patch.setattr(torch.cuda, 'set_device', lambda index: None)
        patch.setattr(torch, 'zeros', lambda *shape, device: torch.ones(2).view(3))  # any RuntimeError
        refused('cuda: .* Try --device cpu', main, *SHORT, '--log-dir', tmp_path, '--device', 'cuda')
    says(run(HERE / SHORT[0], '--iters', 0, ok=2), 'start at 1')


HALF = {'train/n01/images/n01_2.JPEG': TINY['train/n01/images/n01_2.JPEG'][:600]}
UNKNOWN = TINY_ZIP.replace(b'PK\1\2\x14\3\x14', b'PK\1\2\x14\3\xff', 1)  # the version needed to read a member


@pytest.mark.parametrize('name,files,words', [
    ('CIFAR10_x32', {}, '(?=.*cifar-10-python.tar.gz).*--synthetic'),
    ('CIFAR10_x32', {'cifar-10-batches-py/data_batch_3': 'half of a file'},  # as after a broken copy
     '(?=.*cifar-10-python.tar.gz)(?=.*cifar-10-batches-py is damaged).*--synthetic'),
    ('CIFAR10_x32', below('cifar-10-batches-py', {'data_batch_1': '', 'png/x': ''}),  # a folder made in it
     'cifar-10-batches-py is damaged or not complete'),
    ('CIFAR10_x32', {'cifar-10-python.tar.gz': 'half'}, 'cifar-10-python.tar.gz is damaged or not complete'),
    ('ImageNet1k_x32', {}, 'train_data_batch_1, .* not found in .* --synthetic'),
    ('ImageNet1k_x32', {f'Imagenet32_train/train_data_batch_{i}': '' for i in range(1, 10)},
     'train_data_batch_10, val_data not found'),
    ('imagenet2012', {'imagenet2012': Path('/nowhere/x')}, 'imagenet2012 is a link to /nowhere/x'),
    ('CIFAR10_x32', {'CIFAR10_x32': ''}, 'CIFAR10_x32 is a file, but a folder is needed'),
    ('TinyImageNet200_x64', below('tiny-imagenet-200', TINY | HALF), 'n01_2.JPEG is damaged'),
    ('TinyImageNet200_x64', {'tiny-imagenet-200.zip': UNKNOWN}, '200.zip is damaged .*Fetch it again'),
    *(('TinyImageNet200_x64', {'tiny-imagenet-200.zip': zipped({member: 'x'})}, 'points outside')
      for member in ('../evil', '/etc/evil', 'a/../../evil', 'a\\..\\..\\evil', 'C:/evil'))])
def test_missing_and_damaged_data_get_a_sentence(tmp_path, name, files, words):
    write_tree(tmp_path, files)
    refused(words, data.prepare, name, tmp_path, whole='Tiny' not in name)
    assert {path.name for path in tmp_path.iterdir()} == {path.split('/')[0] for path in files}  # no more


def test_a_torchvision_that_fails_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision.datasets', None)  # an import of it fails
    refused('torchvision cannot be imported .* Install', data.prepare, 'CIFAR10_x32', tmp_path)
    assert not list(tmp_path.iterdir())


def test_ready_made_arrays_are_checked(tmp_path):
    folder = tmp_path / 'CIFAR10_x32'
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    save_arrays(folder, 'test', images, labels)
    for name, array, words in (
            ('images', images.astype(np.float32), 'float32'), ('labels', labels.astype(np.int32), 'int32'),
            ('images', images.transpose(0, 3, 1, 2), r'but uint8 .*32, 32, 3. is needed'),
            ('labels', labels[:3], '4 images need int64'),
            ('labels', labels + 10, 'labels 10 to 10, but the classes are 0 to 9')):
        save_arrays(folder, 'train', images, labels)
        np.save(folder / f'train_{name}.npy', array)
        refused(words, data.read_arrays, 'CIFAR10_x32', folder)
    save_arrays(folder, 'train', images, labels)
    os.truncate(folder / 'test_images.npy', 5000)
    refused('test_images.npy cannot be read.*Delete', data.read_arrays, 'CIFAR10_x32', folder)
    np.savez(folder / 'x.npz', images)
    (folder / 'x.npz').rename(folder / 'test_images.npy')
    refused('test_images.npy cannot be read .it is an npz', data.read_arrays, 'CIFAR10_x32', folder)
    (folder / 'test_labels.npy').unlink()
    refused('lacks test_labels.npy', data.prepare, 'CIFAR10_x32', tmp_path)


def test_own_arrays_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    own = dict(size=32, classes=np.int64(5), train=80, val=20, test=10)
    own |= dict(mean=np.array([0.5]), std=(np.float64(1),))
    monkeypatch.setitem(data.SETS, 'Own', own)
    refused('Own needs train_images.npy', data.prepare, 'Own', tmp_path)
    images, labels = arrays(100)[0], torch.arange(100) // 20

    def opened(train, test=labels[:10], **options):
        save_arrays(tmp_path / 'Own', 'train', images, train)
        save_arrays(tmp_path / 'Own', 'test', images[:10], test)
        return load(tmp_path, name='Own', **options)
    refused('Own: .* sorted by class, .* shuffle', opened, labels)
    opened(labels, trained_elsewhere=True)
    facts = data.SETS['Own']  # a checkpoint holds them, but nothing of numpy's
    assert type(facts['classes']) is int and facts['mean'] == (0.5,) and type(facts['std'][0]) is float
    opened(labels * 0, labels[:10] * 0)  # a single class is no order
    shuffled = [opened(labels[np.random.default_rng(seed).permutation(100)]) for seed in range(2)]
    assert len(shuffled[0][1]['val']) == 20 and shuffled[0][3] != shuffled[1][3]  # their checksums
    refused('Own: val .* such as class 4', opened, torch.cat([torch.arange(90) % 4, labels[90:]]))
    refused('Own: tst .* such as class 4', opened, torch.arange(100) % 4, labels[90:])
    monkeypatch.setitem(data.SETS, 'Own', own | dict(train=90, val=10))
    refused('sorted by class', opened, 4 - labels)  # the boundary lies within a class
    monkeypatch.setitem(data.SETS, 'Own', own | dict(train=60, val=40))
    assert load(tmp_path, name='Own', batch=4096, synthetic=True)[0].per_epoch == 1
    monkeypatch.setitem(data.SETS, 'Own', own | dict(mean=(115,)))
    refused('Own: .* on the 0..1 scale', opened, labels)
    monkeypatch.setitem(data.SETS, 'Own', own | dict(size=28))
    for synthetic in (False, True):
        refused('images of 28 px, but the networks take 32 or 64', opened, labels, synthetic=synthetic)
    monkeypatch.setitem(data.SETS, 'Own', own | dict(test=60))
    refused(r"holds 10 images, not 60. Correct it, or SETS\['Own'\]", opened, labels, whole=True)


def test_data_are_prepared_once_on_each_machine():
    calls = []
    for rank, local_rank in ((0, 0), (1, 1), (8, 0), (9, 1)):
        runs.Ranks(rank, local_rank).rank_0_first(calls.append, rank)
    assert calls == [0, 8]


def test_other_images_are_refused(trial, monkeypatch):
    """And another precision, on a rank, since each machine may have a disk and a CPU of its own: here rank 0
    says what it has found. And in a run that goes on."""
    images = r'images 204 trn, 46 val, 50 tst from ready-made arrays, .*labels_crc32.*'
    for what, ours, theirs in ((images, '46 val', '45 val'), (images, 'made arrays', 'made images'),
                               (images, 'crc32', 'crc 32'), ('--precision fp32', 'fp32', 'bf16')):
        with monkeypatch.context() as patch:
            patch.setattr(runs.Ranks, 'from_rank_0', lambda self, text, a=ours, b=theirs: text.replace(a, b))
            for flags in ([], ['--eval', 'none']):
                refused(f'rank 0 has .*{what}; .* has .*{what.replace(ours, theirs)}: ', trial.main, *flags)
    trial.stop(5)
    before = trial.text
    with monkeypatch.context() as patch:  # a usual split, of the same labels in the same order
        patch.setitem(data.SETS, 'CIFAR10_x32', data.SETS['CIFAR10_x32'] | dict(train=45000, val=5000))
        refused('was made with trn_images 204, here it is 225', trial.main, '--resume')
    monkeypatch.setattr(data, 'fingerprint_of', lambda parts: {'labels_crc32': 'others'})
    refused(r'was made with labels_crc32 \w{8}, here it is others', trial.main, '--resume')
    assert trial.text == before


def test_a_loss_that_is_not_finite_ends_the_run(trial):
    with pytest.raises(FloatingPointError, match='not finite in updates 1 to 2 .*--precision bf16.$'):
        trial.main('--iters', 10, '--lr', 1e30)
    assert all(t.isfinite().all() for t in trial.weights.values())
    shutil.rmtree(trial.logs)  # a row after two updates: there is no checkpoint yet
    with pytest.raises(FloatingPointError, match='updates 0 to 2 .*--precision bf16.$'):
        trial.main('--iters', 20, '--lr', 1e38, '--wd', 1e38)
    assert not list(trial.logs.rglob('*.pt'))


def test_fp16_skips_overflows_and_keeps_its_scale(trial, mine):
    """From an absurd first scale: updates are skipped and counted, momentum and weights stay finite, and a
    run resumed on two ranks goes on with the scale it had, and counts each once."""
    script = mine(('GradScaler(args.device, ', 'GradScaler(args.device, 2.0 ** 28, '),
                  ('max(1, args.iters // 10)', '4'))
    trial = trial.but('--batch', 4, '--iters', 10, '--precision', 'fp16', script=script)
    trial.stop(4)
    before = trial.checkpoint()
    skipped = before['stats'][2].item() + sum(int(row[9]) for row in trial.rows)
    assert skipped >= 1 and before['scaler']['scale'] == 2.0 ** (28 - skipped)
    code, text = trial.watch({}, '--resume', launch=[*LAUNCH, '--nproc_per_node=2'])
    assert code == 0, text
    total = sum(int(row[9]) for row in trial.rows)
    assert skipped < total < 10 and trial.checkpoint()['scaler']['scale'] == 2.0 ** (28 - total)
    assert all(t.isfinite().all() for t in trial.weights.values())


def test_fp16_whose_scale_collapses_ends_the_run(trial, mine):
    """Gradients that overflow whatever the scale: every update is skipped, and the run says so."""
    script = mine(('GradScaler(args.device, ', 'GradScaler(args.device, 8.0, '),
                  ('loss = F.cross_entropy(logits, labels)\n',
                   'loss = F.cross_entropy(logits, labels) * math.inf\n'))
    trial = trial.but('--batch', 4, '--iters', 10, '--precision', 'fp16', script=script)
    with pytest.raises(FloatingPointError, match='updates 3 to 4 .loss scale 0.5'):
        trial.main()
    assert [int(row[9]) for row in trial.rows] == [1] * 3
    assert all(t.isfinite().all() for t in trial.weights.values())


# ---- data sets in all their layouts ----

def test_tiny_imagenet(tiny):
    refused('n01_4.JPEG .with .* others. is missing', data.prepare, 'TinyImageNet200_x64', tiny, whole=True)
    assert [path.name for path in tiny.iterdir()] == ['tiny-imagenet-200.zip']
    for name in ('TinyImageNet200_x64', 'TinyImageNet200_x32'):
        data.prepare(name, tiny)
    (images, labels), (_, test_labels), about = data.read_arrays(
        'TinyImageNet200_x64', tiny / 'TinyImageNet200_x64')
    names = sorted(name for name in TINY if name.startswith('train/'))
    for i, j in enumerate(np.random.RandomState(0).permutation(12)):
        expected = np.asarray(Image.open(io.BytesIO(TINY[names[j]])).convert('RGB'))
        assert np.array_equal(images[i], expected) and labels[i] == int(names[j][8]) - 1  # n01 -> 0
    assert test_labels.tolist() == [1, 0, 2] and 'sorted' in about
    (small, same_labels), _, _ = data.read_arrays('TinyImageNet200_x32', tiny / 'TinyImageNet200_x32')
    blocks = images.numpy().reshape(12, 32, 2, 32, 2, 3).astype(float).mean((2, 4))
    assert np.array_equal(small, np.floor(blocks + 0.5)) and torch.equal(same_labels, labels)
    assert (tiny / 'TinyImageNet200_x32/classes.txt').read_text() == 'n01 one, first\nn02 two\nn03\n'
    trn, evals, *_ = load(tiny, name='TinyImageNet200_x64', batch=4)
    assert (len(trn), len(evals['val']), len(evals['tst'])) == (9, 3, 3)  # 12 * 81920 / 100000


def sorted_val(files, pattern):
    """The files with the images of val moved into class folders, and without the list of their classes."""
    wnids = dict(line.split('\t')[:2] for line in files['val/val_annotations.txt'].splitlines())
    moved = {f'val/images/{file}': pattern.format(wnid, file) for file, wnid in wnids.items()}
    return {moved.get(name, name): x for name, x in files.items() if name != 'val/val_annotations.txt'}


@pytest.mark.parametrize('files', [
    sorted_val(TINY, 'val/{}/{}'), sorted_val(TINY, 'val/{}/images/{}'), sorted_val(TINY, 'val/images/{}/{}'),
    below('tiny-imagenet-200', TINY),
    {name.replace('images/n', 'n'): x for name, x in TINY.items()},
    {name: x.replace('\n', '\r\n') if name[0] in 'vw' and isinstance(x, str) else x
     for name, x in TINY.items() if name != 'words.txt'}], ids='sorted below above twice flat crlf'.split())
@pytest.mark.parametrize('archive', [False, True])
def test_layouts_of_tiny_imagenet(tiny, files, archive):
    data.prepare('TinyImageNet200_x64', tiny)
    usual, home = tiny / 'TinyImageNet200_x64', tiny / 'other' / 'tiny-imagenet-200'
    write_tree(home, files)
    clutter(home)
    if archive:  # the files lie on top, without a folder around them
        shutil.make_archive(home, 'zip', home)
        shutil.rmtree(home)
    data.prepare('TinyImageNet200_x64', home.parent)
    for file in data.FILES:
        assert (usual / file).read_bytes() == (home.parent / usual.name / file).read_bytes(), file


@pytest.mark.parametrize('size,folders,archive,kind', [
    (32, ['Imagenet32_train'], False, ''), (64, ['Imagenet64_train'], True, ''),
    (64, ['Imagenet64_train_part1', 'Imagenet64_train_part2'], False, ''),
    (32, ['Imagenet32_train_npz'], False, '_npz'), (32, ['Imagenet32_train_npz'], True, '_npz')])
def test_official_imagenet_batches(tmp_path, size, folders, archive, kind):
    rng, name = np.random.default_rng(0), f'ImageNet1k_x{size}'
    train, val, files = [batch_file(rng, 5, size) for _ in range(10)], batch_file(rng, 7, size), {}
    for i, batch in enumerate([*train, val]):
        home = [*folders, f'Imagenet{size}_val{kind}'][i * len(folders) // 10]
        file = f'train_data_batch_{i + 1}' if batch is not val else 'val_data'
        files.setdefault(home, {})[file + kind.replace('_', '.')] = npz(**batch) if kind else pickle.dumps(
            batch, protocol=2 + i % 4)
    (tmp_path / f'Imagenet{size}_train.tar.gz').touch()  # which is not read
    for home, batches in files.items():
        write_tree(*((tmp_path, {f'{home}.zip': zipped(batches)}) if archive else (tmp_path / home, batches)))
    refused('holds 50 images, not 1281167', data.prepare, name, tmp_path, whole=True)
    data.prepare(name, tmp_path)
    (images, labels), (_, test_labels), about = data.read_arrays(name, tmp_path / name)
    pixels = np.concatenate([batch['data'] for batch in train])
    assert np.array_equal(images, pixels.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))
    assert (labels + 1).tolist() == sum([batch['labels'] for batch in train], [])
    assert (test_labels + 1).tolist() == val['labels'] and 'own order' in about
    trn, evals, *_ = load(tmp_path, name=name)
    assert len(trn) == 50 and list(evals) == ['val'] and len(evals['val']) == 7
    for which, key in (('test', 'val'), ('train', 'train')):  # made before these were there
        save_arrays(tmp_path / name, which, np.zeros((0, size, size, 3), np.uint8), labels[:0])
        refused(f'has no images of {name} for {key}. Put them .* delete .*/{name}', load, tmp_path, name=name)


def test_downsampled_imagenet_from_the_original_images(imagenet, tmp_path):
    (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
    data.prepare('ImageNet1k_x32', tmp_path)
    (images, labels), _, about = data.read_arrays('ImageNet1k_x32', tmp_path / 'ImageNet1k_x32')
    files = sorted((imagenet / 'imagenet2012/train').rglob('*.JPEG'))
    for image, label, file in zip(images, labels, files, strict=True):
        small = Image.open(file).convert('RGB').resize((32, 32), Image.BOX)
        assert np.array_equal(image, np.asarray(small)) and WNIDS[label] == file.parent.name
    assert 'sorted wnids' in about


def write_tar(path, files, mode='w'):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def test_official_archives_and_flat_val(tmp_path):
    """Training tars in a tar, flat val, and the development kit, which has an order of its own."""
    rng, root = np.random.default_rng(0), tmp_path / 'imagenet2012'
    train_tar, val_tar, kit_tar = archives = [tmp_path / name for name in data.ARCHIVES]
    write_tar(train_tar, {f'./{wnid}.tar': write_tar(train_tar, {
        f'{wnid}_{j}.JPEG': encoded(picture(rng, 80, 90)) for j in range(2)}) for wnid in WNIDS[:5]})
    write_tar(val_tar, {f'ILSVRC2012_val_{i:08}.JPEG': encoded(picture(rng, 60, 70)) for i in range(1, 7)} | {
        '/tmp/evil.JPEG': b'x'})
    order, truth, home = [3, 1, 4, 0, 2], [1, 5, 2, 2, 3, 4], 'ILSVRC2012_devkit_t12/data'
    lines = b''.join(b'%d\n' % i for i in (truth * 9000)[:50000])
    write_tar(kit_tar, {f'{home}/meta.mat': meta_mat(WNIDS[i] for i in order), f'{home}/../../evil': b'x',
                        f'{home}/ILSVRC2012_validation_ground_truth.txt': lines}, 'w:gz')
    refused('unpack imagenet2012.* --synthetic', data.prepare, 'imagenet2012', tmp_path, whole=True)
    write_tree(root, {f'train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG': 'xx'})  # half of a file
    (root / 'val').mkdir()
    val_tar.rename(root / 'val' / val_tar.name)
    data.unpack_imagenet(tmp_path)
    parts, wnids, _ = data.open_imagenet(tmp_path)
    assert wnids == WNIDS[:5] and parts['train'].labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.decode_tensor(*parts['train'].read(1)).shape == (3, 80, 90)
    assert parts['val'].labels.tolist() == [order[i - 1] for i in truth]
    assert len(data.decode_tensor(*parts['val'].read(5))) == 3
    before = {file: file.stat().st_mtime_ns for file in root.rglob('*.JPEG')}
    data.unpack_imagenet(tmp_path)  # adds nothing
    assert before == {file: file.stat().st_mtime_ns for file in root.rglob('*.JPEG')}
    assert not list(tmp_path.rglob('*evil*')) and not list(tmp_path.rglob('*.part*'))
    (root / 'val/other.jpg').touch()
    refused('nothing says the class of other.jpg', data.open_imagenet, tmp_path)
    (root / 'val/other.jpg').unlink()
    (root / 'ILSVRC2012_devkit_t12/data/meta.mat').write_bytes(b'x' * 128 + b'\x0fdamaged')
    refused('meta.mat cannot be read', data.open_imagenet, tmp_path)
    (root / 'val' / WNIDS[0]).mkdir()  # sorted by somebody, who was stopped
    refused('only 0 images in them. Delete .*val', data.unpack_imagenet, tmp_path, whole=True)
    (root / 'val' / val_tar.name).rename(val_tar)
    shutil.rmtree(root)
    for archive in archives:
        os.truncate(archive, 700)
    refused('is damaged .*Fetch it again', data.unpack_imagenet, tmp_path)


VAL = ['n00000003', 'n00000001', 'n00000003', 'n00000007']  # the classes of ILSVRC2012_val_00000001 and on
FLAT_VAL = {f'val/ILSVRC2012_val_{i:08}.JPEG': '' for i in range(1, 5)}
SORTED_VAL = {f'{wnid}/{Path(name).name}': '' for wnid, name in zip(VAL, FLAT_VAL, strict=True)}
TRAIN = {f'train/{wnid}/{wnid}_{i}.JPEG': '' for wnid in sorted({*VAL}) for i in range(2)}
TRUTH = {'ILSVRC2012_validation_ground_truth.txt': ''.join(f'{int(wnid[1:]) + 1}\n' for wnid in VAL)}
KIT = {'meta.mat': meta_mat(ALL_WNIDS)} | TRUTH
KAGGLE = below('Data/CLS-LOC', TRAIN | FLAT_VAL) | {
    f'Annotations/CLS-LOC/{name[:-4]}xml': '' for name in TRAIN}
CSV = {'LOC_val_solution.csv': 'ImageId,PredictionString\r\n' + ''.join(
    f'ILSVRC2012_val_{i:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \r\n' for i, wnid in enumerate(VAL, 1))}
TREES = {  # below --data-dir, and whether the order of all 1000 classes is known
    'kit': (below('imagenet2012', TRAIN | FLAT_VAL | below('ILSVRC2012_devkit_t12/data', KIT)), True),
    'kit beside, lines of Windows': (below('imagenet2012', TRAIN | FLAT_VAL) | below(
        'ILSVRC2012_devkit_t12/data', KIT | {k: x.replace('\n', '\r\n') for k, x in TRUTH.items()}), True),
    'val alone': (below('imagenet2012', FLAT_VAL | KIT), True),
    'kaggle moved': (below('imagenet2012', below('ILSVRC', KAGGLE) | CSV), False),
    'kaggle, csv beside': (below('imagenet2012', TRAIN | FLAT_VAL) | CSV, False),
    'kaggle linked': (below('kaggle', below('ILSVRC', KAGGLE) | CSV) | {
        'imagenet2012': Path('kaggle/ILSVRC/Data/CLS-LOC')}, False),
    'integers, kit': (below('imagenet2012', FLAT_VAL | KIT | {f'train/{i}/.keep': '' for i in range(1000)} | {
        f'train/{int(wnid[1:])}/{i}.JPEG': '' for wnid in {*VAL} for i in range(2)}), True),
    'names of hubs': (below('imagenet2012', TRAIN | {
        f'val/ILSVRC2012_val_{i:08}_{wnid}.JPEG': '' for i, wnid in enumerate(VAL, 1)}), False),
    'train flat, folders twice': (below('imagenet2012', below('val/val', SORTED_VAL) | {
        f'train/train/{Path(name).name}': '' for name in TRAIN}), False),
    'empty folders': (below('imagenet2012', TRAIN | below('val', SORTED_VAL) | {
        f'train/{wnid}/.keep': '' for wnid in ALL_WNIDS}), True),
}


@pytest.mark.parametrize('layout', TREES)
def test_layouts_of_imagenet(tmp_path, layout):
    files, known = TREES[layout]
    write_tree(tmp_path, files)
    clutter(tmp_path)
    parts, wnids, _ = data.open_imagenet(tmp_path)
    assert wnids == (ALL_WNIDS if known else sorted({*VAL}))
    of_val = {re.search(rb'val_\d+', name)[0]: wnids[label] for name, label in zip(
        parts['val'].names.tolist(), parts['val'].labels.tolist(), strict=True)}
    assert [of_val[name] for name in sorted(of_val)] == VAL
    if layout != 'val alone':
        assert [wnids[label] for label in parts['train'].labels] == sorted([*{*VAL}] * 2)
    if known:  # few classes, but each has its place among all
        load(tmp_path, batch=4, trained_elsewhere=True)
    else:
        refused('has 3 of the 1000 classes .*unpack', load, tmp_path, batch=4, trained_elsewhere=True)
        load(tmp_path, batch=4)  # but good for a trial
    if layout == 'val alone':  # these are the originals: nothing is to be deleted
        refused('no images of imagenet2012 for train.$', load, tmp_path, batch=4)
    if layout in ('kit', 'names of hubs'):
        shutil.rmtree(tmp_path / 'imagenet2012/train/n00000003')
        refused('imagenet2012: val has images of 1 classes that no ', load, tmp_path, batch=4)


def test_integer_folders_have_the_names_of_their_labels(tmp_path):
    for part in ('train', 'val'):
        write_tree(tmp_path / 'imagenet2012' / part, {f'{i}/a.JPEG': '' for i in range(1000)})
    parts, names, about = data.open_imagenet(tmp_path)
    assert names == [str(i) for i in range(1000)] and about == 'imagenet2012, classes are the integers'
    for images in parts.values():
        assert [names[label] for label in images.labels] == [
            os.fsdecode(name).split('/')[0] for name in images.names.tolist()]


def test_test_sets_of_imagenet(imagenet):
    """Integer folders are classes 0, 1, 10, 2 and not 0, 1, 2, 3; few classes restrict the logits to them."""
    import imagenet2012
    refused('holds 55 of 1281167 .* in 11 of 1000', data.prepare, 'imagenet2012', imagenet, whole=True)
    evals = load(imagenet)[1]
    assert list(evals) == ['val', 'IN-V2', 'IN-R']
    assert evals['IN-V2'].images.labels.tolist() == [0, 1, 10, 2] and evals['IN-V2'].absent is None
    assert evals['IN-R'].images.labels.tolist() == [1, 1, 2, 2]
    logits = torch.full((4, 1000), 5.0)
    logits[:, 1] = 1.0
    accuracy, nll = imagenet2012.evaluate(torch.nn.Identity(), lambda x: logits, evals['IN-R'], runs.Ranks())
    restricted = F.cross_entropy(torch.tensor([[1.0, 5.0]] * 4), torch.tensor([0, 0, 1, 1]))
    assert accuracy == 0.5 and nll == pytest.approx(restricted.item())
    refused('n00000002 ', data.label_images, *data.list_images(imagenet / 'imagenet-r'), WNIDS[:2], 2, 4)
    numbered = data.EncodedImages('x', np.array([b'a', b'b']), np.array([0, 1]))
    assert data.label_images(['0', '10'], numbered, ALL_WNIDS, 2, 2).labels.tolist() == [0, 10]
    refused('x has the folders 0 to 1, .* by wnids', data.label_images, ['0', '1'], numbered, ALL_WNIDS, 2, 2)


def test_optional_test_sets_never_stop_a_run(imagenet, tmp_path, capsys):
    (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
    shutil.copy(imagenet / 'meta.mat', tmp_path)
    class_folders(tmp_path / 'imagenet-sketch/sketch', WNIDS[:2], 1)
    class_folders(tmp_path / 'imagenet-a', ['n99999999'], 1)
    (tmp_path / 'imagenet-r').mkdir()
    write_tree(tmp_path, {'imagenetv2-matched-frequency-format-val/a.jpeg': ''})
    _, evals, about, _ = load(tmp_path)
    assert list(evals) == ['val', 'IN-Sketch'] and evals['IN-Sketch'].images.labels.tolist() == [0, 1]
    assert f'decoded by {data.jpeg_decoder()[0]}' in about
    left_out = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in left_out] == ['IN-V2', 'IN-R', 'IN-A']
    restricted = load(imagenet, device='meta')[1]['IN-R']
    absent = restricted.absent
    assert absent.device.type == 'meta' and absent.dtype == torch.bool  # where the logits are
    assert pickle.loads(pickle.dumps(restricted)).absent is None  # loader processes keep off the device


def test_the_list_of_files_follows_the_folders_and_is_whole_or_not_there(tmp_path, monkeypatch):
    class_folders(tmp_path / 'train', WNIDS[:2], 2)

    def full(file, **arrays):
        file.write(b'half')
        raise OSError('No space left')
    with monkeypatch.context() as patch:
        patch.setattr(np, 'savez', full)
        assert len(data.list_images(tmp_path / 'train')[1]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ['train']
    classes, images = data.list_images(tmp_path / 'train')
    assert (tmp_path / 'train-index.npz').exists()
    classes_again, again = data.list_images(tmp_path / 'train')
    assert classes_again == classes and again.path == images.path
    assert np.array_equal(again.names, images.names) and np.array_equal(again.labels, images.labels)
    folder = tmp_path / 'train' / WNIDS[1]
    (folder / 'new.JPEG').touch()
    assert len(data.list_images(tmp_path / 'train')[1]) == 5
    before = folder.stat()
    (folder / 'more.JPEG').touch()
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))  # as tar does, or shutil.copytree
    assert len(data.list_images(tmp_path / 'train')[1]) == 6
    (tmp_path / 'train-index.npz').write_bytes(b'damaged')
    assert len(data.list_images(tmp_path / 'train')[1]) == 6


@pytest.mark.parametrize('short_side', [None, 64])
def test_pack(imagenet, tmp_path, short_side):
    (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
    files = data.open_imagenet(tmp_path)[0]
    data.pack_imagenet(tmp_path, short_side)
    packed, wnids, about = data.open_imagenet(tmp_path)
    assert wnids == ALL_WNIDS and 'packed' in about
    for part in ('train', 'val'):
        assert np.array_equal(packed[part].labels, files[part].labels)
        for i in range(len(files[part])):
            (a, path), (b, where) = files[part].read(i), packed[part].read(i)
            assert Path(path).name == Path(where).name
            if part == 'val' or not short_side:
                assert a == b
            else:
                assert min(data.decode_tensor(b, '').shape[1:]) == 64
    refused('is there already', data.pack_imagenet, tmp_path)
    os.truncate(tmp_path / 'imagenet2012-pack/train.bin', 500)
    refused('train.bin has 500 bytes', data.open_imagenet, tmp_path)
    index = tmp_path / 'imagenet2012-pack/train.npz'
    index.write_bytes(index.read_bytes()[:100])
    refused('is damaged .*Delete it', data.open_imagenet, tmp_path)
    index.unlink()
    index.symlink_to('/proc/self/mem')  # what a disk may do when it is read: the pack may be good
    refused(r'cannot be read .*Input/output error\)\.$', data.open_imagenet, tmp_path)


def test_data_report_and_preview(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'here').symlink_to(small)
    monkeypatch.setitem(data.SETS, 'Own', data.SETS['CIFAR10_x32'])
    write_tree(small, {'imagenet2012/lost+found/train/n01/a.jpg': ''})  # which a user may not read
    main('data.py', '--data-dir=~/here')
    shutil.rmtree(small / 'imagenet2012')
    report = capsys.readouterr().out
    assert re.search(r'CIFAR10_x32 +40,960 +9,040 .*ready', report) and 'downloaded when needed' in report
    assert re.search('^Own .* a set of your own$', report, re.M)
    assert re.search('^imagenet2012 .* needs train/ and val/', report, re.M)
    sheet, old = tmp_path / 'sheet.png', tmp_path / 'old.png'
    sheet.touch(), os.link(sheet, old)
    main('data.py', 'preview', 'CIFAR10_x32', sheet, '--data-dir', small)
    assert Image.open(sheet).size == (1072, 1168) and not old.read_bytes()  # renamed, not overwritten
    write_tree(tmp_path, {data.ARCHIVES[1]: 'no archive'})  # of which tarfile says several lines
    for file, problem in ((tmp_path / 'no' / 'a.png', "No such file.*/a.png'$"),
                          (sheet / 'a.png', "Not a directory.*/a.png'$"), ('.', "'.'$")):
        refused(problem, main, 'data.py', 'preview', 'CIFAR10_x32', file, '--data-dir', small)
    assert not list(tmp_path.glob('*.part.*')) and not list(Path().glob('*.part.*'))
    refused('is damaged', main, 'data.py', 'unpack', 'imagenet2012', '--data-dir', tmp_path)
    says(run('data.py', 'CIFAR11', ok=2), 'no data set CIFAR11', 'CIFAR10_x32')
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    assert f'in {tmp_path}/\\xe9/\n' in run('data.py', '--data-dir', tmp_path / 'é')
    monkeypatch.setattr(data, 'report', lambda folder: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match='^130$'):
        main('data.py')


# ---- nothing in a file is run ----

def test_checkpoints_and_batches_run_nothing(tmp_path, monkeypatch):
    """Nor does what is no batch get further."""
    monkeypatch.chdir(tmp_path)
    torch.save({'config': {}, 'net': {'weight': Evil()}}, 'a.pt')
    refused('a.pt cannot be read as a checkpoint .*holds objects', runs.read_checkpoint, Path('a.pt'), {})
    for content in (
            pickle.dumps({'data': Evil(), 'labels': []}), pickle.dumps(np.array([Evil()], object)),
            npz(data=np.array([Evil()], object), labels=[1]), b'', b'\x80\x04x',
            pickle.dumps({'labels': [1]}), pickle.dumps({'data': np.zeros((1, 9), np.uint8), 'labels': [1]}),
            pickle.dumps({'data': np.zeros((1, 3072), np.uint8), 'labels': [0]})):
        path = tmp_path / ('batch.npz' if content[:2] == b'PK' else 'batch')
        path.write_bytes(content)
        refused('is not a downsampled ImageNet batch' + ' .*allow_pickle' * (content[:2] == b'PK'),
                data.read_batch, path, 32)
    assert not Path('evil').exists()


# ---- damaged files ----

def damaged(content, others, rng):
    """Bytes with flipped bits, with a random stretch, cut off, with a piece left out, or of another file."""
    at = int(rng.integers(len(content)) if rng.integers(2) else rng.integers(min(200, len(content))))
    at = len(content) - 1 - at if rng.integers(2) else at  # half of them near the ends, where the headers are
    flipped = bytearray(content)
    for i in [at, *rng.integers(len(content), size=rng.integers(4))]:
        flipped[i] ^= 1 << int(rng.integers(8))
    kinds = (bytes(flipped), content[:at] + rng.bytes(9) + content[at + 9:], content[:at],
             content[:at] + content[at + int(rng.integers(1, 100)):], others[rng.integers(len(others))])
    return kinds[rng.integers(len(kinds))]


def test_damaged_files_are_refused(tmp_path, monkeypatch, recwarn):
    """The same 25 of each kind or, in the long form, $LONG_FORM others. What is read after all is right where
    the format has a checksum."""
    count, memory = os.environ.get('LONG_FORM'), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, name = np.random.default_rng(None if count else 0), 'TinyImageNet200_x64'
    config, path = {'depth': 20}, Path('tiny-imagenet-200.zip')  # whatever is in it
    monkeypatch.chdir(tmp_path)
    state = {'net': {f'layer{i}': torch.randn(20, 30) for i in range(9)}, 'run': {'rows': [(1, 2.0)]}}
    runs.write_checkpoint(Path('a.pt'), config=config, **state)
    torch.save({'config': Evil()}, 'evil.pt')
    bomb = b'\x80\x02}r\xff\xff\xff\x07.'  # item 2 ** 27 of the memo: of 2 GB, if it is a table

    def checkpoint():
        read = runs.read_checkpoint(path, config)
        assert read['run'] == state['run'] and read['net'].keys() == state['net'].keys()
        assert all(torch.equal(tensor, state['net'][name]) for name, tensor in read['net'].items())

    def batch():
        pixels, labels = data.read_batch(path, 32)
        assert pixels.dtype == np.uint8 and pixels.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == np.int64 and (labels >= 0).all() and (labels < 1000).all()

    def jpeg():
        pixels = np.asarray(data.decode(path.read_bytes(), path))
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3

    def images():
        shutil.rmtree(name, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            data.prepare(name, tmp_path)
        return {(image.tobytes(), label) for arrays in data.read_arrays(name, tmp_path / name)[:2]
                for image, label in zip(arrays.images.numpy(), arrays.labels.tolist(), strict=True)}

    def archive():
        assert images() <= all_images
    path.write_bytes(TINY_ZIP)
    all_images = images()
    originals = {
        checkpoint: Path('a.pt').read_bytes(), batch: pickle.dumps(batch_file(rng, 5, 32), protocol=3),
        archive: TINY_ZIP, jpeg: encoded(picture(rng, 120, 150))}
    others = [*originals.values(), pickle.dumps(Evil()), pickle.dumps({'data': Evil(), 'labels': [1]}), b'',
              bomb, Path('evil.pt').read_bytes()]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('a damaged file kept its reader busy for 20 s'))
    for read, original in originals.items():
        outcomes = collections.Counter()
        contents = [*others, *(damaged(original, others, rng) for _ in range(int(count or 25)))]
        for i, content in enumerate(contents):
            path.write_bytes(content)
            signal.alarm(20)
            try:
                read()
                outcomes['read'] += i >= len(others)
            except data.UserError:
                outcomes['refused'] += i >= len(others)
            finally:  # after any other error it is there to look at, in tmp_path
                signal.alarm(0)
        print(f'{read.__name__}: {dict(outcomes)}')
        assert outcomes['refused'] > 5, read
    assert not Path('evil').exists()
    assert not any('pickle' in str(warning.message) for warning in recwarn)  # a sentence is enough
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10 ** 6  # kB


# ---- the numbers are those of the logs ----

RUN = Path('logs', 'CIFAR10_x32', 'resnet_20x1-iter_1k-wd_0.0010-bf16', '1', '20261122-204359.log')


@pytest.fixture
def repository(tmp_path):
    """A copy of what git tracks (runs of your own do not count), or of everything where there is no git."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=HERE, capture_output=True, text=True)
    if listed.returncode:
        ignore = shutil.ignore_patterns('.venv', 'datasets', '*.last.pt', '*.prev.pt', '__pycache__')
        shutil.copytree(HERE, tmp_path, ignore=ignore, dirs_exist_ok=True)
    for name in filter(None, listed.stdout.split('\0')):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name)
    return tmp_path


def test_pages_are_current(repository):
    assert tables.check(repository) == []
    for name in ('mine', 'CIFAR10_x32-synthetic', 'CIFAR10_x32-incomplete'):  # of copies and parts: stay out
        (repository / 'logs' / name / '1').mkdir(parents=True)
        shutil.copy(repository / RUN, repository / 'logs' / name / '1')
    assert tables.check(repository) == []


def test_a_log_that_contradicts_itself_is_found(repository):
    path = repository / RUN
    text, page = path.read_text(), (repository / 'logs' / 'README.md').read_bytes()
    unfinished = text[:text.index('val    acc')]
    *_, row_600, _, _, row_900, row_1000 = [line for line in unfinished.splitlines() if line.strip()]
    of_result = [(f' {old}', f' {old.split("=")[0]}={new}', f'{old.split("=")[0]}={new}, ') for old, new in (
        ('val_acc=0.7211', 0.7311), ('val_nll=0.7758', 0.7), ('best_iter=1000', 900), ('iters=1000', 2000),
        ('tst_acc=0.7140', 0.7141), ('params=272474', 272475), ('wd=0.001', 0.002), ('seed=1', 4),
        ('hours=0.097', 0.07), ('iter_per_min=172', 372), ('img_per_s=810', 1810))]
    of_result += [
        (' tst_nll=0.8019', '', 'tst_nll=None, '), (' best_iter=1000', '', 'best_iter=None, '),
        (' tst_acc=', ' in_acc=0.9 tst_acc=', 'in_acc=0.9, the lines below the rows None'),
        (' world=1', ' world=2', 'the last start 1 x AMD'), (' world=1', '', 'the last start 1 x AMD'),
        (' device="AMD EPYC', ' device="AMD', 'device=AMD, 2 threads, '),
        (row_1000, '', 'every 100 updates, each once, up to 1000'),
        (' hours=0.097', '', 'hours=nan, '), (' hours=0.097', ' hours=x', 'could not convert'),
        (' seed=1', ' seed=1 seed=1', 'each key once'), (' threads" torch', ' thr', 'each key once'),
        ('RESULT', 'RESULT x\nRESULT', 'the RESULT line cannot be read'),
        ('2.15.0+cu132\n', '2.15.0+cu132\nresumed at update 1000 on 1 x GPU\n', 'is not the last one')]
    of_all = [
        ('\nwidth                 : 1', '\nwidth                 : 2', 'resnet.py 1080090'),
        ('\nwd                    : 0.001', '\nwd                    : 0.002', 'it belongs in CIFAR10_x32'),
        ('\nlr                    : 0.1', '\nlr                    : x', 'could not convert'),
        ('\nmomentum              : 0.9', '\nmomentum              : 0.5', "is not the recipe's"),
        ('depth                 : 20\n', '', "incomplete ('depth')"),
        ('command ', 'commend ', "incomplete ('command')"),
        ('\n    500', '\n   x500', 'every 100 updates, each once'),
        (row_900, f'{row_900}\n{row_900}', 'every 100 updates, each once'),
        (row_1000, row_1000[:-2], 'row 1000 is not marked'), (row_600, f'{row_600} *', 'row 600 is marked')]
    for whole, cases in ((text, of_result + of_all), (unfinished, of_all)):
        for old, new, words in cases:
            head, found, tail = whole.rpartition(old)
            assert found, old
            path.write_text(head + new + tail)
            problems = tables.check(repository)
            assert any(problem.startswith(f'{path}: ') and words in problem for problem in problems), words
    assert tables.check(repository, write=True) and (repository / 'logs' / 'README.md').read_bytes() == page
    path.write_text(re.sub(r'^ +[13579]00 .*\n', '', unfinished, flags=re.M))  # means of another length
    assert any('every 100 updates, each once' in problem for problem in tables.check(repository))
    for good in (text, unfinished, unfinished.replace(row_1000, ''), unfinished[:unfinished.index('\n\n')]):
        path.write_text(good)
        assert not [problem for problem in tables.check(repository) if str(path) in problem]
    shutil.move(path, path.parents[1] / '2')
    assert any(f'{RUN.parts[-3]}/1' in problem for problem in tables.check(repository))
    renamed = (path.parents[1] / '2' / path.name).rename(path.with_name('1.log'))
    assert f'{renamed}: its name is not the time of its start' in ' '.join(tables.check(repository))


def test_logs_of_today_and_of_long_and_resumed_runs_are_accepted(whole, repository):
    path = repository / RUN
    text = path.read_text()
    for old, new in (('1 x AMD EPYC, 2 threads', '2 x GPU'), (' 0:05:48', ' 1 day, 0:05:48'),
                     ('hours=0.097', 'hours=24.097'),
                     ('   1000 ', 'resumed at update 900 on 1 x AMD EPYC, 2 threads; torch 2, '
                                  'commit 1; from the previous checkpoint: x.last.pt was missing\n   1000 ')):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    for log, logs in ((whole.log, whole.logs), (path, repository / 'logs')):
        assert list(tables.contradictions(tables.read_log(log), logs)) == []


def test_a_page_that_is_wrong_is_found_and_written_again(repository, monkeypatch):
    shift = str.maketrans('0123456789', '1234567890')
    for name, figures in (('README.md', (r'\*\*0\.\d{4}\*\*', r'[\d.]+ % (?:higher|lower)')),
                          ('logs/README.md', (r'\*\*0\.\d{4}\*\*', r'\| 0\.\d{3} \|', r'bf16 +\d+'))):
        path, heading = repository / name, '## Results'
        text = path.read_text()
        wrong = [(found := re.search(figure, text)[0], found.translate(shift), found) for figure in figures]
        wrong += [(heading, f'{heading}\n{link}', words) for link, words in (
            ('[x](no.md)', 'no.md is dead'), ('[x](#no)', '#no is dead'), ('![x](no.png)', 'no.png is dead'))]
        for old, new, words in wrong:
            path.write_text(text.replace(old, new, 1))
            assert [words in problem for problem in tables.check(repository)] == [True], words
        path.write_text(text.replace(heading, f'{heading}\n[a](#results) [b](README.md) [c](https://x.org)'))
        assert tables.check(repository) == []
        path.write_text(text.replace(*wrong[0][:2], 1))
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(Path, 'replace', None)  # it dies before the new page is there
            tables.check(repository, write=True)
        assert path.read_text() == text.replace(*wrong[0][:2], 1)
        assert tables.check(repository, write=True) == [] and path.read_text() == text
        path.write_text(text.replace('<!-- end of results -->', ''))
        refused('end of results', tables.check, repository)
        path.write_text(text)
    (repository / RUN).unlink()
    assert any('disagrees' in problem for problem in tables.check(repository))


def made(seed=1, stamp='1', rows=((1000, 1.9), (2000, 1.2)), stopped=False, **changed):
    """A run of R20x1, of the schedule of its row."""
    log = tables.read_log(HERE / RUN)
    changed = dict(iters='48000', precision='fp32', seed=str(seed)) | changed
    result = {key: value for key, value in (log.result | changed).items() if value}
    header = log.header | {key: value for key, value in changed.items() if key in log.header}
    return SimpleNamespace(path=Path('/logs/CIFAR10_x32/run', str(seed), f'{stamp}.log'), header=header,
                           rows=[dict(iter=str(it), trn_loss=str(loss)) for it, loss in rows],
                           result=None if stopped else result, devices=changed.get('device', log.devices))


def cells(markdown):
    titles, _, *rest = [line[2:-2].split(' | ') for line in markdown.splitlines() if line.startswith('|')]
    return [dict(zip(titles, line, strict=True)) for line in rest]


def beside(dataset, *logs):
    """(lines of the table of a data set, lines of the table of other runs)"""
    lines, others = tables.make_lines(tables.read_reference(HERE / 'logs'), logs)
    return (cells(tables.data_set_table([line for line in lines if line[0]['dataset'] == dataset])),
            cells(tables.runs_table(others)) if others else [])


def test_the_reference_is_what_it_was():
    rows = tables.read_reference(HERE / 'logs')
    assert len(rows) == 42 and [row['source'] for row in rows].count('seed') == 36
    for row in rows:
        assert row['curve'].keys() == {str(it) for it in range(1000, int(row['iters']) + 1, 1000)} or (
            row['source'] == 'later' and not row['curve'])
        if row['curve'] and (row['dataset'], row['depth']) != ('CIFAR10_x32', '56'):  # it is of update 45000
            best = max(float(point['val_acc']) for point in row['curve'].values())
            assert best == pytest.approx(float(row['val_acc']), abs=6e-4)


def test_runs_stand_beside_the_row_of_their_net_and_schedule():
    lines, others = beside(
        'CIFAR10_x32', made(), made(precision='bf16', depth='32'), made(depth='18', precision='bf16'),
        made(depth='110', val_acc='0.78'), made(depth='56', iters='24000'), made(depth='44', lr='0.2'),
        made(depth='44', batch='128'), made(depth='44', wd='0.002'), made(depth='110', seed=5, stopped=True))
    found = [(line['net, parameters'][:5], line['precision'], line['log by seed'] != '') for line in lines]
    assert found == [
        ('R20x1', 'fp32 / **fp32**', True), ('R20x2', 'fp32', False), ('R20x4', 'fp32', False),
        ('R32x1', 'fp32 / **bf16**', True), ('R44x1', 'fp32', False), ('R56x1', 'fp32', False),
        ('R18x1', 'fp32', False), ('R18x1', 'fp16 / **bf16**', True)]
    assert [line['val'] for line in lines[:2]] == ['0.923 / **0.7211**', '0.947']
    assert [f'{line["net"]}: {line["settings"]}' for line in others] == [
        'R110x1, fp32: 48000 updates, batch 256, lr 0.1, wd 0.001',
        'R56x1, fp32: 24000 updates, batch 256, lr 0.1, wd 0.001',
        'R44x1, fp32: 48000 updates, batch 256, lr 0.2, wd 0.001',
        'R44x1, fp32: 48000 updates, batch 128, lr 0.1, wd 0.001',
        'R44x1, fp32: 48000 updates, batch 256, lr 0.1, wd 0.002']
    assert others[0]['ours'] == 'val 0.7800, tst 0.7140' and 'reference' not in others[0]
    lines, _ = beside('CIFAR10_x32', made(depth='18'))  # fp32 where the reference has both
    assert [line['precision'] for line in lines[-2:]] == ['fp32 / **fp32**', 'fp16']


def test_means_over_seeds_and_which_of_two_runs_counts():
    lines, _ = beside(
        'CIFAR10_x32', made(2, val_acc='0.93'), made(1, val_acc='0.92'), made(10, val_acc='0.94'),
        made(1, stamp='0', val_acc='0.1'), made(1, stamp='2', stopped=True),
        made(1, device='another', val_acc='0.91'))
    assert lines[0]['val'] == '0.923 / **0.9300 ± 0.0100**'
    assert lines[0]['tst'] == '0.924 / **0.7140 ± 0.0000**'
    assert re.findall(r'\[(\d+)\]\((\S+?)\)', lines[0]['log by seed']) == [
        (seed, f'CIFAR10_x32/run/{seed}/1.log') for seed in ('1', '2', '10')]
    assert lines[1]['val'] == '0.923 / **0.9100**' and len(lines) == 9


def test_runs_that_were_stopped_are_compared_row_by_row():
    lines, others = beside(
        'CIFAR10_x32', made(1, stopped=True, rows=[(1000, 1.9), (1500, 1.4), (2000, 1.3), (2500, 1.1)]),
        made(2, stopped=True, rows=[(1000, 2.0)]),
        made(2, stamp='2', stopped=True, rows=[(1000, 1.959), (2000, 'inf')]),  # fp16 skipped an update
        made(2, stamp='3', stopped=True, rows=[(1000, 1.959)], device='another'))
    mean = (1.9 / 1.959 * 1.3 / 1.198) ** 0.5  # the reference's are 1.959 and 1.198
    titles = 'updates', 'trn loss, reference / ours', 'mean ratio'
    assert [(line['log by seed'][:3], *(line[title] for title in titles)) for line in lines[:4]] == [
        ('[1]', '**2500**', '1.198 / **1.3000**', f'**{mean:.3f}**'),
        ('[2]', '**2000**', '1.959 / **1.9590**', '**1.000**'),
        ('[2]', '**1000**', '1.959 / **1.9590**', '**1.000**'), ('', '', '', '')]
    assert lines[0]['val'] == '0.923' and not others


def test_tables_have_nine_columns_none_of_them_empty():
    assert tables.markdown([]) == ''
    large = dict(dataset='imagenet2012', depth='50', batch='2048', iters='64000', lr='0.8', wd='0.0001')
    full = made(**large, precision='fp16', val_acc='0.76', inv2_acc='0.64', tst_acc='', tst_nll='',
                rows=[(64000, 1.0)])
    for dataset in {row['dataset'] for row in REFERENCE}:
        for logs in ([], [full], [made(dataset=dataset, stopped=True)]):
            lines, _ = beside(dataset, *logs)
            assert len(lines) == len([row for row in REFERENCE if row['dataset'] == dataset])
            assert len(lines[0]) <= 9 and all(any(line[title] for line in lines) for title in lines[0])
            assert not re.search('(^| )[-–—]+( |$)', ' | '.join(' | '.join(line.values()) for line in lines))
    lines, _ = beside('imagenet2012', full)
    assert [line['net, parameters, batch, reference on'] for line in lines if line['log by seed']] == [
        'R50x1, 25.56M, 2048, 8x RTX 3090', 'R50x1, 25.56M, 2048, 8x TPUv3']
    assert lines[3]['IN'] == '0.765 / **0.7600**'  # IN is val
    assert lines[3]['other test sets'] == 'IN-V2 0.641 / **IN-V2 0.6400**'


def test_what_the_landing_page_says():
    full = made(val_acc='0.92', tst_acc='0.93', hours='0.5', rows=((1000, 2.1549), (2000, 1.198)))
    lines, _ = tables.make_lines(tables.read_reference(HERE / 'logs'), [full, made(depth='32', stopped=True)])
    full, stopped = (line for line in lines if line[1])
    says(tables.on_finished(*full), 'R20x1 on CIFAR10_x32 (fp32, 1 x AMD', '0.50 hours', '**0.9300**',
         'reference 0.924', 'within 10.0 %', 'all 2 rows', '4.9 % higher')
    says(tables.on_stopped([stopped]), 'Runs not finished: 1. Their training losses over the first 2000')
    assert tables.on_stopped([]) == ''
    line, = cells(tables.runs_table([full]))
    assert line['reference'] == 'val 0.923, tst 0.924' and line['ours'] == 'val 0.9200, tst 0.9300'
    assert line['hours'] == '0.50' and not {'settings', 'weights'} & line.keys()


def test_the_landing_page_shows_the_newest_run_of_a_row(monkeypatch):
    logs = [made(1, '20261126', device='A'), made(2, '20260101', device='A'), made(1, '20260601', device='B')]
    monkeypatch.setattr(tables, 'read_logs', lambda *_: (logs, []))
    page = tables.make(HERE)[0]['README.md']['results']
    assert [line['device'] for line in cells(page)] == ['A']
    assert 'without a run yet: CIFAR100_x32, ' in page


def published(root):
    return [root / line[2:] for line in tables.make(root)[0]['.gitignore']['weights'].splitlines()]


def test_published_weights_pass_gitignore_and_no_others(repository):
    def git(*words):
        return subprocess.run(['git', *words], cwd=repository, capture_output=True, text=True).stdout
    assert sorted(published(repository)) == sorted(repository.rglob('*.pt'))  # git tracks these
    for path in repository.rglob('*.pt'):
        path.unlink()
    assert tables.check(repository, write=True) == []
    git('init', '-q')
    log = repository / re.search(r'\]\((logs/\S+\.log)\)', README)[1]  # of a finished run beside a row
    weights, *others = paths = [*(log.with_suffix(f'.{kind}.pt') for kind in ('best', 'last', 'prev')),
                                repository / RUN.with_suffix('.best.pt')]
    for size, passes in ((5_000_000, True), (5_000_001, False)):
        for path in paths:
            path.write_bytes(bytes(size))
        assert any('.gitignore disagrees' in problem for problem in tables.check(repository))
        assert tables.check(repository, write=True) == []
        assert (weights in published(repository)) == passes
        assert git('check-ignore', *paths).split() == [*map(str, others if passes else paths)]
        link = f']({weights.relative_to(repository).as_posix()})'
        assert (link in (repository / 'README.md').read_text()) == passes


def test_published_weights_give_the_figures_of_their_logs(whole, small, repository, capsys):
    """Of those whose data set is at hand; the last ones are of a run made for the tests."""
    for path in [*published(repository), whole.path('best')]:
        log = tables.read_log(path.with_name(path.name.replace('.best.pt', '.log')))
        config = torch.load(path, weights_only=True)['config']
        for key in ('depth', 'width', 'seed', 'params', 'iters', 'dataset'):
            assert str(config[key]) == log.header[key]
        dataset = config['dataset'].removesuffix('-incomplete')
        best = [row for row in log.rows if row['best']][-1]
        shape = {key: config[key] for key in ('depth', 'width', 'image_size', 'num_classes', 'mean', 'std')}
        same = {'trn_images': 204, 'labels_crc32': config['labels_crc32']}  # published ones lack the first
        origin = runs.load_weights(resnet.ResNet(**shape), path, shape, same)
        assert origin == (f'weights of {config["dataset"]}, update {best["iter"]}: val acc {best["val_acc"]} '
                          'in training')
        folder = small if dataset != config['dataset'] else HERE / 'datasets'
        if (folder / dataset).exists():
            main(f'{dataset.lower()}.py', '--depth', config['depth'], '--width', config['width'],
                 '--precision', 'fp32', '--device', 'cpu', '--eval', path, '--data-dir', folder)
            printed = capsys.readouterr().out
            assert printed.startswith(f'{origin}\n')
            for name in ('val', 'tst'):
                figures = re.search(rf'^{name} +acc (\S+) +nll (\S+)', printed, re.M).groups()
                logged = [float(log.evals[f'{name}_{key}']) for key in ('acc', 'nll')]
                assert [*map(float, figures)] == pytest.approx(logged, abs=1e-3)


def test_curves(repository, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'matplotlib.figure', None)  # as if it were not installed
        refused('python -m pip install matplotlib', tables.plot, repository)
    pytest.importorskip('matplotlib')
    before = {*(repository / 'logs').glob('curves-*.png')}
    for path in before:
        os.link(path, path.with_suffix('.old'))
    assert tables.plot(repository) == []
    pictures = {*(repository / 'logs').glob('curves-*.png')}
    assert pictures == before and repository / 'logs' / 'curves-CIFAR10_x32.png' in before
    assert not any(path.samefile(path.with_suffix('.old')) for path in pictures)  # each is drawn anew
    assert all(path.stat().st_size < 150_000 and Image.open(path).size[0] > 900 for path in pictures)


def test_table_prints_its_tables_or_its_help(capsys):
    main('logs/table.py')
    assert '### CIFAR10_x32' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--plot'):
        main('logs/table.py', '--draw')


def test_a_run_learns_and_its_log_is_complete(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SETS, 'CIFAR10_x32', data.SETS['CIFAR10_x32'] | dict(val=500, test=500))
    trial = Trial(tmp_path, 'cifar10_x32.py', '--synthetic', '--iters', 40, '--batch', 64, '--lr', 0.1)
    trial.main()
    text, table, fields = trial.text, trial.rows, result(trial.text)
    *_, dataset, name, seed, _ = trial.log.parts
    assert dataset == 'CIFAR10_x32-synthetic' and seed == '42'
    assert name.startswith('resnet_20x1-batch_64-iter_40-wd_0.0010')
    assert [int(row[0]) for row in table] == list(range(4, 41, 4))
    assert float(table[-1][2]) < 2.0 < float(table[0][2]) and float(table[-1][4]) > 0.3, text
    assert fields['tst_acc'] == re.search(r'^tst +acc (\S+)', text, re.M)[1] > '0.3'
    for run in (trial, whole):  # with ties
        best = max(run.rows, key=lambda row: float(row[4]))
        assert result(run.text)['val_acc'] == best[4] and best[-1] == '*'
        assert result(run.text)['best_iter'] == best[0]
    assert len({row[4] for row in whole.rows}) < len(whole.rows)
    assert fields.keys() == set(
        'dataset depth width seed params batch iters lr wd precision best_iter val_acc val_nll tst_acc '
        'tst_nll iter_per_min img_per_s hours world device torch'.split())
    for source in ('cifar10_x32.py', 'resnet.py', 'data.py', 'logs/run.py'):
        digest = hashlib.sha256((HERE / source).read_bytes()).hexdigest()
        assert re.search(rf'^sha256 {Path(source).name} *: {digest}$', text, re.M), source
    assert max(len(line) for line in text.splitlines() if line[:7].strip().isdigit()) <= 110


@pytest.mark.skipif(not shutil.which('git'), reason='needs git')
def test_the_commit_in_the_header_is_that_of_the_sources(tmp_path, monkeypatch):
    def git(*words):
        who = '-c', 'user.name=x', '-c', 'user.email=x', '-c', 'commit.gpgsign=false'
        subprocess.run(['git', *who, *words], check=True, cwd=tmp_path)
    monkeypatch.setattr(runs, 'ROOT', tmp_path)
    tracked, copy = tmp_path / 'tracked.py', tmp_path / 'copy.py'
    tracked.touch(), copy.touch()
    (tmp_path / '.gitignore').write_text('copy.py')  # such a file is clean in the eyes of git
    assert runs.commit([tracked]) == 'unknown'
    git('init', '-q'), git('add', 'tracked.py'), git('commit', '-qm', 'x')
    name = runs.commit([tracked])
    assert re.fullmatch('[0-9a-f]{7,}', name) and runs.commit([tracked, copy]) == f'{name}, with changes'
    tracked.write_text('changed')
    assert runs.commit([tracked]) == f'{name}, with changes'


def test_torchvision_weights_are_evaluated_as_torchvision_does(imagenet, tmp_path, capsys):
    from torchvision.models import resnet18
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
    torch.manual_seed(0)
    net = resnet18().eval()
    torch.save(net.state_dict(), tmp_path / 'resnet18.pth')
    usual = Compose([Resize(256), CenterCrop(224), ToTensor(),
                     Normalize(*(data.IMAGENET_PIXELS[k] for k in ('mean', 'std')))])
    files = sorted((imagenet / 'imagenet2012/val').rglob('*.JPEG'))
    with torch.no_grad():
        logits = net(torch.stack([usual(Image.open(file)) for file in files]))
    labels = torch.tensor([WNIDS.index(file.parent.name) for file in files])
    trial = Trial(tmp_path, 'imagenet2012.py', '--data-dir', imagenet, '--precision', 'fp32', '--batch', 8,
                  '--device', 'cpu', '--workers', 0, '--eval', tmp_path / 'resnet18.pth')
    trial.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f'weights of {tmp_path}/resnet18.pth\n') and len(printed.splitlines()) == 5
    accuracy, nll = re.search(r'^val +acc (\S+) +nll (\S+) +22 images', printed, re.M).groups()
    assert float(accuracy) == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    assert float(nll) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=2e-3)
    refused('does not fit --depth', trial.main, '--depth', 34)


def test_weights_are_found_wherever_they_are_in_a_file(tmp_path, recwarn):
    theirs, ours, path = network(20, 1, 32).state_dict(), network(20, 1, 32), tmp_path / 'x.pth'
    prefixes = '', 'module.', '_orig_mod.', 'module._orig_mod.', 'model.'  # the last one is Lightning's
    wraps = (dict, lambda w: {'state_dict': w, 'config': {'lr': 0.1}},
             lambda w: {'model': {'net': w}, 'config': 'resnet20', 'epoch': 3})
    averaged = 'module.', lambda w: {'n_averaged': torch.tensor(3)} | w
    for prefix, wrap in [*itertools.product(prefixes, wraps), averaged]:
        torch.save(wrap({prefix + name: tensor for name, tensor in theirs.items()}), path)
        for tensor in ours.state_dict().values():
            tensor.fill_(7)
        runs.load_weights(ours, path, dict(depth=20), {'trn_images': 9})
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items()), prefix
    for content in ({}, {'epoch': 3}, {1: {2: 3}}, {'state': {}, 'param_groups': []}):
        torch.save(content, path)
        refused('x.pth .*nothing in it is called conv1.weight', runs.load_weights, ours, path, dict(depth=20),
                {})
    copy = torch.nn.ModuleDict({'backbone': ours, 'head': torch.nn.Linear(2, 2)})
    config = dict(depth=20, dataset='Own', labels_crc32='0a')
    torch.save(dict(config=config, net=copy.state_dict(), it=3, val_acc=0.5), path)
    copy.head.weight.data.zero_()
    origin = 'weights of Own, update 3: val acc 0.5000 in training'
    here = {'trn_images': 8, 'labels_crc32': '0a'}  # the checkpoint is an older one, without the first
    assert runs.load_weights(copy, path, dict(depth=20), here) == origin
    others = runs.load_weights(copy, path, dict(depth=20), here | {'labels_crc32': '0b'})  # another order
    assert others == f'{origin}; trained on other images, or in another order of images or classes ' \
                     '(labels_crc32 0a, here 0b)'
    torch.save(dict(config=config | {'trn_images': 9}, net=copy.state_dict()), path)  # a last.pt
    others = runs.load_weights(copy, path, dict(depth=20), here)
    assert 'x.pth; trained on other images' in others and others.endswith('(trn_images 9, here 8)')
    nothing = {'trn_images': 0, 'labels_crc32': '0b'}  # the labels of val alone
    assert runs.load_weights(copy, path, dict(depth=20), nothing) == f'weights of {path}'
    assert copy.head.weight.any() and not recwarn


# ---- nets, recipes, speed ----

REFERENCE = list(csv.DictReader((HERE / 'logs' / 'reference.csv').read_text().splitlines()))


def network(depth, width, size, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3):
    return resnet.ResNet(depth, width, size, classes, mean, std)


def test_parameter_counts_of_all_reference_rows():
    for row in REFERENCE:
        facts = data.SETS[row['dataset']]
        with torch.device('meta'):
            net = network(int(row['depth']), int(row['width']), facts['size'], facts['classes'])
        assert resnet.parameters(net) == int(row['params']), row


@pytest.mark.parametrize('name', [*(f'resnet{depth}' for depth in (18, 34, 50, 101, 152)), 'wide_resnet50_2'])
@torch.no_grad()
def test_torchvision_weights_both_ways(name):
    from torchvision.models import get_model
    depth, width = re.search(r'resnet(\d+)_?(\d*)', name).groups()
    theirs = get_model(name)
    ours = network(int(depth), int(width or 1), 224, 1000, **data.IMAGENET_PIXELS)
    for tensor in theirs.state_dict().values():  # running statistics and biases too: none may be left out
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.4, 0.6)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(data.IMAGENET_PIXELS[k]).view(3, 1, 1) for k in ('mean', 'std'))
    expected = theirs.eval()((images / 255 - mean) / std)
    assert (ours.eval()(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_initial_values():
    for depth, last in ((20, 'bn2'), (50, 'bn3')):
        net = network(depth, 2, 32)
        assert not net.fc.weight.any() and not net.fc.bias.any()
        for name, parameter in net.named_parameters():
            if name.endswith(f'{last}.weight'):
                assert not parameter.any(), name
            elif parameter.ndim == 4 and parameter.numel() > 5000:
                std = (2 / parameter[0].numel()) ** 0.5
                assert parameter.std().item() == pytest.approx(std, rel=0.05), name
                assert parameter.abs().max() > 3 * std, name  # normal, not uniform
            elif name.endswith('weight') and 'bn' in name:
                assert (parameter == 1).all(), name


def test_running_statistics():
    norm, x = resnet.BatchNorm(3), torch.randn(16, 3, 5, 5) * 2 + 1
    usual = torch.nn.BatchNorm2d(3, eps=1e-5, momentum=0.1)
    assert torch.equal(usual(x), norm(x))
    assert torch.allclose(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


@pytest.mark.parametrize('size,side', [(32, 8), (64, 16), (224, 14)])
def test_logits_are_float32_and_layer_shapes(size, side):
    net, shapes = network(20, 1, size, 7), []
    net.layer3.register_forward_hook(lambda module, _, output: shapes.append((output.shape, output.dtype)))
    with torch.autocast('cpu', torch.bfloat16):
        logits = net(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert shapes == [((2, 64, side, side), torch.bfloat16)]
    assert logits.dtype == torch.float32 and logits.shape == (2, 7)


def test_the_table_of_networks_and_unknown_ones(capsys):
    resnet.main()
    table = capsys.readouterr().out
    assert '272,474' in table and '25,557,032' in table and '4089.2' in table  # as torchvision documents
    for shape in ((19, 1, 32), (20, 0, 32), (20, 1, 48)):
        with pytest.raises(ValueError, match='choose from|1 or more'):
            network(*shape)


def script_parts(name):
    """The docstring, the imports, the recipe and the tail of a script."""
    text = (HERE / f'{name}.py').read_text()
    return re.fullmatch('(""".*?"""\n)(.*?)(# ---- recipe: .*?)(# ==== identical .*)', text, re.S).groups()


def test_scripts_are_short_and_differ_in_docstring_and_recipe_only():
    _, *first = script_parts('cifar10_x32')
    assert not re.search('cifar|imagenet', first[2], re.I) and 'if DATASET' not in first[2]
    for name in SCRIPTS:
        parts = script_parts(name)
        assert sum(len(part.splitlines()) for part in parts) <= 260, name
        for ours, theirs in ((first[0], parts[1]), (first[2], parts[3])):
            diff = difflib.unified_diff(ours.splitlines(), theirs.splitlines(), 'cifar10_x32.py', name, n=0)
            assert theirs == ours, '\n'.join([*diff][:10] + ['python test_smoke.py --sync repairs this'])
        # the same constants in the same order
        assert re.findall(r'^(\w+) = ', parts[2], re.M) == (
            'DATASET DEPTH WIDTH SEED BATCH ITERS LR MOMENTUM WEIGHT_DECAY WARMUP EVAL_EVERY '
            'PRECISION').split()
    for function in re.split('^def ', first[2], flags=re.M):
        assert len(re.sub('\n+', '\n', function).splitlines()) <= 135, function[:40]


def test_recipes_give_every_reference_row(monkeypatch):
    """With --batch alone, which rescales learning rate and updates."""
    modules = {module.DATASET: module for module in map(importlib.import_module, SCRIPTS)}
    for row, flags in [*((row, ()) for row in REFERENCE),
                       (dict(REFERENCE[0], lr='0.3', iters='7'), ('--lr', '0.3', '--iters', '7'))]:
        module = modules[row['dataset']]
        monkeypatch.setattr(sys, 'argv', ['', '--batch', row['batch'], *flags])
        args = module.parse_args()
        assert args.lr == pytest.approx(float(row['lr'])) and args.iters == int(row['iters'])
        assert args.wd == float(row['wd']) and args.seed == 42
        assert module.MOMENTUM == 0.9 and module.EVAL_EVERY == 1000
        assert module.WARMUP == 0.1 and module.PRECISION == 'fp16'
        first = next(other for other in REFERENCE if other['dataset'] == row['dataset'])
        assert (module.DEPTH, module.WIDTH) == (int(first['depth']), int(first['width']))
    assert {row['batch'] for row in REFERENCE} > {'256', '1024', '4096'}


def test_learning_rate():
    import cifar10_x32
    rates = [cifar10_x32.lr_at(it, 48000, 0.1) for it in range(48000)]
    assert rates[0] == 0
    for end, mean in ((1000, '1.041e-02'), (5000, '9.332e-02'), (6000, '9.992e-02'), (24000, '6.047e-02'),
                      (48000, '4.413e-05')):
        assert f'{sum(rates[end - 1000:end]) / 1000:.3e}' == mean


def test_updates_are_those_of_plain_sgd(trial, monkeypatch):
    """Momentum 0.9, weight decay of every parameter, the learning rate of lr_at."""
    import cifar10_x32
    step, done = torch.optim.SGD.step, []

    def checked(self, *args, **options):
        net = [p for group in self.param_groups for p in group['params']]
        before = [(p.clone(), p.grad.clone(), self.state[p]['momentum_buffer'].clone()) for p in net]
        step(self, *args, **options)
        lr = cifar10_x32.lr_at(len(done), 6, 0.05)
        for p, (old, grad, momentum) in zip(net, before, strict=True):
            assert torch.allclose(p, old - lr * (0.9 * momentum + grad + 0.1 * old), atol=1e-7), len(done)
        done.append(sum(p.numel() for p in net))
    monkeypatch.setattr(torch.optim.SGD, 'step', checked)
    trial.main('--iters', 6, '--wd', 0.1)
    assert done == [272474] * 6


def test_seed_and_precision_are_those_of_the_flags(trial, monkeypatch):
    seen, batches, features = set(), data.TrainBatches.batches, resnet.ResNet.features

    def watched(self, images):
        seen.add(self.conv1(images.float()).dtype)
        return features(self, images)
    monkeypatch.setattr(resnet.ResNet, 'features', watched)
    monkeypatch.setattr(data.TrainBatches, 'batches', lambda trn, it: seen.add(trn.seed) or batches(trn, it))
    weights = []
    for seed, precision, dtype in ((42, 'fp32', torch.float32), (1, 'bf16', torch.bfloat16),
                                   (2, 'fp16', torch.float16)):
        other = trial.but('--seed', seed, '--precision', precision, '--iters', 1, logs=trial.logs / str(seed))
        other.main()
        weights.append(other.weights['conv1.weight'])
        assert seen == {seed, dtype}
        seen.clear()
    assert (weights[0] - weights[1]).abs().max() > 0.1


def test_a_copy_is_changed_in_one_place_each(trial, mine):
    """Rows less often than every 5000 updates, AdamW, another first convolution, label smoothing: such a copy
    trains, is stopped and resumed, and its weights are those of a copy that was not."""
    sgd = re.search(r' {4}optimizer = .*?zeros_like\(p\)\n', (HERE / SHORT[0]).read_text(), re.S)[0]
    assert len(sgd.splitlines()) == 4
    script = mine(
        ('EVAL_EVERY = 1000 ', 'EVAL_EVERY = 6000 '),
        (sgd, '    optimizer = torch.optim.AdamW(net.parameters(), 0.0, weight_decay=args.wd)\n'),
        ('    net = ResNet(**shape).to(device)\n', '    net = ResNet(**shape)\n'
         '    net.conv1 = torch.nn.Conv2d(3, 16, 5, padding=2, bias=False)\n    net.to(device)\n'),
        ('loss = F.cross_entropy(logits, labels)\n',
         'loss = F.cross_entropy(logits, labels, label_smoothing=0.1)\n'))
    copy = trial.but('--iters', 10, script=script)
    copy.stop(4)
    (HERE / script).write_text((HERE / script).read_text() + '# later\n')
    copy.main('--resume')
    assert f'; changed since the start: {script}; 1 ranks x' in copy.text
    again = copy.but(logs=trial.logs.with_name('again'))
    again.main()
    copy.same_as(again)
    assert copy.resumed == [5] and (0, 'exp_avg') in copy.weights
    assert copy.weights['conv1.weight'].shape == (16, 3, 5, 5)
    assert copy.log.parts[-4] == f'{Path(script).stem}-incomplete'  # not the original's folder
    assert re.search('^commit +: (unknown|.*, with changes)$', copy.text, re.M)
    assert runs.speed([(0, 0.0, 0.0, 0.0), (6000, 60.0, 10.0, 0.0), (12000, 180.0, 20.0, 11.0)]) == (
        50, 6000 / 110, 0.1)


def test_no_update_reads_a_value(trial, monkeypatch):
    """Fake tensors hold no values: .item(), float() or `if` on a loss, which would wait for a GPU, raise."""
    def end():
        raise KeyboardInterrupt
    monkeypatch.setattr(runs.Ranks, 'check_signals', lambda ranks: None)  # it reads a value of the CPU
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with pytest.raises(KeyboardInterrupt), contextlib.ExitStack() as stack:
        trial.main('--synthetic', '--batch', 16, '--accum', 2, '--iters', 60, '--precision', 'bf16',
                   at={1: lambda: stack.enter_context(fake), 3: end})


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_update_waits_for_the_gpu(tmp_path, mine):
    first, last = '            for group in optimizer.param_groups', '            it += 1\n'
    strict = "            torch.cuda.set_sync_debug_mode('error' if it > 2 else 0)\n"
    script = mine((first, strict + first), (last, last + '            torch.cuda.set_sync_debug_mode(0)\n'))
    for flags in (['--precision', 'fp16'], ['--precision', 'fp32', '--no-compile'], ['--accum', 2]):
        run(script, '--synthetic', '--iters', 20, *flags, '--log-dir', tmp_path)
    for path in tmp_path.rglob('*.best.pt'):  # for everybody
        assert all(t.is_cpu for t in torch.load(path, weights_only=True)['net'].values())


def test_compile_is_the_default_only_where_triton_can_be_built(monkeypatch):
    def no_compiler():
        raise RuntimeError('Failed to find C compiler')
    for there, backend, known, able in ((False, str, True, False), (True, no_compiler, True, False),
                                        (True, str, False, False), (True, str, True, True)):
        monkeypatch.setattr('torch.utils._triton.has_triton', lambda there=there: there)
        monkeypatch.setattr('torch.utils._triton.triton_backend', backend)
        monkeypatch.setattr('torch._dynamo.is_dynamo_supported', lambda known=known: known)
        assert runs.can_compile() is able


def test_cuda_graphs_stand_in_the_header(trial, monkeypatch):
    """They are made where they gain, and work: of small images, on one rank, without --accum."""
    for device, accum, world, size, variable, made in (
            ('cuda', 1, 1, 64, None, True), ('cuda', 1, 1, 64, '0', False), ('cuda', 1, 1, 224, '1', False),
            ('cuda', 2, 1, 32, '1', False), ('cuda', 1, 2, 32, '1', False), ('cpu', 1, 1, 32, '1', False)):
        with monkeypatch.context() as patch:
            patch.setenv('TORCHINDUCTOR_CUDAGRAPHS', variable or '1')
            if variable is None:
                patch.delenv('TORCHINDUCTOR_CUDAGRAPHS')
            assert runs.cuda_graphs(SimpleNamespace(device=device, accum=accum), world, size) is made
    options = []
    monkeypatch.setattr(torch, 'compile', lambda function, **given: options.append(given) or function)
    for made, said in ((True, 'True, CUDA graphs'), (False, 'True')):
        graphs = trial.but(logs=trial.logs / said)
        with monkeypatch.context() as patch:
            for module in (runs, importlib.import_module('cifar10_x32')):
                patch.setattr(module, 'cuda_graphs', lambda args, world, size, made=made: made)
            graphs.stop(0, '--compile')
        assert options == 2 * [dict(dynamic=False, options={'triton.cudagraphs': made})]
        assert re.search(f'^compile +: {said}$', graphs.text, re.M)
        options.clear()


def test_bench_measures_ours_and_the_usual_style(monkeypatch, capsys):
    from logs import bench
    monkeypatch.setattr(bench, 'CUDA', False)
    monkeypatch.setattr(bench, 'DEVICE', 'cpu')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert [bench.net(text) for text in ('18x1', '20x4:64', '50x1@224:16')] == [
        (18, 1, 32, 256), (20, 4, 32, 64), (50, 1, 224, 16)]
    monkeypatch.setitem(bench.DATASETS, 64, 'none')  # what fails is NaN, and the rest goes on
    with pytest.raises(SystemExit, match='1'):
        main('logs/bench.py', '20x1@64', '20x1:64', '--ours', '--turns', 1, '--updates', 2)
    out, error = capsys.readouterr()
    *_, head, failed, row = (line.split() for line in out.splitlines())
    assert failed[5:] == ['nan'] * 6 and 'this failed' in error and 'none.py' in error
    assert head[:2] == ['net', 'px'] and row[:4] == ['20x1', '32', '64', 'ours']
    iter_per_min, img_per_s, wait, start, memory, limit = map(float, row[5:])
    assert img_per_s == pytest.approx(iter_per_min * 64 / 60, abs=1.1) and 0 <= limit < 150
    assert 0 <= wait < 100 and 1 < start < 600 and 200 < memory < 20000
    bench.usual(20, 1, 32, 64, 3)  # in rows like those of our logs
    usual = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in usual] == ['1', '2', '3']
    assert all(len(row) == 11 and float(row[7]) > 0 and 0 <= float(row[8]) <= 100 for row in usual)
    with pytest.raises(SystemExit, match='2'):
        main('logs/bench.py', '19x1')
    assert '19x1 is no net like 20x1' in capsys.readouterr().err


def test_bench_measures_the_loader(imagenet, monkeypatch, capsys):
    monkeypatch.setattr(data, 'usable_cores', lambda: 1)
    threads = torch.get_num_threads()
    main('logs/bench.py', 'imagenet2012', '--turns', 1, '--data-dir', imagenet)
    torch.set_num_threads(threads)
    table = re.findall(r'^(decode|decode, crop, flip|loader, 1 processes) +(\d+) +(\d+) +([\d.]+)$',
                       capsys.readouterr().out, re.M)
    assert len(table) == 3 and all(float(a) / float(b) == pytest.approx(float(r), rel=0.05, abs=0.02)
                                   for _, a, b, r in table)
    refused('needs train/ and val/', main, 'logs/bench.py', 'imagenet2012', '--data-dir', imagenet / 'no')
    refused('by itself', main, 'logs/bench.py', 'imagenet2012', '20x1', '--data-dir', imagenet)
    monkeypatch.setattr(data.EncodedImages, '__len__', lambda images: 31)
    refused('has 31 images', main, 'logs/bench.py', 'imagenet2012', '--data-dir', imagenet)


# ---- README.md ----

README = (HERE / 'README.md').read_text()


def test_readme_commands_run(imagenet, tmp_path, capsys):
    """Every command but the first two, which set the tests up; training is short, on generated images."""
    short = f'--depth 20 --width 1 --synthetic --iters 1 --batch 16 --device cpu --log-dir {tmp_path}'.split()
    (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
    blocks = [block for kind, block in re.findall(r'^```(\w*)\n(.*?)^```', README, re.M | re.S) if not kind]
    commands = [line for block in blocks[1:] for line in block.splitlines()]
    commands += re.findall(r'srun .*?\.venv/bin/(.*)"', README)
    inline = [' '.join(command.split()) for command in re.findall(r'`((?:python|cp|diff) [^`]+)`', README)]
    assert len(commands) > 3 and len(inline) > 3 and len(blocks[0].splitlines()) == 2
    for command in inline:
        assert (HERE / command.split()[1]).exists(), command
    for command in commands + [command for command in inline if ' pack ' in command]:
        assert 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1' in command or '--max-restarts' not in command
        program, *words = re.sub(r'^(?:\w+=1 )?torchrun (--\S+ (?:[^-\s]\S* )?)*', 'python ', command).split()
        assert program == 'python', command
        shutil.rmtree(tmp_path / 'imagenet2012-pack', ignore_errors=True)
        main(*words, *(['--data-dir', tmp_path] if words[0] == 'data.py' else short))
        assert 'RESULT' in capsys.readouterr().out or words[0] == 'data.py', command


def test_readme_weights_in_few_lines(monkeypatch):
    lines = re.search(r'^```python\n(import.*?)^```', README, re.M | re.S)[1]
    monkeypatch.chdir(HERE)
    names = {}
    exec(lines, names)
    assert names['logits'].shape == (8, 10) and not names['net'].training
    assert torch.equal(names['net'].fc.bias, names['checkpoint']['net']['fc.bias'])


def test_readme_is_a_landing_page_and_names_tests_that_exist():
    prose = re.sub(r'<!-- results.*?end of results -->', '', README, flags=re.S)  # runs may be added
    assert len(prose.splitlines()) <= 160
    assert re.search(r'\*\*0\.\d+\*\*', README[:README.index('```')])  # a figure of ours comes first
    named = set(re.findall(r'`(test_[a-z_]+)`', README))
    assert len(named) > 15 and named <= globals().keys()


def test_readme_copy_for_your_own_data(trial, tmp_path, monkeypatch, mine):
    recipe = re.search(r'^```python\n(DATASET.*?)^```', README, re.M | re.S)[1]
    assert len(recipe.splitlines()) <= 10
    for which, count in (('train', 2500), ('test', 600)):
        save_arrays(tmp_path / 'Flowers', which, *(array[:count] % 5 for array in arrays(2500)))
    own = trial.but('--iters', 4, '--data-dir', tmp_path, script=mine(("DATASET = 'CIFAR10_x32'\n", recipe)))
    with monkeypatch.context() as patch:
        patch.setattr(data, 'SETS', dict(data.SETS))
        patch.delenv(data.INCOMPLETE)
        own.main()
    assert own.log.parts[-4] == Path(own.command[0]).stem and '2000 trn, 500 val, 600 tst' in own.text
    assert result(own.text)['dataset'] == 'Flowers'


def sync():
    _, imports, _, tail = script_parts('cifar10_x32')
    for name in SCRIPTS[1:]:
        docstring, _, recipe, _ = script_parts(name)
        (HERE / f'{name}.py').write_text(docstring + imports + recipe + tail)


if __name__ == '__main__':
    match sys.argv[1:]:
        case ['--sync']:
            sync()
        case ['--kill' | '--fuzz' as form, number]:
            os.environ['LONG_FORM'] = number
            function = 'kill_test' if form == '--kill' else 'test_damaged_files_are_refused'
            sys.exit(pytest.main([__file__, '-qs', '-o', f'python_functions={function}']))
        case _:
            sys.exit(__doc__)
