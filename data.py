"""The data sets: what they are, how they are prepared, and batches of them on the device.

    python data.py                             what is on disk, the sizes of the splits, what is missing
    python data.py CIFAR10_x32                 prepares one set (the scripts do it themselves when needed)
    python data.py preview CIFAR10_x32 a.png   draws augmented training images with their labels

All take --data-dir (default: datasets). A prepared set is a folder <NAME>/ with {train,test}_images.npy
(uint8, N x S x S x 3) and {train,test}_labels.npy (int64, N): four such files of your own are used as they
are. Beside them classes.txt (a name per line) and about.txt (where the arrays came from) are optional.

Order and augmentation are pure functions of the seed, the iteration and the position in the global batch:
the same for any number of ranks and from any iteration on, so there is no loader state to save.
"""
import argparse
import contextlib
import io
import mmap
import os
import pickle
import queue
import shutil
import socket
import sys
import threading
import time
import urllib.error
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError

IMAGENET_PIXELS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR10_PIXELS = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100_PIXELS = dict(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))

# size: pixels a side. train: images to train on, the first of the training file. val: images to select on,
# the rest of the training file, or the test file where test is 0. mean, std: RGB on the 0..1 scale.
SETS = {
    'CIFAR10_x32': dict(size=32, classes=10, train=40960, val=9040, test=10000, **CIFAR10_PIXELS),
    'CIFAR100_x32': dict(size=32, classes=100, train=40960, val=9040, test=10000, **CIFAR100_PIXELS),
    'TinyImageNet200_x32': dict(size=32, classes=200, train=81920, val=18080, test=10000, **IMAGENET_PIXELS),
    'TinyImageNet200_x64': dict(size=64, classes=200, train=81920, val=18080, test=10000, **IMAGENET_PIXELS),
    'ImageNet1k_x32': dict(size=32, classes=1000, train=1281167, val=50000, test=0, **IMAGENET_PIXELS),
    'ImageNet1k_x64': dict(size=64, classes=1000, train=1281167, val=50000, test=0, **IMAGENET_PIXELS),
}
FILES = 'train_images.npy', 'train_labels.npy', 'test_images.npy', 'test_labels.npy'
INCOMPLETE = 'ALLOW_INCOMPLETE_DATA'  # environment variable: accept a part of a set, split in proportion
PAD = 4  # pixels of zeros on each side before the random crop
SHIFTS = 2 * PAD + 1
IGNORE = -100  # label of the images that fill up the last evaluation batch; cross_entropy passes over it


class UserError(Exception):
    """What the user can put right: the message says what and how; programs print it and exit with 2."""


def incomplete_allowed():
    return os.environ.get(INCOMPLETE, '') not in ('', '0')


# ---- batches ----

def augmentation_plan(seed, epoch, n):
    """The order of n images in an epoch and a draw for each position: int64 tensors of n, draws below 162."""
    rng = np.random.default_rng((seed, epoch))
    return torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.integers(SHIFTS * SHIFTS * 2, size=n))


