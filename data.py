"""The data sets: what they are, how they are prepared, and batches of them on the device.

    python data.py                             what is on disk, the sizes of the splits, what is missing
    python data.py CIFAR10_x32                 prepares one set (the scripts do it themselves when needed)
    python data.py preview CIFAR10_x32 a.png   draws augmented training images with their labels
    python data.py unpack imagenet2012         ILSVRC2012_*.tar -> imagenet2012/train, val and devkit
    python data.py pack imagenet2012 --short-side 256    one file instead of 1.3 million, 4 times smaller;
    python data.py pack imagenet2012 --as-is             or with the original bytes

All take --data-dir (default: datasets). A prepared set is a folder <NAME>/ with {train,test}_images.npy
(uint8, N x S x S x 3) and {train,test}_labels.npy (int64, N): four such files of your own are used as they
are. Beside them classes.txt (a name per line) and about.txt (where the arrays came from) are optional.
imagenet2012 stays in its JPEG files, which worker processes decode while the device computes.

Order and augmentation are pure functions of the seed, the iteration and the position in the global batch:
the same for any number of ranks and from any iteration on, so there is no loader state to save.
"""
import argparse
import atexit
import contextlib
import ctypes
import functools
import io
import itertools
import math
import mmap
import os
import pickle
import queue
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

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
    'imagenet2012': dict(size=224, classes=1000, train=1281167, val=50000, test=0, **IMAGENET_PIXELS),
}
# test sets for networks trained on imagenet2012, evaluated when present: (folder, classes, images)
IMAGENET_TESTS = {
    'IN-V2': ('imagenetv2-matched-frequency-format-val', 1000, 10000),
    'IN-R': ('imagenet-r', 200, 30000),
    'IN-A': ('imagenet-a', 200, 7500),
    'IN-Sketch': ('imagenet-sketch', 1000, 50889),
}
ARCHIVES = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar', 'ILSVRC2012_devkit_t12.tar.gz'
FILES = 'train_images.npy', 'train_labels.npy', 'test_images.npy', 'test_labels.npy'
INCOMPLETE = 'ALLOW_INCOMPLETE_DATA'  # environment variable: accept a part of a set, split in proportion
PAD = 4  # pixels of zeros on each side before the random crop
SHIFTS = 2 * PAD + 1
IGNORE = -100  # label of the images that fill up the last evaluation batch; cross_entropy passes over it
CROP, SHORT_SIDE = 224, 256  # pixels: of encoded images, and to which they are resized for evaluation
PIECE = 64  # images that a loader process decodes at once


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
    """Zero-pads by 4, crops to the old size and flips, each image as its draw says.

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


def to(tensor, device):
    """The tensor on a device. Only CUDA need not wait: MPS may read freed memory (pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device.type == 'cuda')


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

    def __len__(self):
        return len(self.images)

    def batches(self, start):
        """Yields uint8 images N x 3 x S x S and int64 labels N, N = batch / world, from iteration `start`."""
        chunks = self._chunks(start)
        if self.images.device.type != self.device.type:
            chunks = ahead(chunks)
        for chunk in chunks:
            images, labels, draws = (to(t, self.device) for t in chunk)
            local = self.batch // self.world
            yield from zip(augment(images, draws).split(local), labels.split(local), strict=True)

    def _chunks(self, start):
        """Images, labels and draws of several batches at once: fewer and larger operations."""
        local = self.batch // self.world
        # up to 16 batches, or 16 MiB
        steps_at_once = max(1, min(16, 2 ** 24 // (local * self.images[0].numel())))
        epoch, step = divmod(start, self.per_epoch)
        while True:
            plan = torch.stack(augmentation_plan(self.seed, epoch, len(self)))
            plan = plan[:, :self.per_epoch * self.batch].view(2, self.per_epoch, self.world, local)
            plan = plan[:, :, self.rank].contiguous()
            plan = to(plan.pin_memory() if self.images.is_cuda else plan, self.images.device)
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

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


class EvalBatches:
    """An evaluation set in batches of one fixed size; over all ranks every image comes exactly once.

    Rank r takes images r, r + world, ... All ranks yield equally many batches; the last is filled up with
    black images of label -100, which cross_entropy ignores and no argmax equals. Arguments as for
    TrainBatches, but batch is that of one rank.
    """

    absent = None  # bool, one per class, on the CPU: those without images, if the set is made of a few only

    def __init__(self, images, labels, batch, device, rank=0, world=1):
        self.images, self.labels, self.batch, self.device = images, labels, batch, torch.device(device)
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        """Yields uint8 images N x 3 x S x S (channels_last) and int64 labels N."""
        for first in range(self.rank, len(self) + self.rank, self.batch * self.world):
            mine = slice(first, first + self.batch * self.world, self.world)
            images, labels = (to(t[mine], self.device) for t in (self.images, self.labels))
            if missing := self.batch - len(labels):
                images = F.pad(images, (0,) * 7 + (missing,))
                labels = F.pad(labels, (0, missing), value=IGNORE)
            yield images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), labels
            forget(self.images)


# ---- batches of images in files ----

def default_workers():
    """One for each core that this process may use, shared among the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


class EncodedImages:
    """JPEG (or other) images with their labels, in files of their own or one after the other in a single one.

    Args:
        path: the folder, or the single file. names: bytes array of N, paths relative to the folder.
        labels: int64 array of N. starts: int64 array of N + 1, offsets in the single file, or else None.
    """

    def __init__(self, path, names, labels, starts=None):
        self.path, self.names, self.labels, self.starts = path, names, labels, starts

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """(uint8 array of the encoded bytes of image i, its path for messages). Raises UserError."""
        where = f'{self.path}/{os.fsdecode(self.names[i].item())}'
        try:
            if self.starts is None:
                return np.fromfile(where, np.uint8), where
            start, end = self.starts[i:i + 2].tolist()
            encoded = np.empty(end - start, np.uint8)
            with open(self.path, 'rb') as file:
                file.seek(start)
                return encoded[:file.readinto(encoded)], where
        except OSError as error:
            raise UserError(f'{error.filename}: {error.strerror}. Put it back, then go on with --resume.') \
                from error


def decode_tensor(encoded, path):
    """Encoded bytes (uint8 array) -> uint8 3 x H x W, the pixels that pillow's convert('RGB') gives."""
    with contextlib.suppress(RuntimeError, ImportError):  # no JPEG, or a damaged one: pillow decides which
        from torchvision.io import decode_jpeg  # imported here: it takes a second
        image = decode_jpeg(torch.from_numpy(encoded))
        if len(image) in (1, 3):  # grey or RGB; CMYK is pillow's
            return image.expand(3, -1, -1)
    return torch.from_numpy(decode(encoded.tobytes(), path).copy()).permute(2, 0, 1)


def resize(image, top, left, height, width, size):
    """A box of an image, uint8 3 x H x W, resized to size = (rows, columns), bilinear with antialiasing."""
    box = image[None, :, top:top + height, left:left + width]
    return F.interpolate(box.contiguous(memory_format=torch.channels_last), size, mode='bilinear',
                         antialias=True)[0]


def random_box(height, width, draws):
    """(top, left, height, width) of a training crop: area 8 to 100 %, aspect 3/4 to 4/3, log-uniform.

    As torchvision's RandomResizedCrop: the first of ten tries that fits into the image, or else the largest
    centred box of an allowed aspect. draws: 10 x 4 uniform numbers in [0, 1), for area, aspect, top, left.
    """
    for area, aspect, top, left in draws.tolist():
        area = height * width * (0.08 + 0.92 * area)
        aspect = 3 / 4 * (16 / 9) ** aspect
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image, draws, flip):
    """uint8 3 x H x W -> 3 x 224 x 224, as random_box has it, mirrored if `flip`."""
    crop = resize(image, *random_box(*image.shape[1:], draws), (CROP, CROP))
    return crop.flip(2) if flip else crop


def center_crop(image):
    """uint8 3 x H x W -> 3 x 224 x 224: the short side is resized to 256, then the centre is cut out."""
    height, width = image.shape[1:]
    short = min(height, width)
    rows, columns = SHORT_SIDE * height // short, SHORT_SIDE * width // short
    if short != SHORT_SIDE:
        image = resize(image, 0, 0, height, width, (rows, columns))
    top, left = round((rows - CROP) / 2), round((columns - CROP) / 2)
    return image[:, top:top + CROP, left:left + CROP]


class JpegBatches(torch.utils.data.Dataset):
    """What training and evaluation batches of encoded images share: pieces of them, decoded by processes.

    Args:
        images: EncodedImages. batch: images in one rank's batch. device: where the batches are wanted.
        workers: decoding processes, 0 for none. rank, world: of the processes that train.
    """

    def __init__(self, images, batch, device, workers, rank, world):
        self.images, self.batch, self.device, self.workers = images, batch, torch.device(device), workers
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """A worker's task: (uint8 n x 3 x 224 x 224, int64 n) of batch `key[0]` from position `key[1]` on.

        A UserError comes back as its text: raised here, it would arrive wrapped in a traceback.
        """
        number, first = key
        count = min(PIECE, self.batch - first)
        black = torch.zeros(CROP, CROP, 3, dtype=torch.uint8), IGNORE
        try:
            piece = [(crop(decode_tensor(*self.images.read(i))).permute(1, 2, 0),
                      self.images.labels[i].item()) for i, crop in self.crops(number, first, count)]
        except UserError as error:
            return str(error)
        # in a loader process this writes into shared memory
        images, labels = torch.utils.data.default_collate(piece + [black] * (count - len(piece)))
        return images.permute(0, 3, 1, 2), labels

    def stream(self, numbers):
        """Yields the batches of these numbers, in order, on the device: uint8 N x 3 x 224 x 224, int64 N."""
        stream = self._stream(numbers)
        atexit.register(stream.close)  # ends the loader processes, which do not listen to SIGTERM
        return stream

    def _stream(self, numbers):
        pieces = range(0, self.batch, PIECE)
        prefetch = {'prefetch_factor': 2 + 2 * len(pieces) // self.workers} if self.workers else {}
        loader = iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=((number, first) for number in numbers for first in pieces),
            num_workers=self.workers, worker_init_fn=start_worker, pin_memory=self.device.type == 'cuda',
            **prefetch))
        if hasattr(signal, 'SIGCHLD'):  # the loader's handler would raise anywhere, even in a checkpoint
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        batch = []
        try:
            while True:
                try:
                    piece = next(loader, None)
                except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                    reason = (str(error).splitlines() or ['no answer'])[0]
                    raise OSError(f'A loader process died ({reason}). If memory or /dev/shm is full, a '
                                  'smaller --workers helps; go on with --resume.') from error
                if piece is None:
                    return
                if isinstance(piece, str):
                    raise UserError(piece)
                batch.append([to(t, self.device) for t in piece])
                if len(batch) == len(pieces):
                    yield batch[0] if len(batch) == 1 else [torch.cat(p) for p in zip(*batch, strict=True)]
                    batch = []
        finally:
            del loader  # ends its processes even if a traceback keeps this frame