def augment(images, draws):
    """Zero-pads by 4, crops at random to the old size and flips half of the images.

    Args:
        images: uint8, N x S x S x 3. draws: int64, N, below 162 = 9 rows x 9 columns x 2 flips.
    Returns:
        uint8, N x 3 x S x S, in channels_last memory format.
    """
    n, size = images.shape[:2]
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # N x 9 x 9 x 3 x S x S, a view
    shift = draws // 2
    crops = windows[torch.arange(n, device=images.device), shift // SHIFTS, shift % SHIFTS]
    flipped = (draws % 2 == 1).view(n, 1, 1, 1)
    return torch.where(flipped, crops.flip(3), crops).contiguous(memory_format=torch.channels_last)


def forget(tensor):
    """Drops a mapped file's pages from this process (the system still caches them): memory stays flat."""
    mapping = getattr(tensor, 'mapping', None)
    if mapping is not None and hasattr(mmap, 'MADV_DONTNEED'):
        mapping.madvise(mmap.MADV_DONTNEED)


class TrainBatches:
    """Training batches of one rank, endlessly, from any iteration on.

    Args:
        images: uint8, N x S x S x 3, and labels: int64, N: on the device, or in (mapped) host memory.
        batch: images in a global batch; rank r takes positions r * batch / world and up.
        seed: of order and augmentation. device: where the batches are wanted. rank, world: of the processes.
    """

    def __init__(self, images, labels, batch, seed, device, rank=0, world=1):
        self.images, self.labels, self.seed, self.device = images, labels, seed, torch.device(device)
        self.batch, self.rank, self.world = batch, rank, world
        self.per_epoch = len(images) // batch  # the ragged last batch is dropped
        if self.per_epoch == 0:
            raise UserError(f'--batch {batch} is more than the {len(images)} training images.')

    def __len__(self):
        return len(self.images)

    def batches(self, start):
        """Yields uint8 images N x 3 x S x S and int64 labels N, N = batch / world, from iteration `start`."""
        chunks = self._chunks(start)
        if self.images.device.type != self.device.type:
            chunks = ahead(chunks)
        for chunk in chunks:
            images, labels, draws = (t.to(self.device, non_blocking=True) for t in chunk)
            local = self.batch // self.world
            yield from zip(augment(images, draws).split(local), labels.split(local), strict=True)

    def _chunks(self, start):
        """Images, labels and draws of several batches at once: fewer and larger operations."""
        local = self.batch // self.world
        steps_at_once = max(1, min(16, 2 ** 24 // (local * self.images[0].numel())))
        epoch, step = divmod(start, self.per_epoch)
        while True:
            plan = torch.stack(augmentation_plan(self.seed, epoch, len(self)))
            plan = plan[:, :self.per_epoch * self.batch].view(2, self.per_epoch, self.world, local)
            plan = plan[:, :, self.rank].to(self.images.device, non_blocking=True)
            for first in range(step, self.per_epoch, steps_at_once):
                order, draws = plan[:, first:first + steps_at_once].flatten(1)
                yield self.images.index_select(0, order), self.labels.index_select(0, order), draws
                forget(self.images)
            epoch, step = epoch + 1, 0


def ahead(chunks):
    """Takes from `chunks` in a thread, two in advance and in pinned memory, while the device works."""
    ready, closed = queue.Queue(2), threading.Event()

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work():
        try:
            for chunk in chunks:
                if closed.is_set():
                    return
                put([t.pin_memory() if torch.cuda.is_available() else t for t in chunk])
        except BaseException as error:  # handed over to the thread that takes the batches
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()


class EvalBatches:
    """An evaluation set in batches of one fixed size; over all ranks every image comes exactly once.

    Rank r takes images r, r + world, ... All ranks yield equally many batches; the last is filled up with
    black images of label -100, which cross_entropy ignores and no argmax equals. Arguments as for
    TrainBatches, but batch is that of one rank.
    """

    def __init__(self, images, labels, batch, device, rank=0, world=1):
        self.images, self.labels, self.batch, self.device = images, labels, batch, torch.device(device)
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        """Yields uint8 images N x 3 x S x S (channels_last) and int64 labels N."""
        for first in range(self.rank, len(self) + self.rank, self.batch * self.world):
            mine = slice(first, first + self.batch * self.world, self.world)
            images, labels = (t[mine].to(self.device, non_blocking=True) for t in (self.images, self.labels))
            if missing := self.batch - len(labels):
                images = F.pad(images, (0,) * 7 + (missing,))
                labels = F.pad(labels, (0, missing), value=IGNORE)
            yield images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), labels
            forget(self.images)


def load(name, data_dir, batch, eval_batch, seed, device, rank=0, world=1, synthetic=False):
    """Training batches and evaluation sets of a prepared data set.

    Arrays that take less than half of the free GPU memory are put there; others stay in mapped files.

    Args:
        name: a key of SETS. data_dir: the folder that holds <name>/. batch: images in a global batch.
        eval_batch: images in one rank's evaluation batch. synthetic: generated images, nothing on disk.
    Returns:
        (TrainBatches, {'val': EvalBatches, 'tst': the same if there is a test set}, str: their origin)
    Raises:
        UserError: when the files are missing, damaged or not those of this set.
    """
    if synthetic:
        train, test, about = *synthetic_arrays(name, batch), 'generated images, to try things out with'
    else:
        train, test, about = read_arrays(name, Path(data_dir) / name)
    device = torch.device(device)
    if device.type != 'cpu':
        size = sum(t.nbytes for t in train + test)
        if device.type != 'cuda' or size < torch.cuda.mem_get_info(device)[0] / 2:
            train, test = [t.to(device) for t in train], [t.to(device) for t in test]
    facts, n = SETS[name], len(train[0])
    if facts['test']:
        n = n * facts['train'] // (facts['train'] + facts['val'])
        held_out = {'val': [part(t, slice(n, None)) for t in train], 'tst': test}
    else:
        held_out = {'val': test}
    evals = {key: EvalBatches(*arrays, eval_batch, device, rank, world) for key, arrays in held_out.items()}
    train = [part(t, slice(n)) for t in train]
    return TrainBatches(*train, batch, seed, device, rank, world), evals, about


def part(tensor, rows):
    piece = tensor[rows]
    piece.mapping = getattr(tensor, 'mapping', None)
    return piece


def synthetic_arrays(name, batch):
    """Learnable images of a set's size and classes: coarse coloured patterns, one a class, under noise.

    Returns: (images, labels) to train on and (images, labels) to test on, as in prepared files.
    """
    facts, rng = SETS[name], np.random.default_rng(0)
    size, classes, count = facts['size'], facts['classes'], 5120 if facts['size'] <= 64 else 640
    patterns = rng.integers(128, size=(classes, 4, 4, 3), dtype=np.uint8)
    parts = []
    for n in (max(count, batch * 5 // 4), count // 5):
        labels = rng.integers(classes, size=n)
        images = patterns[labels].repeat(size // 4, 1).repeat(size // 4, 2)
        images += rng.integers(64, size=images.shape, dtype=np.uint8)
        images += rng.integers(64, size=images.shape, dtype=np.uint8)
        parts.append([torch.from_numpy(images), torch.from_numpy(labels)])
    return parts


# ---- prepared arrays ----

def read_arrays(name, folder, remedy=None):
    """Maps and checks a prepared set: ([images, labels] of train, the same of test, str: their origin).

    Raises:
        UserError: names the file that is missing, damaged, or of a wrong shape, type, length or range.
    """
    facts, remedy = SETS[name], remedy or f'Delete {folder} and run the command again to have it made anew.'
    expected = {'train': facts['train'] + (facts['val'] if facts['test'] else 0),
                'test': facts['test'] or facts['val']}
    parts = []
    for which, full in expected.items():
        arrays = []
        for what in ('images', 'labels'):
            file = f'{which}_{what}.npy'
            try:
                arrays.append(np.load(folder / file, mmap_mode='c' if what == 'images' else None))
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f'{name}: {file} cannot be read ({error}). {remedy}') from error
        images, labels = arrays
        shape = (facts['size'], facts['size'], 3)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise UserError(f'{name}: {which}_images.npy holds {images.dtype} {images.shape}, '
                            f'but uint8 {("N", *shape)} is needed.')
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise UserError(f'{name}: {which}_labels.npy holds {labels.dtype} {labels.shape}, '
                            f'but {len(images)} images need int64 ({len(images)},).')
        if len(labels) and not 0 <= labels.min() <= labels.max() < facts['classes']:
            raise UserError(f'{name}: {which}_labels.npy holds labels {labels.min()} to {labels.max()}, '
                            f'but the classes are 0 to {facts["classes"] - 1}.')
        if len(images) != full and not incomplete_allowed():
            raise UserError(f'{name}: {which}_images.npy holds {len(images)} of {full} images. {remedy} '
                            f'{INCOMPLETE}=1 in the environment accepts a part of the set, for a trial.')
        tensors = [torch.from_numpy(images), torch.from_numpy(labels)]
        tensors[0].mapping = images.base
        parts.append(tensors)
    about = folder / 'about.txt'
    return *parts, about.read_text().strip() if about.exists() else 'ready-made arrays'


@contextlib.contextmanager
def new_folder(final):
    """A temporary folder that takes the name `final` in the end: a killed preparation leaves no half set."""
    final.parent.mkdir(parents=True, exist_ok=True)
    owner = f'.{socket.gethostname()}.'
    for old in final.parent.glob(f'{final.name}.part{owner}*') if os.name == 'posix' else ():
        try:
            os.kill(int(old.suffix[1:]), 0)  # does this process live?
        except ProcessLookupError:  # no: its preparation was killed
            shutil.rmtree(old, ignore_errors=True)
    folder = final.with_name(f'{final.name}.part{owner}{os.getpid()}')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for file in FILES:
            with open(folder / file, 'rb+') as f:
                os.fsync(f.fileno())
        try:
            folder.rename(final)
        except OSError:
            if not final.exists():  # or else another process was quicker, and its set is as good
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(name, data_dir):
    """Makes <data_dir>/<name>/ from the official files, downloaded where that is allowed, unless it exists.

    Raises:
        UserError: when files are missing, incomplete or damaged; says which, and where to get them.
    """
    if name not in SETS:
        raise UserError(f'There is no data set {name}: choose from {" ".join(SETS)}.')
    data_dir = Path(data_dir)
    final = data_dir / name
    if not all((final / file).exists() for file in FILES):
        if final.exists():
            missing = ', '.join(file for file in FILES if not (final / file).exists())
            raise UserError(f'{final} lacks {missing}. Add them, or delete the folder to have it made anew.')
        maker = {'CIF': prepare_cifar, 'Tin': prepare_tiny_imagenet, 'Ima': prepare_imagenet1k}[name[:3]]
        try:
            with new_folder(final) as folder:
                maker(name, data_dir, folder)
                read_arrays(name, folder, 'The official files are incomplete: fetch them again.')
        except OSError as error:
            reason = f'{error.filename or data_dir}: {error.strerror or error}'
            raise UserError(f'{name} could not be prepared ({reason}).') from error


def save_arrays(folder, which, images, labels):
    np.save(folder / f'{which}_images.npy', np.ascontiguousarray(images))
    np.save(folder / f'{which}_labels.npy', np.asarray(labels, np.int64))


def describe(folder, about, classes=()):
    (folder / 'about.txt').write_text(about + '\n')
    if classes:
        (folder / 'classes.txt').write_text('\n'.join(classes) + '\n')


class Progress:
    """A line that counts up: twice a second in place on a terminal, every tenth of the way elsewhere."""

    def __init__(self, label, total):
        self.label, self.total, self.start, self.shown = label, total, time.monotonic(), 0

    def __call__(self, done):
        seconds, live = time.monotonic() - self.start, sys.stdout.isatty()
        step = int(seconds * 2) if live else done * 10 // self.total
        if done == self.total or step > self.shown:
            self.shown = step
            left = seconds / done * (self.total - done)
            text = f'{self.label}: {done:,} of {self.total:,}, {left:.0f} s left'
            end = '' if live and done < self.total else '\n'
            print(f'\r{text}\033[K' if live else text, end=end, flush=True)


# ---- preparation ----

def prepare_cifar(name, data_dir, folder):
    """CIFAR-10 and CIFAR-100 in the order of the official files, which torchvision downloads and checks."""
    from torchvision.datasets import CIFAR10, CIFAR100  # imported here: it takes a second
    from torchvision.datasets.utils import check_integrity
    cifar = CIFAR10 if name == 'CIFAR10_x32' else CIFAR100
    source = data_dir / cifar.base_folder
    damaged = [source / file for file, md5 in cifar.train_list + cifar.test_list
               if (source / file).exists() and not check_integrity(str(source / file), md5)]
    try:
        train, test = cifar(data_dir, train=True, download=True), cifar(data_dir, train=False)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        problem = f'{damaged[0]} is damaged (its MD5 differs)' if damaged else f'{name} is not in {data_dir}'
        raise UserError(f'{problem}, and the download failed ({error}). Put {cifar.filename} from '
                        f'{cifar.url} into {data_dir}, or try the script with --synthetic.') from error
    save_arrays(folder, 'train', train.data, train.targets)
    save_arrays(folder, 'test', test.data, test.targets)
    describe(folder, f'{cifar.base_folder}, order and classes of the official files', train.classes)


def decode(data, path, box=None):
    """JPEG bytes -> uint8 H x W x 3, as pillow's convert('RGB') has it; box: side to resize to, box filter.

    EXIF orientation is ignored, as everywhere in ImageNet practice. Raises UserError with the path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # 'Corrupt EXIF data': harmless
            image = Image.open(io.BytesIO(data)).convert('RGB')
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} is damaged ({error}). Fetch it again: no image is ever skipped.') from error
    return np.asarray(image.resize((box, box), Image.BOX) if box else image)


def decode_all(read, paths, file, size, box=False):
    """Decodes `paths` on all cores into a new .npy file, uint8 N x size x size x 3."""
    images = np.lib.format.open_memmap(file, 'w+', np.uint8, (len(paths), size, size, 3))
    progress = Progress(file.stem.replace('_', ' '), len(paths))

    def work(start):
        for i in range(start, min(start + 64, len(paths))):
            image = decode(read(paths[i]), paths[i], size if box else None)
            if image.shape != images.shape[1:]:
                raise UserError(f'{paths[i]} has {image.shape[:2]} pixels, not {(size, size)}.')
            images[i] = image

    # threads: pillow decodes outside of the interpreter lock, and nothing is left behind by a kill
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for i, _ in enumerate(pool.map(work, range(0, len(paths), 64))):
            progress(min(64 * (i + 1), len(paths)))
    finally:
        pool.shutdown(cancel_futures=True)
    images.flush()


def prepare_tiny_imagenet(name, data_dir, folder):
    """TinyImageNet: classes are the sorted wnids, training images in a fixed order, official val as test."""
    if name == 'TinyImageNet200_x32':
        prepare('TinyImageNet200_x64', data_dir)
        source = data_dir / 'TinyImageNet200_x64'
        *parts, about = read_arrays('TinyImageNet200_x64', source)
        for which, (images, labels) in zip(('train', 'test'), parts, strict=True):
            small = np.empty((len(images), 32, 32, 3), np.uint8)
            for i in range(0, len(images), 1000):  # exact 2 x 2 box average, halves rounded up
                four = images[i:i + 1000].numpy().reshape(-1, 32, 2, 32, 2, 3).astype(np.uint16)
                small[i:i + 1000] = (four.sum((2, 4), dtype=np.uint16) + 2) // 4
            save_arrays(folder, which, small, labels)
        names = (source / 'classes.txt').read_text().split('\n') if (source / 'classes.txt').exists() else []
        return describe(folder, f'{about}; 2 x 2 box average', [n for n in names if n])

    root, read, files = tiny_imagenet_source(data_dir)
    missing = f'{root} is incomplete: {{}} is missing. Fetch tiny-imagenet-200.zip again.'

    def lines(file):
        if file not in files:
            raise UserError(missing.format(file))
        return read(file).decode().splitlines()

    wnids = sorted(lines('wnids.txt'))
    train = sorted((f.split('/')[1], f) for f in files if f.startswith('train/') and f.endswith('.JPEG'))
    test = sorted((f'val/images/{row[0]}', row[1])
                  for row in (line.split('\t') for line in lines('val/val_annotations.txt')) if len(row) > 1)
    wanted = [f'train/{w}/images/{w}_{i}.JPEG' for w in wnids for i in range(500)]
    wanted += [f'val/images/val_{i}.JPEG' for i in range(10000)]
    absent = [file for file in wanted if file not in files]
    if absent and not incomplete_allowed():
        raise UserError(missing.format(f'{absent[0]} (with {len(absent) - 1} others)'))
    test = [(file, wnid) for file, wnid in test if file in files]
    label = {wnid: i for i, wnid in enumerate(wnids)}
    unknown = ({wnid for wnid, _ in train} | {wnid for _, wnid in test}) - set(label)
    if unknown or not train or not test:
        reason = f'{min(unknown)} is not in wnids.txt' if unknown else 'train/ or val/ has no images'
        raise UserError(f'{root} is not TinyImageNet: {reason}.')
    train = [train[i] for i in np.random.RandomState(0).permutation(len(train))]  # a stream numpy has frozen
    decode_all(read, [file for _, file in train], folder / FILES[0], 64)
    decode_all(read, [file for file, _ in test], folder / FILES[2], 64)
    np.save(folder / FILES[1], np.array([label[wnid] for wnid, _ in train], np.int64))
    np.save(folder / FILES[3], np.array([label[wnid] for _, wnid in test], np.int64))
    words = dict(line.split('\t', 1) for line in lines('words.txt') if '\t' in line)
    describe(folder, 'tiny-imagenet-200, classes are the sorted wnids, training images in a fixed order',
             [f'{wnid} {words.get(wnid, "")}'.strip() for wnid in wnids])


def tiny_imagenet_source(data_dir):
    """tiny-imagenet-200/ or else the zip, downloaded if need be: (path, function to read a file, files)."""
    root, archive = data_dir / 'tiny-imagenet-200', data_dir / 'tiny-imagenet-200.zip'
    if root.exists():
        files = {p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file()}
        return root, lambda file: (root / file).read_bytes(), files
    if not archive.exists():
        from torchvision.datasets.utils import download_url
        url = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip'
        part = f'{archive.name}.part{os.getpid()}'
        try:
            download_url(url, str(data_dir), part, '90528d7ca1a48142e341f4ef8d21d0de')
        except (OSError, RuntimeError, urllib.error.URLError) as error:
            (data_dir / part).unlink(missing_ok=True)
            raise UserError(f'TinyImageNet is not in {data_dir}, and the download failed ({error}). Put '
                            f'{url} there, or try the script with --synthetic.') from error
        (data_dir / part).rename(archive)
    zipped = open_zip(archive)
    files = {n.removeprefix('tiny-imagenet-200/') for n in zipped.namelist() if not n.endswith('/')}
    return archive, lambda file: read_member(zipped, f'tiny-imagenet-200/{file}'), files


def open_zip(path):
    """A zip file whose members all lie inside of their folder; UserError otherwise."""
    try:
        zipped = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} is damaged ({error}). Fetch it again.') from error
    for member in zipped.namelist():
        if member.startswith('/') or '..' in member.replace('\\', '/').split('/') or ':' in member:
            raise UserError(f'{path} is refused: its member {member} points outside of its folder.')
    return zipped


def read_member(zipped, member):
    try:
        return zipped.read(member)
    except Exception as error:  # zipfile and zlib raise many kinds for damaged bytes
        raise UserError(f'{zipped.filename} is damaged at {member} ({error}). Fetch it again.') from error


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays and plain containers; any other global is refused: nothing can run."""

    ALLOWED = {('numpy', 'ndarray'): np.ndarray, ('numpy', 'dtype'): np.dtype,
               ('multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
               ('multiarray', 'scalar'): np.float64(0).__reduce__()[0],
               ('numeric', '_frombuffer'): np.empty(0).__reduce_ex__(5)[0]}

    def find_class(self, module, name):
        module = module.removeprefix('numpy.core.').removeprefix('numpy._core.')  # numpy 1 and 2
        if (module, name) == ('_codecs', 'encode'):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode('latin1')
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')
        return self.ALLOWED[module, name]


def prepare_imagenet1k(name, data_dir, folder):
    """Downsampled ImageNet, from the official batches or else from imagenet2012/ by pillow's box filter."""
    size = SETS[name]['size']
    sources = {}  # name of a batch -> function that opens it
    for source in (f'Imagenet{size}_{part}' for part in ('train', 'train_part1', 'train_part2', 'val')):
        if (data_dir / source).is_dir():
            for file in sorted((data_dir / source).rglob('*')):
                sources.setdefault(file.name, file)
        elif (data_dir / f'{source}.zip').exists():
            zipped = open_zip(data_dir / f'{source}.zip')
            for member in zipped.namelist():
                sources.setdefault(member.rsplit('/', 1)[-1], (zipped, member))
    wanted = {'train': [f'train_data_batch_{i}' for i in range(1, 11)], 'test': ['val_data']}
    missing = [batch for batches in wanted.values() for batch in batches if batch not in sources]
    if len(missing) == 11 and (data_dir / 'imagenet2012').is_dir():
        return prepare_from_imagenet(data_dir / 'imagenet2012', folder, size)
    if len(missing) == 11 or (missing and not incomplete_allowed()):
        raise UserError(f'{name}: {", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""} not found in '
                        f'{data_dir}. Put Imagenet{size}_train and Imagenet{size}_val there (zip or folder, '
                        'from https://image-net.org), or imagenet2012/train and val; or try --synthetic.')
    for which, batches in wanted.items():
        progress, labels = Progress(f'{which} batches', len(batches)), []
        with open(folder / f'{which}_images.npy', 'wb') as file:
            header = {'descr': '|u1', 'fortran_order': False, 'shape': (0, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for i, batch in enumerate(batches):
                if batch in sources:
                    images, more = read_batch(sources[batch], size)
                    for start in range(0, len(images), 1000):
                        file.write(images[start:start + 1000].transpose(0, 2, 3, 1).tobytes())
                    labels.append(more)
                progress(i + 1)
            labels = np.concatenate(labels or [np.empty(0, np.int64)])
            file.seek(0)  # numpy leaves room in the header for the count to grow
            np.lib.format.write_array_header_1_0(file, header | {'shape': (len(labels), size, size, 3)})
        np.save(folder / f'{which}_labels.npy', labels)
    describe(folder, f'official Imagenet{size} batches, classes in their own order (label - 1)')


def read_batch(source, size):
    """One official batch: uint8 N x 3 x size x size, int64 N from 0. UserError if it is not one."""
    path = source if isinstance(source, Path) else f'{source[0].filename}:{source[1]}'
    try:
        with source.open('rb') if isinstance(source, Path) else source[0].open(source[1]) as file:
            batch = ArrayUnpickler(file, encoding='latin1').load()
        images, labels = np.asarray(batch['data']), np.asarray(batch['labels'])
        if (images.dtype, images.shape, labels.dtype.kind) != (np.uint8, (len(labels), 3 * size ** 2), 'i'):
            raise ValueError(f'data are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}')
        if len(labels) and not 1 <= labels.min() <= labels.max() <= 1000:
            raise ValueError(f'labels go from {labels.min()} to {labels.max()}, not 1 to 1000')
    except Exception as error:  # damaged bytes make pickle raise almost anything
        raise UserError(f'{path} is not a downsampled ImageNet batch ({error}). Fetch it again.') from error
    return images.reshape(-1, 3, size, size), labels.astype(np.int64) - 1


def prepare_from_imagenet(root, folder, size):
    wnids = sorted(p.name for p in (root / 'train').glob('n*') if p.is_dir())
    if len(wnids) != 1000 and not incomplete_allowed():
        raise UserError(f'{root}/train has {len(wnids)} class folders (n01440764 ...) of 1000.')
    for which, source in (('train', root / 'train'), ('test', root / 'val')):
        files = [(p, label) for label, wnid in enumerate(wnids)
                 for p in (sorted((source / wnid).iterdir()) if (source / wnid).is_dir() else [])]
        full = SETS[f'ImageNet1k_x{size}']['train' if which == 'train' else 'val']
        if not files or (len(files) != full and not incomplete_allowed()):
            raise UserError(f'{source} holds {len(files)} of {full} images in folders named like those of '
                            f'{root}/train: unpack the official archives again.')
        decode_all(Path.read_bytes, [p for p, _ in files], folder / f'{which}_images.npy', size, box=True)
        np.save(folder / f'{which}_labels.npy', np.array([label for _, label in files], np.int64))
    describe(folder, f'{root.name} resized to {size} px by a box filter, classes are the sorted wnids', wnids)


# ---- command line ----

SOURCES = {  # official files of each set, and what becomes of a set that has none
    'CIFAR10_x32': (['cifar-10-batches-py', 'cifar-10-python.tar.gz'], 'downloaded when needed'),
    'CIFAR100_x32': (['cifar-100-python', 'cifar-100-python.tar.gz'], 'downloaded when needed'),
    'TinyImageNet200_x32': (['tiny-imagenet-200', 'tiny-imagenet-200.zip'], 'downloaded when needed'),
    'TinyImageNet200_x64': (['tiny-imagenet-200', 'tiny-imagenet-200.zip'], 'downloaded when needed'),
    'ImageNet1k_x32': (['Imagenet32_train', 'Imagenet32_train.zip', 'imagenet2012'],
                       'missing: put Imagenet32_train and Imagenet32_val, or imagenet2012, here'),
    'ImageNet1k_x64': (['Imagenet64_train', 'Imagenet64_train.zip', 'Imagenet64_train_part1',
                        'Imagenet64_train_part1.zip', 'imagenet2012'],
                       'missing: put Imagenet64_train and Imagenet64_val, or imagenet2012, here'),
}


def report(data_dir):
    print(f'{"":20} {"train":>9} {"val":>6} {"test":>6}  in {data_dir}/')
    for name, facts in SETS.items():
        files, state = SOURCES[name]
        found = [file for file in files if (data_dir / file).exists()]
        try:
            if (data_dir / name).exists():
                state = f'ready: {read_arrays(name, data_dir / name)[2]}'
            elif found:
                state = f'not prepared yet, made from {found[0]} when needed'
        except UserError as error:
            state = str(error)
        print(f'{name:20} {facts["train"]:9,} {facts["val"]:6,} {facts["test"] or "":>6}  {state}')


def preview(name, data_dir, file, scale=3):
    """Writes a PNG of the first 64 training images as the network gets them, with their labels."""
    prepare(name, data_dir)
    train, _, _ = load(name, data_dir, 64, 64, 42, 'cpu')
    images, labels = next(train.batches(0))
    names = data_dir / name / 'classes.txt'
    names = names.read_text().splitlines() if names.exists() else []
    side = SETS[name]['size'] * scale
    sheet = Image.new('RGB', (8 * (side + 6), 8 * (side + 18)), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        x, y = i % 8 * (side + 6) + 3, i // 8 * (side + 18) + 3
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.NEAREST)
        sheet.paste(tile, (x, y))
        text = f'{label} {names[label]}' if label < len(names) else str(label)
        while draw.textlength(text) > side:
            text = text[:-1]
        draw.text((x, y + side + 1), text, 'black')
    sheet.save(file, 'PNG')
    print(f'{file}: the first 64 of {len(train)} training images of {name}, augmented')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', metavar='NAME | preview NAME OUT.png')
    parser.add_argument('--data-dir', type=Path, default=Path('datasets'), help='default: datasets')
    args = parser.parse_args()
    try:
        if not args.words:
            report(args.data_dir)
        elif args.words[0] == 'preview' and len(args.words) == 3:
            preview(args.words[1], args.data_dir, args.words[2])
        elif len(args.words) == 1:
            prepare(args.words[0], args.data_dir)
            report(args.data_dir)
        else:
            raise UserError('Say nothing, NAME, or preview NAME OUT.png; --help has more.')
    except (UserError, OSError) as error:
        print(f'data.py: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