def start_worker(worker):
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a cluster sends them to all processes:
        signal.signal(number, signal.SIG_IGN)       # the main one answers, and ends this one
    keep_freed_memory()


def keep_freed_memory():
    """Makes glibc keep what is freed: pages given back to the system have to be zeroed when needed again."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)            # M_MMAP_MAX: large blocks come from the heap too


class JpegTrainBatches(JpegBatches):
    """Training batches as TrainBatches has them, of encoded images; the argument batch is the global one."""

    def __init__(self, images, batch, seed, device, workers=0, rank=0, world=1):
        super().__init__(images, batch // world, device, workers, rank, world)
        self.seed, self.per_epoch, self.order = seed, len(images) // batch, (None, None)

    def crops(self, number, first, count):
        """Yields (image, function that crops it) for positions of this rank's batch in update `number`."""
        epoch, step = divmod(number, self.per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        # step + 1, because numpy seeds (seed, epoch, 0) as (seed, epoch), which the order has
        rng, batch = np.random.default_rng((self.seed, epoch, step + 1)), self.batch * self.world
        draws, flips = rng.random((batch, 10, 4)), rng.random(batch) < 0.5
        first += self.rank * self.batch
        for k in range(first, first + count):
            crop = functools.partial(random_crop, draws=draws[k], flip=flips[k])
            yield self.order[1][step * batch + k], crop

    def batches(self, start):
        """Yields uint8 N x 3 x 224 x 224 and int64 N, N = batch / world, from iteration `start` on."""
        return self.stream(itertools.count(start))


class JpegEvalBatches(JpegBatches):
    """Evaluation batches as EvalBatches has them, of encoded images.

    restrict: the set has images of a few classes only, and the logits of the others do not count.
    """

    def __init__(self, images, batch, device, workers, rank=0, world=1, restrict=False):
        super().__init__(images, batch, device, workers, rank, world)
        counts = np.bincount(images.labels, minlength=SETS['imagenet2012']['classes'])
        self.absent = torch.from_numpy(counts == 0) if restrict else None

    def crops(self, number, first, count):
        """Yields (image, function that crops it) for positions of this rank's batch of that number."""
        start = self.rank + (number * self.batch + first) * self.world
        for i in range(start, len(self), self.world)[:count]:
            yield i, center_crop

    def __iter__(self):
        return self.stream(range(math.ceil(len(self) / (self.batch * self.world))))


# ---- loading ----

def load(name, data_dir, batch, eval_batch, seed, device, rank=0, world=1, synthetic=False, workers=None):
    """Training batches and evaluation sets of a prepared data set.

    Arrays that take less than half of the free GPU memory are put there; others stay in mapped files.

    Args:
        name: a key of SETS. data_dir: the folder that holds <name>/. batch: images in a global batch.
        eval_batch: images in one rank's evaluation batch. seed: of order and augmentation. device: where the
        batches are wanted. rank, world: of the processes that train. synthetic: generated images.
        workers: processes that decode files for this rank; None: as many as it has cores, 0: none.
    Returns:
        (TrainBatches, {'val': EvalBatches, 'tst': the same if there is a test set}, str: their origin);
        of imagenet2012 the same for files, and the test sets are IN-V2 and others on disk.
    Raises:
        UserError: when the files are missing, damaged or not those of this set.
    """
    if name == 'imagenet2012' and not synthetic:
        workers = default_workers() if workers is None else workers
        parts, wnids, about = open_imagenet(Path(data_dir))
        shared = torch.device(device), workers, rank, world
        evals = {'val': JpegEvalBatches(parts['val'], eval_batch, *shared)}
        for test, (folder, classes, count) in IMAGENET_TESTS.items():
            if (folder := Path(data_dir) / folder).is_dir():
                images = open_folder(folder, list_images(folder), wnids, classes, count)
                evals[test] = JpegEvalBatches(images, eval_batch, *shared, restrict=classes < 1000)
        for test, batches in evals.items():
            if not len(batches):
                raise UserError(f'{data_dir} has no images of {name} for {test}.')
        return JpegTrainBatches(parts['train'], batch, seed, *shared), evals, about
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
        held_out = {'val': [rows_of(t, slice(n, None)) for t in train], 'tst': test}
    else:
        held_out = {'val': test}
    evals = {key: EvalBatches(*arrays, eval_batch, device, rank, world) for key, arrays in held_out.items()}
    train = [rows_of(t, slice(n)) for t in train]
    return TrainBatches(*train, batch, seed, device, rank, world), evals, about


def rows_of(tensor, rows):
    """tensor[rows], which still knows the mapping of its file, for `forget`."""
    piece = tensor[rows]
    piece.mapping = getattr(tensor, 'mapping', None)
    return piece


def synthetic_arrays(name, batch):
    """Learnable images of a set's size and classes: coarse coloured patterns, one a class, under noise.

    batch: the training part has at least 5/4 of it. Returns: (images, labels) to train on and (images,
    labels) to test on, as in prepared files.
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
    anew = f'Delete {folder} and run the command again to have it made anew.'
    facts, remedy = SETS[name], remedy or (anew if name in SOURCES else f'Correct it, or SETS[{name!r}].')
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
        for file in folder.iterdir():
            with open(file, 'rb+') as f:
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
    if name == 'imagenet2012':
        open_imagenet(data_dir)  # lists its files, once
        return
    final = data_dir / name
    if not all((final / file).exists() for file in FILES):
        missing = ', '.join(file for file in FILES if not (final / file).exists())
        if name not in SOURCES:  # a set of your own
            raise UserError(f'{name} is not in {data_dir}: the folder {final} needs {missing}.')
        if final.exists():
            raise UserError(f'{final} lacks {missing}. Add them, or delete the folder to have it made anew.')
        try:
            with new_folder(final) as folder:
                SOURCES[name][0](name, data_dir, folder)
                read_arrays(name, folder, 'The official files are incomplete: fetch them again.')
        except OSError as error:
            # numpy names neither file nor cause when a write falls short
            reason = f'{error.filename or data_dir}: {error.strerror or f"{error}; is the disk full?"}'
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
    except (OSError, RuntimeError) as error:
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
            image = Image.open(io.BytesIO(data))
            if image.mode.startswith('I'):  # 16 bits: convert() would clip them
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} is damaged ({error}). Fetch it again: no image is ever skipped.') from error
    return np.asarray(image.resize((box, box), Image.BOX) if box else image)


def decode_all(read, count, file, size, resize=False):
    """Decodes images on all cores into a new .npy file, uint8 N x size x size x 3; read(i): (bytes, path).

    resize: to that size, by pillow's box filter; or else images of another size are an error.
    """
    shape = count, size, size, 3
    progress = Progress(file.stem.replace('_', ' '), count)

    def work(start):
        images = []
        for i in range(start, min(start + 64, count)):
            encoded, path = read(i)
            images.append(decode(encoded, path, size if resize else None))
            if images[-1].shape != shape[1:]:
                raise UserError(f'{path} has {images[-1].shape[:2]} pixels, not {(size, size)}.')
        return np.stack(images)

    # threads: pillow decodes outside of the interpreter lock, and nothing is left behind by a kill
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with open(file, 'wb') as out:  # not a mapped file: to fill the disk through one is fatal (SIGBUS)
            header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
            np.lib.format.write_array_header_1_0(out, header)
            for i, images in enumerate(pool.map(work, range(0, count, 64))):
                out.write(images)
                progress(min(64 * (i + 1), count))
    finally:
        pool.shutdown(cancel_futures=True)


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
    train = [(f, f.split('/')[1]) for f in sorted(files) if f.startswith('train/') and f.endswith('.JPEG')]
    test = sorted((f'val/images/{row[0]}', row[1])
                  for row in (line.split('\t') for line in lines('val/val_annotations.txt')) if len(row) > 1)
    wanted = [f'train/{w}/images/{w}_{i}.JPEG' for w in wnids for i in range(500)]
    wanted += [f'val/images/val_{i}.JPEG' for i in range(10000)]
    absent = [file for file in wanted if file not in files]
    if absent and not incomplete_allowed():
        raise UserError(missing.format(f'{absent[0]} (with {len(absent) - 1} others)'))
    test = [(file, wnid) for file, wnid in test if file in files]
    label = {wnid: i for i, wnid in enumerate(wnids)}
    unknown = {wnid for _, wnid in train + test} - set(label)
    if unknown or not train or not test:
        reason = f'{min(unknown)} is not in wnids.txt' if unknown else 'train/ or val/ has no images'
        raise UserError(f'{root} is not TinyImageNet: {reason}.')
    train = [train[i] for i in np.random.RandomState(0).permutation(len(train))]  # a stream numpy has frozen
    for which, pairs in (('train', train), ('test', test)):
        decode_all(lambda i, pairs=pairs: (read(pairs[i][0]), pairs[i][0]), len(pairs),
                   folder / f'{which}_images.npy', 64)
        np.save(folder / f'{which}_labels.npy', np.array([label[wnid] for _, wnid in pairs], np.int64))
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
        except (OSError, RuntimeError) as error:
            (data_dir / part).unlink(missing_ok=True)
            raise UserError(f'TinyImageNet is not in {data_dir}, and the download failed ({error}): put '
                            f'{url} there, or try the script with --synthetic.') from error
        (data_dir / part).rename(archive)
    zipped = open_zip(archive)
    files = {n.removeprefix('tiny-imagenet-200/') for n in zipped.namelist() if not n.endswith('/')}
    return archive, lambda file: read_member(zipped, f'tiny-imagenet-200/{file}'), files


def open_zip(path):
    """A zip file whose members all lie inside of their folder; UserError otherwise."""
    try:
        zipped = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many kinds for damaged bytes, as zlib does below
        raise UserError(f'{path} is damaged ({error}). Fetch it again.') from error
    for member in zipped.namelist():
        if member.startswith('/') or '..' in member.replace('\\', '/').split('/') or ':' in member:
            raise UserError(f'{path} is refused: its member {member} points outside of its folder.')
    return zipped


def read_member(zipped, member):
    try:
        return zipped.read(member)
    except Exception as error:
        raise UserError(f'{zipped.filename} is damaged at {member} ({error}). Fetch it again.') from error


class ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of numpy arrays and plain containers; any other global is refused: nothing can run.

    Based on the unpickler that is written in Python, as quick here: a few damaged bytes can make the other
    one take 64 GB of memory.
    """

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
    sources = {}  # name of a batch -> its path, on disk or in a zip
    for source in (f'Imagenet{size}_{part}' for part in ('train', 'train_part1', 'train_part2', 'val')):
        if (data_dir / source).is_dir():
            for file in sorted((data_dir / source).rglob('*')):
                sources.setdefault(file.name, file)
        elif (data_dir / f'{source}.zip').exists():
            zipped = open_zip(data_dir / f'{source}.zip')
            for member in zipped.namelist():
                sources.setdefault(member.rsplit('/', 1)[-1], zipfile.Path(zipped, member))
    wanted = {'train': [f'train_data_batch_{i}' for i in range(1, 11)], 'test': ['val_data']}
    missing = [batch for batches in wanted.values() for batch in batches if batch not in sources]
    if len(missing) == 11 and (data_dir / 'imagenet2012').is_dir():
        return prepare_from_imagenet(data_dir, folder, size)
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


def read_batch(path, size):
    """One official batch: uint8 N x 3 x size x size, int64 N from 0. UserError if it is not one."""
    try:
        with path.open('rb') as file:
            batch = ArrayUnpickler(file, encoding='latin1').load()
        images, labels = np.asarray(batch['data']), np.asarray(batch['labels'])
        if (images.dtype, images.shape, labels.dtype.kind) != (np.uint8, (len(labels), 3 * size ** 2), 'i'):
            raise ValueError(f'data are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}')
        if len(labels) and not 1 <= labels.min() <= labels.max() <= 1000:
            raise ValueError(f'labels go from {labels.min()} to {labels.max()}, not 1 to 1000')
    except Exception as error:  # damaged bytes make pickle raise almost anything
        raise UserError(f'{path} is not a downsampled ImageNet batch ({error}). Fetch it again.') from error
    return images.reshape(-1, 3, size, size), labels.astype(np.int64) - 1


def prepare_from_imagenet(data_dir, folder, size):
    parts, wnids, _ = open_imagenet(data_dir, packed=False)
    for which, images in (('train', parts['train']), ('test', parts['val'])):
        decode_all(images.read, len(images), folder / f'{which}_images.npy', size, resize=True)
        np.save(folder / f'{which}_labels.npy', images.labels)
    describe(folder, f'imagenet2012 resized to {size} px, box filter, classes are the sorted wnids', wnids)


# ---- imagenet2012: files, archives, pack ----

def list_images(folder):
    """([class folders], bytes array of the image files in them as class/file, int64 array: each file's
    class folder, counted from 0).

    A folder without class folders gives [], its own files and zeros. Class folders are wnids (n01440764) or
    integers. The list is kept in <folder>-index.npz, for as long as no class folder changes.
    """
    classes = sorted(f.name for f in os.scandir(folder) if re.fullmatch(r'n\d{8}|\d+', f.name) and f.is_dir())
    modified = np.array([(folder / c).stat().st_mtime_ns for c in classes], np.int64)
    index = folder.with_name(f'{folder.name}-index.npz')
    with contextlib.suppress(Exception):  # whatever is wrong with it: the folders are read again
        with np.load(index) as kept:
            if classes == kept['classes'].tolist() and np.array_equal(modified, kept['modified']):
                return classes, kept['names'], np.repeat(np.arange(len(classes)), kept['counts'])

    def files(name):
        return sorted(f.name for f in os.scandir(folder / name)
                      if f.name.lower().endswith(('.jpeg', '.jpg', '.png')))
    with ThreadPoolExecutor(16) as pool:  # waits for disks more than it works
        found = list(pool.map(files, classes or ['']))
    paths = [f'{c}/{f}' for c, names in zip(classes or ['.'], found, strict=True) for f in names]
    names = np.array([os.fsencode(path) for path in paths], np.bytes_)
    counts = np.array([len(fs) for fs in found])
    if classes:
        with contextlib.suppress(OSError):  # the folder may be read-only
            part = index.with_name(f'{index.name}.part{os.getpid()}.npz')
            np.savez(part, classes=classes, modified=modified, names=names, counts=counts)
            part.replace(index)
    return classes, names, np.repeat(np.arange(len(counts)), counts)


def open_folder(folder, listed, wnids, class_count, image_count):
    """EncodedImages of class folders; a folder's label is its integer name, or its wnid's place in `wnids`.

    listed: what list_images(folder) gave. Raises UserError for an unknown class or another count.
    """
    names, files, which = listed
    place = {wnid: i for i, wnid in enumerate(wnids)}
    labels = [int(name) if name.isdigit() else place.get(name, -1) for name in names]
    unknown = [name for name, label in zip(names, labels, strict=True) if not 0 <= label < len(wnids)]
    if unknown:
        raise UserError(f'{folder}/{unknown[0]} is not one of the {len(wnids)} classes of ImageNet.')
    if (len(names), len(files)) != (class_count, image_count) and not incomplete_allowed():
        raise UserError(f'{folder} holds {len(files)} of {image_count} images, in {len(names)} of '
                        f'{class_count} class folders. Unpack its archive again, or accept a part with '
                        f'{INCOMPLETE}=1.')
    return EncodedImages(folder, files, np.array(labels, np.int64)[which])


def open_imagenet(data_dir, packed=True):
    """({'train': EncodedImages, 'val': EncodedImages}, [1000 wnids, sorted], str: their origin).

    Raises:
        UserError: when imagenet2012/ (or its pack) is missing or incomplete; says what to put where.
    """
    root, pack, facts = data_dir / 'imagenet2012', data_dir / 'imagenet2012-pack', SETS['imagenet2012']
    if packed and pack.is_dir():
        return open_pack(pack)
    present = [part for part in ('train', 'val') if (root / part).is_dir()]
    if not present or (len(present) < 2 and not incomplete_allowed()):
        raise UserError(f'{root} needs train/ and val/: put {", ".join(ARCHIVES)} (image-net.org) into '
                        f'{data_dir} and run python data.py unpack imagenet2012 --data-dir {data_dir}, '
                        'or try the script with --synthetic.')
    listed = {part: list_images(root / part) for part in present}
    wnids = listed[present[0]][0]
    if len(wnids) != facts['classes'] and not incomplete_allowed():
        raise UserError(f'{root}/{present[0]} has {len(wnids)} class folders (n01440764 ...), not 1000. '
                        'Unpack its archive again.')
    nothing = EncodedImages(root, np.array([], np.bytes_), np.array([], np.int64))
    parts = {'train': nothing, 'val': nothing}
    for part, (classes, files, _) in listed.items():
        if part == 'val' and not classes:
            parts[part] = open_flat_val(root, files, wnids)
        else:
            parts[part] = open_folder(root / part, listed[part], wnids, facts['classes'], facts[part])
    return parts, wnids, 'imagenet2012, classes are the sorted wnids'


def open_flat_val(root, files, wnids):
    """imagenet2012/val with its 50000 `files` in no folders: labels from the development kit beside it.

    Its meta.mat is a MATLAB 5 file (a header of 128 bytes, then a tag of 8 and compressed data), in which the
    synsets stand in the order of their ids from 1; the ids of the images are in the ground truth file.
    """
    kit = root / 'ILSVRC2012_devkit_t12' / 'data'
    try:
        truth = [int(i) for i in (kit / 'ILSVRC2012_validation_ground_truth.txt').read_text().split()]
        meta = (kit / 'meta.mat').read_bytes()
        if meta[128] == 15:  # miCOMPRESSED
            meta = zlib.decompress(meta[136:])
    except (OSError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f'{root}/val has no class folders, and {kit} cannot be read for labels ({error}). '
                        f'Put {ARCHIVES[2]} into {root}, run python data.py unpack imagenet2012 --data-dir '
                        f'{root.parent}.') from error
    synsets = [wnid.decode() for wnid in re.findall(rb'n\d{8}', meta.replace(b'\0', b''))]  # 8 or 16 bits
    names = [os.fsdecode(file) for file in files.tolist()]
    numbers = [int(name[-13:-5]) for name in names if re.search(r'ILSVRC2012_val_000[0-5]\d{4}\.JPEG$', name)]
    if sorted(synsets[:1000]) != wnids or len(truth) != 50000 or (
            numbers != list(range(1, 50001)) if not incomplete_allowed() else
            len(numbers) < len(names) or not all(1 <= n <= 50000 for n in numbers)):
        raise UserError(f'{root}/val and {kit} do not fit together: {len(files)} images, {len(truth)} '
                        f'labels, {len(set(synsets))} classes. Unpack their archives again.')
    place = {wnid: i for i, wnid in enumerate(wnids)}
    return EncodedImages(root / 'val', files, np.array([place[synsets[truth[n - 1] - 1]] for n in numbers]))


def unpack_imagenet(data_dir):
    """Unpacks the official archives found in data_dir or imagenet2012/; goes on where it was stopped."""
    root = data_dir / 'imagenet2012'
    found = {name: path for name in ARCHIVES for path in (root / name, data_dir / name) if path.exists()}
    if not found:
        raise UserError(f'None of {", ".join(ARCHIVES)} is in {data_dir}: fetch them from https://image-net.org')
    for name, archive in found.items():
        print(archive)
        try:
            with tarfile.open(archive) as tar:
                if name == ARCHIVES[0]:
                    members = [m for m in tar if re.fullmatch(r'n\d{8}\.tar', m.name)]
                    progress = Progress('classes', len(members))
                    for i, member in enumerate(members):
                        with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                            unpack(inner, root / 'train' / member.name[:9], r'n\d{8}_\d+\.JPEG')
                        progress(i + 1)
                elif name == ARCHIVES[1]:
                    unpack(tar, root / 'val', r'ILSVRC2012_val_\d{8}\.JPEG')
                else:
                    kit = root / 'ILSVRC2012_devkit_t12' / 'data'
                    unpack(tar, kit, r'meta\.mat|ILSVRC2012_validation_ground_truth\.txt')
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(f'{archive} is damaged ({error}). Fetch it again.') from error
    open_imagenet(data_dir, packed=False)


def unpack(tar, folder, pattern):
    """Writes the files of an archive whose last name fits the pattern into `folder`, unless it exists."""
    if folder.exists():
        return
    with new_folder(folder) as part:
        for member in tar:
            name = member.name.rsplit('/', 1)[-1]
            if member.isfile() and re.fullmatch(pattern, name):  # such a name cannot lead outside
                with tar.extractfile(member) as source, open(part / name, 'wb') as file:
                    shutil.copyfileobj(source, file)


def pack_imagenet(data_dir, short_side=None):
    """Writes imagenet2012-pack/: {train,val}.bin with the encoded images, {train,val}.npz with their index.

    short_side: pixels; larger training images are resized to it (Lanczos) and encoded again, quality 90;
    None keeps them. The images of val always keep their bytes, so that accuracies stay comparable.
    """
    parts, wnids, about = open_imagenet(data_dir, packed=False)
    final = data_dir / 'imagenet2012-pack'
    if final.exists():
        raise UserError(f'{final} is there already. Delete it to have it made anew.')

    def encode(images, i, side):
        encoded, path = images.read(i)
        if side is None:
            return encoded.tobytes()
        image, buffer = Image.fromarray(decode(encoded, path)), io.BytesIO()
        if min(image.size) <= side:
            return encoded.tobytes()
        size = [side * length // min(image.size) for length in image.size]
        image.resize(size, Image.LANCZOS).save(buffer, 'JPEG', quality=90)
        return buffer.getvalue()

    try:
        with new_folder(final) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            for part, images in parts.items():
                progress, starts = Progress(part, len(images)), [0]
                work = functools.partial(encode, images, side=short_side if part == 'train' else None)
                with open(folder / f'{part}.bin', 'wb') as file:
                    for first in range(0, len(images), 1024):
                        for encoded in pool.map(work, range(first, min(first + 1024, len(images)))):
                            file.write(encoded)
                            starts.append(starts[-1] + len(encoded))
                        progress(len(starts) - 1)
                np.savez(folder / f'{part}.npz', names=images.names, labels=images.labels, starts=starts,
                         wnids=wnids)
            how = f'short side {short_side}, quality 90; val as it is' if short_side else 'as it is'
            describe(folder, f'{about}, packed: {how}')
    except OSError as error:
        raise UserError(f'{final} could not be written ({error.strerror or error}).') from error


def open_pack(pack):
    """The same as open_imagenet, from what pack_imagenet has written."""
    parts = {}
    for part in ('train', 'val'):
        try:
            with np.load(pack / f'{part}.npz') as index:
                names, labels, starts = index['names'], index['labels'], index['starts']
                wnids = index['wnids'].tolist()
            parts[part] = EncodedImages(pack / f'{part}.bin', names, labels, starts)
            size = (pack / f'{part}.bin').stat().st_size
            if size != starts[-1]:
                raise ValueError(f'{part}.bin has {size} bytes, not {starts[-1]}')
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{pack} is damaged ({error}). Delete it, and pack again.') from error
        full = SETS['imagenet2012'][part]
        if len(names) != full and not incomplete_allowed():
            raise UserError(f'{pack} holds {len(names)} of {full} images of {part}. Delete it, pack again.')
    return parts, wnids, (pack / 'about.txt').read_text().strip()


# ---- command line ----

IMAGENET_HINT = 'missing: put Imagenet{0}_train and Imagenet{0}_val, or imagenet2012, here'
SOURCES = {  # what prepares a set, the official files it takes, and what becomes of a set that has none
    'CIFAR10_x32': (
        prepare_cifar, ['cifar-10-batches-py', 'cifar-10-python.tar.gz'], 'downloaded when needed'),
    'CIFAR100_x32': (
        prepare_cifar, ['cifar-100-python', 'cifar-100-python.tar.gz'], 'downloaded when needed'),
    'TinyImageNet200_x32': (
        prepare_tiny_imagenet, ['tiny-imagenet-200', 'tiny-imagenet-200.zip'], 'downloaded when needed'),
    'TinyImageNet200_x64': (
        prepare_tiny_imagenet, ['tiny-imagenet-200', 'tiny-imagenet-200.zip'], 'downloaded when needed'),
    'ImageNet1k_x32': (
        prepare_imagenet1k, ['Imagenet32_train', 'Imagenet32_train.zip', 'imagenet2012'],
        IMAGENET_HINT.format(32)),
    'ImageNet1k_x64': (
        prepare_imagenet1k, ['Imagenet64_train', 'Imagenet64_train.zip', 'Imagenet64_train_part1',
                             'Imagenet64_train_part1.zip', 'imagenet2012'], IMAGENET_HINT.format(64)),
    'imagenet2012': (
        None, ['imagenet2012-pack', 'imagenet2012'], 'missing: put the official archives here, then unpack'),
}


def report(data_dir):
    print(f'{"":20} {"train":>9} {"val":>6} {"test":>6}  in {data_dir}/')
    for name, facts in SETS.items():
        _, files, state = SOURCES[name]
        found = [file for file in files if (data_dir / file).exists()]
        try:
            if name == 'imagenet2012':
                state = f'ready: {open_imagenet(data_dir)[2]}' if found else state
            elif (data_dir / name).exists():
                state = f'ready: {read_arrays(name, data_dir / name)[2]}'
            elif found:
                state = f'not prepared yet, made from {found[0]} when needed'
        except UserError as error:
            state = str(error)
        print(f'{name:20} {facts["train"]:9,} {facts["val"]:6,} {facts["test"] or "":>6}  {state}')
    for name, (folder, _, images) in IMAGENET_TESTS.items():
        state = 'evaluated' if (data_dir / folder).is_dir() else f'missing, optional: {folder}/'
        print(f'  {name:18} {"":9} {"":6} {images:6}  {state}')


def preview(name, data_dir, file):
    """Writes a PNG of the first 64 training images as the network gets them, with their labels."""
    prepare(name, data_dir)
    train, _, _ = load(name, data_dir, 64, 64, 42, 'cpu')
    images, labels = next(train.batches(0))
    names = data_dir / name / 'classes.txt'
    names = names.read_text().splitlines() if names.exists() else []
    side = SETS[name]['size'] * max(1, 128 // SETS[name]['size'])
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
    parser.add_argument('words', nargs='*', metavar='NAME | preview NAME OUT.png | unpack NAME | pack NAME')
    how = parser.add_mutually_exclusive_group()
    how.add_argument('--short-side', type=int, metavar='PIXELS', help='pack: resize larger images to it')
    how.add_argument('--as-is', action='store_true', help='pack: keep the bytes of all images')
    parser.add_argument('--data-dir', type=Path, default=Path('datasets'), help='default: datasets')
    args = parser.parse_args()
    try:
        if not args.words:
            report(args.data_dir)
        elif args.words[0] == 'preview' and len(args.words) == 3:
            preview(args.words[1], args.data_dir, args.words[2])
        elif args.words == ['unpack', 'imagenet2012']:
            unpack_imagenet(args.data_dir)
        elif args.words == ['pack', 'imagenet2012'] and (args.as_is or (args.short_side or 0) >= CROP):
            pack_imagenet(args.data_dir, args.short_side)
        elif len(args.words) == 1:
            prepare(args.words[0], args.data_dir)
            report(args.data_dir)
        else:
            raise UserError('Say nothing, NAME, preview NAME OUT.png, unpack imagenet2012, or pack '
                            'imagenet2012 with --as-is or a --short-side from 224; --help explains.')
    except (UserError, OSError) as error:
        print(f'data.py: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
