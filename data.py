"""The data sets: what they are, how they are prepared, and batches of them on the device.

    python data.py                             what is on disk, the sizes of the splits, what is missing
    python data.py CIFAR10_x32                 prepares one set (the scripts do it themselves when needed)
    python data.py preview CIFAR10_x32 a.png   draws augmented training images with their labels
    python data.py unpack imagenet2012         ILSVRC2012_*.tar -> imagenet2012/train, val and devkit
    python data.py pack imagenet2012 --short-side 256    two files instead of 1.3 million, 4 times smaller;
    python data.py pack imagenet2012 --as-is             or with the original bytes

All take --data-dir (default: datasets). A prepared set is a folder <NAME>/ with {train,test}_images.npy
(uint8, N x S x S x 3) and {train,test}_labels.npy (int64, N); four such files of your own are used as they
are. classes.txt (a name per line) and about.txt (where the arrays came from) beside them are optional.
imagenet2012 stays in its JPEG files, which worker processes decode while the device computes.

Order and augmentation are pure functions of the seed, the iteration and the position in the global batch:
the same for any number of ranks and from any iteration on, so there is no loader state to save.

Source files are found by their names, in whatever folders they lie. The class of an image is that of its
class folder, else the wnid (n01440764) in its file name, else what a list beside the images says.
"""
import argparse
import atexit
import collections
import contextlib
import ctypes
import functools
import importlib
import io
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

if sys.version_info < (3, 10):  # noqa: UP036 - pip may have installed all this for an older one
    print(f'Python 3.10 or newer is needed, this is {sys.version.split()[0]}.', file=sys.stderr)
    sys.exit(2)

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
ADD_KIT = (f'put {ARCHIVES[2]} into imagenet2012/ and run python data.py unpack imagenet2012 with the same '
           '--data-dir')
# what says the classes of a flat val: Kaggle's list, and two of the development kit
CSV, META, TRUTH = LISTS = 'LOC_val_solution.csv', 'meta.mat', 'ILSVRC2012_validation_ground_truth.txt'
FILES = 'train_images.npy', 'train_labels.npy', 'test_images.npy', 'test_labels.npy'
INCOMPLETE = 'ALLOW_INCOMPLETE_DATA'  # environment variable: accept a part of a set, split in proportion
PAD = 4  # pixels of zeros on each side before the random crop
SHIFTS = 2 * PAD + 1
IGNORE = -100  # label of the images that fill up the last evaluation batch; cross_entropy passes over it
CROP, SHORT_SIDE = 224, 256  # pixels: of a crop's sides, and of the short side before an evaluation's
PIECE = 64  # images that a loader process decodes at once
CGROUPS = Path('/sys/fs/cgroup')  # where Linux says what share of the cores a container may use


class UserError(Exception):
    """What the user can put right: the message says what and how; programs print it and exit with 2."""


def incomplete_allowed():
    return os.environ.get(INCOMPLETE, '') not in ('', '0')


def usable_cores():
    """The cores that this process may use: by its affinity mask and by its container's quota, from 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    for files in (['cpu.max'], ['cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us']):  # of cgroup 2, and 1
        with contextlib.suppress(OSError, ValueError):  # no such limit, or 'max'
            quota, period = map(int, ' '.join((CGROUPS / file).read_text() for file in files).split())
            cores = min(cores, quota // period) if quota > 0 else cores
    return max(1, cores)


def import_torchvision(module):
    """A module of torchvision, imported late because it takes a second. Raises UserError if that fails."""
    try:
        return importlib.import_module(f'torchvision.{module}')
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # as when built for another torch
        raise UserError(f'torchvision cannot be imported ({" ".join(str(error).split())[:150]}). Install the '
                        f'one that belongs to torch {torch.__version__}: https://pytorch.org/get-started') \
            from error


# ---- preparation ----

def prepare(name, data_dir):
    """Makes <data_dir>/<name>/ from the official files unless it exists; imagenet2012 is only listed.

    CIFAR and TinyImageNet are downloaded if they are not there. Raises UserError.
    """
    if name not in SETS:
        raise UserError(f'There is no data set {name}: choose from {" ".join(SETS)}.')
    data_dir, final = Path(data_dir), Path(data_dir) / name
    remove_left_over(data_dir, name)
    if name == 'imagenet2012':
        open_imagenet(data_dir)  # checks it, and leaves the lists of files that load() reads
        return
    require_folders(final)
    missing = ', '.join(file for file in FILES if not (final / file).exists())
    if not missing:
        return
    if name not in SOURCES:  # a set of your own
        raise UserError(f'{name} is not in {data_dir}: the folder {final} needs {missing}.')
    if final.exists():
        raise UserError(f'{final} lacks {missing}. Add them, or delete the folder to have it made anew.')
    with new_folder(final) as folder:
        SOURCES[name].prepare(name, data_dir, folder)
        read_arrays(name, folder, 'The official files are incomplete: fetch them again.')  # checks them


def require_folders(*paths):
    """Raises UserError if a path, or one above it, is a file or a link to nothing; it need not exist."""
    for path in [folder for final in paths for folder in (final, *final.parents)]:
        if path.is_symlink() and not path.exists():
            raise UserError(f'{path} is a link to {os.readlink(path)}, which is not there. Is a disk not '
                            'mounted? Else mend the link or delete it.')
        if path.exists() and not path.is_dir():
            raise UserError(f'{path} is a file, but a folder is needed there.')


@contextlib.contextmanager
def new_folder(final):
    """A temporary folder that takes the name `final` in the end: a kill or an error leaves no half set.

    An OSError within becomes a UserError.
    """
    folder = final.with_name(f'{final.name}.part.{uuid.uuid4().hex}')
    try:
        folder.mkdir(parents=True)
        yield folder
        for file in folder.iterdir():
            with open(file, 'rb+') as f:
                os.fsync(f.fileno())
        try:
            folder.rename(final)
        except OSError:
            if not final.exists():  # or else another process was quicker, and its set is as good
                raise
    except OSError as error:  # numpy names neither file nor cause when a write falls short
        reason = f'{error.filename or final.parent}: {error.strerror or f"{error}; is the disk full?"}'
        raise UserError(f'{final.name} could not be prepared ({reason}).') from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_over(data_dir, name):
    """Removes what a killed preparation of a set has left, a day later: none takes so long."""
    for folder in (*data_dir.glob(f'{name}.part.*'), *data_dir.glob(f'{name}-pack.part.*')):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_file(final):
    """A file to write, under a temporary name that becomes `final` in the end, or vanishes on an error.

    An OSError that would name it names `final`.
    """
    part = final.parent / f'{final.name}.part.{uuid.uuid4().hex}'
    try:
        with open(part, 'xb') as file:
            yield file
        part.replace(final)
    except OSError as error:
        if error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # it has its final name, or never came to be
            part.unlink()


def describe(folder, about, classes=()):
    (folder / 'about.txt').write_text(about + '\n', encoding='utf-8')
    if classes:
        (folder / 'classes.txt').write_text('\n'.join(classes) + '\n', encoding='utf-8')


def class_names(folder):
    """The lines of <folder>/classes.txt; [] without that file."""
    path = folder / 'classes.txt'
    return path.read_text('utf-8', 'replace').rstrip('\n').split('\n') if path.exists() else []


def say(text):
    """Prints; where nobody listens any more, the program goes on."""
    try:
        print(text, end='', flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, 'w')


def print_all_names():
    """From now on a path that the terminal cannot show is printed with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


class Progress:
    """A line that counts up: twice a second in place on a terminal, every tenth of the way elsewhere."""

    def __init__(self, label, total):
        self.label, self.total, self.start, self.shown = label, total, time.monotonic(), 0

    def __call__(self, done):
        seconds, live = time.monotonic() - self.start, sys.stdout is not None and sys.stdout.isatty()
        step = int(seconds * 2) if live else done * 10 // self.total
        if done == self.total or step > self.shown:
            self.shown = step
            left = seconds / done * (self.total - done)
            text = f'{self.label}: {done:,} of {self.total:,}, {left:.0f} s left'
            say((f'\r{text}\033[K' if live else text) + '\n' * (done == self.total or not live))


# ---- preparation: source files, found by name ----

CLASS = r'n\d+|\d+'  # name of a class folder: a wnid or an integer
IMAGE = r'(?i:[^.].*\.(jpeg|jpg|png))'
CLUTTER = r'[.@$].*|__MACOSX|Thumbs\.db|desktop\.ini|lost\+found|System Volume Information'  # of systems


def sources(name, data_dir):
    """Files and folders in data_dir that a set is made from, the first choice first."""
    found = [path for path in (data_dir.iterdir() if data_dir.is_dir() else ())
             if re.fullmatch(SOURCES[name].files, path.name + '/' * path.is_dir(), re.IGNORECASE)]
    return sorted(found, key=lambda path: (path.name == 'imagenet2012', path.is_file(), path))


def find_below(root, pattern):
    """Yields the paths of such a name up to five folders below root, nearest first.

    Class folders, clutter, Annotations and test are not entered.
    """
    folders = [root] if root.is_dir() else []
    for folder in folders:  # it grows meanwhile
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if re.fullmatch(pattern, entry.name):
                yield folder / entry.name
            if entry.is_dir() and len(folder.parts) < len(root.parts) + 5 and not re.fullmatch(
                    f'{CLASS}|{CLUTTER}|Annotations|test', entry.name):
                folders.append(folder / entry.name)


def files_of(source):
    """{path relative to the folder or zip file: the same as a Path or zipfile.Path} of the files in it.

    Raises UserError if the zip file is damaged, or has a member that points outside of its folder.
    """
    if source.is_dir():
        paths = (Path(folder, f) for folder, _, files in os.walk(source, followlinks=True) for f in files)
        found = {path.relative_to(source).as_posix(): path for path in paths}
    else:
        try:
            zipped = zipfile.ZipFile(source)
        except Exception as error:  # zipfile raises many kinds for damaged bytes, as zlib does below
            raise UserError(f'{source} is damaged ({error}). Fetch it again.') from error
        for path in zipped.namelist():  # zipfile.Path never returns of a path like //x (CVE-2024-8088)
            if path.startswith('/') or '..' in path.replace('\\', '/').split('/') or ':' in path:
                raise UserError(f'{source} is refused: its member {path} points outside of its folder.')
        found = {path: zipfile.Path(zipped, path) for path in zipped.namelist() if not path.endswith('/')}
    return {path: file for path, file in found.items() if not re.search(f'(^|/)({CLUTTER})(/|$)', path)}


def read_source(path):
    """The bytes of a file that files_of has found. Raises UserError if that fails."""
    try:
        return path.read_bytes()
    except Exception as error:
        raise UserError(f'{path} cannot be read ({error}). If damaged, fetch its archive again.') from error


def class_of(path, listed):
    """Class of an image: its nearest class folder, the wnid in its name, or listed[its name]; else None."""
    *folders, file = path.split('/')
    for folder in reversed(folders):
        if re.fullmatch(CLASS, folder):
            return folder
    wnid = re.search(r'(?<![A-Za-z0-9])n\d+(?=[_.])', file)
    return wnid[0] if wnid else listed.get(file.partition('.')[0])


def parse_list(text):
    """{image's file name without its ending: wnid} from lines that begin with both."""
    lines = text.removeprefix('\ufeff').replace('\r', '\n')
    return dict(re.findall(r'^([^\s,.]+)\S*?[\s,]+(n\d+)\b', lines, re.MULTILINE))


# ---- preparation: decoding on all cores ----

def decode(data, path):
    """JPEG (or other) bytes -> an image of pillow's, by convert('RGB').

    EXIF orientation is ignored, as everywhere in ImageNet practice. Raises UserError with the path.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith('I'):  # 16 bits: convert() would clip them
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        return image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} is damaged ({error}). Fetch it again: no image is ever skipped.') from error


def on_all_cores(work, items):
    """Yields work(item) for each, in order. Threads: pillow decodes outside of the interpreter lock."""
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cores()) as pool:
        warnings.simplefilter('ignore')  # 'Corrupt EXIF data': harmless; threads cannot do this by themselves
        for first in range(0, len(items), 2048):  # or what is not taken yet would fill the memory
            yield from pool.map(work, items[first:first + 2048])


def write_arrays(folder, which, size, chunks, total):
    """Writes {which}_images.npy and {which}_labels.npy from chunks, with progress up to `total` images.

    A chunk: (uint8 n x size x size x 3, n labels).
    """
    progress, labels = Progress(f'{which} images', total), []
    header = {'descr': '|u1', 'fortran_order': False}
    # not a mapped file: to fill the disk through one is fatal (SIGBUS)
    with open(folder / f'{which}_images.npy', 'wb') as out:
        np.lib.format.write_array_header_1_0(out, header | {'shape': (0, size, size, 3)})
        for images, more in chunks:
            for image in images:
                out.write(image.tobytes())
            labels.extend(more)
            progress(len(labels))
        out.seek(0)  # numpy leaves room in the header for the count to grow
        np.lib.format.write_array_header_1_0(out, header | {'shape': (len(labels), size, size, 3)})
    np.save(folder / f'{which}_labels.npy', np.array(labels, np.int64))


# ---- preparation: small images ----

def prepare_cifar(name, data_dir, folder):
    """CIFAR-10 and CIFAR-100 in the order of the official files, which torchvision downloads and checks."""
    datasets = import_torchvision('datasets')
    cifar = datasets.CIFAR10 if name == 'CIFAR10_x32' else datasets.CIFAR100
    source = data_dir / cifar.base_folder
    source = next(find_below(source, cifar.base_folder), source)  # within a folder of its own name
    files = *cifar.train_list, *cifar.test_list, (cifar.meta['filename'], cifar.meta['md5'])
    if not all(datasets.utils.check_integrity(str(source / file), md5) for file, md5 in files):
        archive = download(name, cifar.url, cifar.tgz_md5, data_dir, folder)
        datasets.utils.extract_archive(str(archive), str(folder))
        source = folder / cifar.base_folder
    train, test = (cifar(source.parent, train=part) for part in (True, False))
    shutil.rmtree(folder / cifar.base_folder, ignore_errors=True)  # what has been extracted here
    for which, part in (('train', train), ('test', test)):
        write_arrays(folder, which, 32, [(part.data, part.targets)], len(part))
    describe(folder, f'{cifar.base_folder}, order and classes of the official files', train.classes)


def prepare_tiny_imagenet(name, data_dir, folder):
    """TinyImageNet: classes are the sorted wnids, training images in a fixed order, official val as test."""
    root = next(iter(sources(name, data_dir)), None) or download(
        name, 'http://cs231n.stanford.edu/tiny-imagenet-200.zip', '90528d7ca1a48142e341f4ef8d21d0de',
        data_dir, folder)
    files = files_of(root)
    texts = {path.rsplit('/', 1)[-1]: read_source(files[path]).decode('utf-8', 'replace')
             for path in files if path.endswith(('wnids.txt', 'words.txt', 'val_annotations.txt'))}
    listed = parse_list(texts.get('val_annotations.txt', ''))
    words = dict(re.findall(r'^(n\d+)\t([^\r\n]*)', texts.get('words.txt', ''), re.MULTILINE))
    size, train, val = SETS[name]['size'], {}, {}  # of each file's name: its class and its path
    for path in files:
        *folders, file = path.split('/')
        part = next((folder for folder in folders if folder in ('train', 'val')), None)
        if part and re.fullmatch(IMAGE, file):
            (train if part == 'train' else val)[file] = class_of(path, listed), files[path]
    wnids = sorted(texts.get('wnids.txt', '').split() or {wnid for wnid, _ in train.values() if wnid})
    wanted = [f'{wnid}_{i}.JPEG' for wnid in wnids for i in range(500)]
    wanted += [f'val_{i}.JPEG' for i in range(10000)]
    absent = [file for file in wanted if file not in train and file not in val]
    if (absent or len(wnids) < SETS[name]['classes']) and not incomplete_allowed():
        raise UserError(f'{root} is incomplete: {absent[0] if absent else "wnids.txt"} (with '
                        f'{max(0, len(absent) - 1)} others) is missing. Delete it to have it fetched anew.')
    for file, (wnid, _) in (*train.items(), *val.items()):
        if wnid not in wnids:
            reason = f'{wnid} is not in wnids.txt' if wnid else 'not in val_annotations.txt'
            raise UserError(f'{root} is not TinyImageNet: {file} is there, but {reason}.')
    if not train or not val:
        raise UserError(f'{root} is not TinyImageNet: train/ or val/ has no images.')
    train = [train[file] for file in sorted(train, key=lambda file: (train[file][0], file))]
    train = [train[i] for i in np.random.RandomState(0).permutation(len(train))]  # a stream numpy has frozen

    def decoded(pair):
        wnid, path = pair
        image = decode(read_source(path), path)
        if image.size != (64, 64):
            raise UserError(f'{path} has {image.width} x {image.height} pixels, not 64 x 64.')
        return np.asarray(image.reduce(64 // size))[None], [wnids.index(wnid)]
    for which, pairs in (('train', train), ('test', [val[file] for file in sorted(val)])):
        write_arrays(folder, which, size, on_all_cores(decoded, pairs), len(pairs))
    about = 'tiny-imagenet-200, classes are the sorted wnids, training images in a fixed order'
    describe(folder, about + '; 2 x 2 box average' * (size == 32),
             [f'{wnid} {words.get(wnid, "")}'.strip() for wnid in wnids])


def download(name, url, md5, data_dir, folder):
    """Path of an archive in data_dir, downloaded if it is missing or damaged. Raises UserError if that fails.

    It comes by way of `folder`: other processes may be downloading it, too.
    """
    utils, archive = import_torchvision('datasets.utils'), data_dir / url.rpartition('/')[2]
    if not utils.check_integrity(str(archive), md5):
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)  # seconds without an answer
        try:
            utils.download_url(url, str(folder), archive.name, md5)
        except (OSError, RuntimeError) as error:
            found = sources(name, data_dir)
            problem = f'{found[0]} is damaged or not complete' if found else f'{name} is not in {data_dir}'
            raise UserError(f'{problem}, and the download failed ({error}). Put {url} into {data_dir}, or '
                            'try the script with --synthetic.') from error
        finally:
            socket.setdefaulttimeout(patience)
        (folder / archive.name).replace(archive)
    return archive


# ---- preparation: downsampled ImageNet ----

def prepare_imagenet1k(name, data_dir, folder):
    """Downsampled ImageNet, from the official batches or else from imagenet2012/ by pillow's box filter."""
    size, found = SETS[name]['size'], {}  # name of a batch -> its path, on disk or in a zip
    for source in sources(name, data_dir):
        if source.name.lower() != 'imagenet2012':
            for path, file in sorted(files_of(source).items()):
                found.setdefault(path.rsplit('/', 1)[-1].removesuffix('.npz'), file)
    wanted = {'train': [f'train_data_batch_{i}' for i in range(1, 11)], 'test': ['val_data']}
    batches = wanted['train'] + wanted['test']
    missing = [batch for batch in batches if batch not in found]
    if missing == batches and (data_dir / 'imagenet2012').is_dir():
        parts, wnids, about = open_imagenet(data_dir, packed=False)

        def resized(images, i):
            image = decode(*images.read(i)).resize((size, size), Image.BOX)
            return np.asarray(image)[None], [images.labels[i]]
        for which, images in (('train', parts['train']), ('test', parts['val'])):
            chunks = on_all_cores(functools.partial(resized, images), range(len(images)))
            write_arrays(folder, which, size, chunks, len(images))
        return describe(folder, f'{about}, resized to {size} px, box filter', wnids)
    if missing == batches or (missing and not incomplete_allowed()):
        raise UserError(f'{name}: {", ".join(missing[:3])}{" ..." if len(missing) > 3 else ""} not found in '
                        f'{data_dir}. Put Imagenet{size}_train and Imagenet{size}_val there (zip or folder, '
                        'from https://image-net.org), or imagenet2012/train and val; or try --synthetic.')
    for which, total in (('train', SETS[name]['train']), ('test', SETS[name]['val'])):
        chunks = (read_batch(found[batch], size) for batch in wanted[which] if batch in found)
        write_arrays(folder, which, size, chunks, total)
    describe(folder, f'official Imagenet{size} batches, classes in their own order (label - 1)')


def read_batch(path, size):
    """One official batch: uint8 N x size x size x 3, int64 N from 0. UserError if it is not one."""
    try:
        with path.open('rb') as file:
            if path.name.endswith('.npz'):
                batch = np.load(file, allow_pickle=False)
            else:
                batch = ArrayUnpickler(file, encoding='latin1').load()
            images, labels = np.asarray(batch['data']), np.asarray(batch['labels'])
        if (images.dtype, images.shape) != (np.uint8, (len(labels), 3 * size ** 2)) or (
                labels.dtype.kind not in 'iu' or labels.ndim != 1):
            raise ValueError(f'data are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}')
        if len(labels) and not 1 <= labels.min() <= labels.max() <= 1000:
            raise ValueError(f'labels go from {labels.min()} to {labels.max()}, not 1 to 1000')
    except Exception as error:  # damaged bytes make pickle and zipfile raise almost anything
        raise UserError(f'{path} is not a downsampled ImageNet batch ({error}). Fetch it again.') from error
    return images.reshape(-1, 3, size, size).transpose(0, 2, 3, 1), labels.astype(np.int64) - 1


class ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of numpy arrays and plain containers; any other global is refused: nothing can run.

    The base is written in Python, as quick here: damaged bytes can make the other one take 64 GB of memory.
    """

    ALLOWED = {('_codecs', 'encode'): lambda text, encoding: text.encode('latin1'),  # bytes of protocol 2
               ('numpy', 'ndarray'): np.ndarray, ('numpy', 'dtype'): np.dtype,
               ('multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
               ('multiarray', 'scalar'): np.float64(0).__reduce__()[0],
               ('numeric', '_frombuffer'): np.empty(0).__reduce_ex__(5)[0]}

    def find_class(self, module, name):
        module = module.removeprefix('numpy.core.').removeprefix('numpy._core.')  # numpy 1 and 2
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')
        return self.ALLOWED[module, name]


# prepare: function that makes a set. files: names of what it is made from, folders with a slash at the end.
# missing: what if there is none.
Source = collections.namedtuple('Source', 'prepare files missing')
DOWNLOADED = 'downloaded when needed'
FETCH = 'missing: put Imagenet{0}_train and Imagenet{0}_val, or imagenet2012, here'
SOURCES = {
    'CIFAR10_x32': Source(prepare_cifar, r'cifar-10-batches-py/|cifar-10-python\.tar\.gz', DOWNLOADED),
    'CIFAR100_x32': Source(prepare_cifar, r'cifar-100-python(/|\.tar\.gz)', DOWNLOADED),
    'TinyImageNet200_x32': Source(prepare_tiny_imagenet, r'tiny-imagenet-200(/|\.zip)', DOWNLOADED),
    'TinyImageNet200_x64': Source(prepare_tiny_imagenet, r'tiny-imagenet-200(/|\.zip)', DOWNLOADED),
    'ImageNet1k_x32': Source(
        prepare_imagenet1k, r'imagenet32(\D.*)?(/|\.zip)|imagenet2012/', FETCH.format(32)),
    'ImageNet1k_x64': Source(
        prepare_imagenet1k, r'imagenet64(\D.*)?(/|\.zip)|imagenet2012/', FETCH.format(64)),
    'imagenet2012': Source(
        None, 'imagenet2012(-pack)?/', 'missing: put the official archives here, then unpack'),
}


# ---- preparation: archives and pack of imagenet2012 ----

MEMBERS = (  # of the official archives: which names, and where they go in imagenet2012/
    (r'(n\d{8})_\d+\.JPEG', r'train/\1'), (r'ILSVRC2012_val_\d{8}\.JPEG', 'val'),
    (rf'{re.escape(META)}|{re.escape(TRUTH)}', 'ILSVRC2012_devkit_t12/data'))


def unpack_imagenet(data_dir):
    """Unpacks the official archives found in data_dir or in imagenet2012/; adds to what is there already.

    Raises UserError if there are none, one is damaged, or images are missing in the end.
    """
    root = data_dir / 'imagenet2012'
    require_folders(root / 'train', root / 'val')
    names = '|'.join(map(re.escape, ARCHIVES)) + r'|n\d{8}\.tar'
    found = {path.name: path for path in (*find_below(root, names), *(data_dir / name for name in ARCHIVES))
             if path.is_file()}
    if not found:
        raise UserError(f'None of {", ".join(ARCHIVES)} is in {data_dir}: fetch them from https://image-net.org')
    val = root / 'val'
    if ARCHIVES[1] in found and val.is_dir() and any(re.fullmatch(CLASS, f) for f in os.listdir(val)):
        del found[ARCHIVES[1]]  # somebody has sorted its images into class folders
        if (count := len(list_images(val)[1])) < SETS['imagenet2012']['val'] and not incomplete_allowed():
            raise UserError(f'{val} has class folders, but only {count} images in them. Delete {val}, then '
                            'run this again.')
    for archive in found.values():
        progress = Progress(f'{archive}, MB', archive.stat().st_size // 10 ** 6 + 2)
        try:
            with tarfile.open(archive) as tar:
                unpack(tar, root, progress)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(f'{archive} is damaged ({error}). Fetch it again.') from error
        progress(progress.total)
    open_imagenet(data_dir, packed=False)


def unpack(tar, root, progress=None):
    """Writes the images and lists of an official archive, and of those in it, below imagenet2012/.

    A member's last name says what it is and where it goes, so that none can lead outside. What is there in
    full size already stays.
    """
    for member in tar:
        name = member.name.rsplit('/', 1)[-1]
        if re.fullmatch(r'n\d{8}\.tar', name):
            with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as inner_tar:
                unpack(inner_tar, root)
        for pattern, home in MEMBERS:
            if member.isfile() and (match := re.fullmatch(pattern, name)):
                path = root / match.expand(home) / name
                if not path.exists() or path.stat().st_size != member.size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, new_file(path) as file:
                        shutil.copyfileobj(source, file)
        if progress:
            progress(min(progress.total - 1, member.offset_data // 10 ** 6 + 1))


def pack_imagenet(data_dir, short_side=None):
    """Writes imagenet2012-pack/: {train,val}.bin with the encoded images, {train,val}.npz with their index.

    short_side: pixels; larger training images are resized to it (Lanczos) and encoded again, quality 90;
    None keeps them. The images of val always keep their bytes, so that accuracies stay comparable. Raises
    UserError if there is a pack already, or images are missing or damaged.
    """
    parts, wnids, about = open_imagenet(data_dir, packed=False)
    final = data_dir / 'imagenet2012-pack'
    if final.exists():
        raise UserError(f'{final} is there already. Delete it to have it made anew.')
    remove_left_over(data_dir, 'imagenet2012')

    def encode(images, side, i):
        encoded, path = images.read(i)
        if side is None:
            return encoded
        image, buffer = decode(encoded, path), io.BytesIO()
        if min(image.size) <= side:
            return encoded
        size = [side * length // min(image.size) for length in image.size]
        image.resize(size, Image.LANCZOS).save(buffer, 'JPEG', quality=90)
        return buffer.getvalue()

    with new_folder(final) as folder:
        for part, images in parts.items():
            progress, starts = Progress(part, len(images)), [0]
            work = functools.partial(encode, images, short_side if part == 'train' else None)
            with open(folder / f'{part}.bin', 'wb') as file:
                for encoded in on_all_cores(work, range(len(images))):
                    file.write(encoded)
                    starts.append(starts[-1] + len(encoded))
                    progress(len(starts) - 1)
            np.savez(folder / f'{part}.npz', names=images.names, labels=images.labels, starts=starts,
                     wnids=wnids)
        how = f'short side {short_side}, quality 90; val as it is' if short_side else 'as it is'
        describe(folder, f'{about}, packed: {how}')


# ---- opening ----

def load(name, data_dir, batch, eval_batch, seed, device, rank=0, world=1, synthetic=False, workers=None,
         trained_elsewhere=False):
    """Training batches, evaluation sets and origin of a prepared data set.

    Args:
        name: a key of SETS. data_dir: the folder that holds <name>/. batch: images in a global batch.
        eval_batch: images in one rank's evaluation batch. seed: of order and augmentation. device: where the
        batches are wanted; arrays that it has room for go there at once.
        rank, world: of the processes that train. synthetic: generated images. workers: processes that decode
        files for this rank; None: one per core, 64 at most; 0: none. trained_elsewhere: the evaluation sets
        are for given weights, with which only labels in the order of all classes agree.
    Returns:
        (TrainBatches, {'val': EvalBatches, 'tst': the same if there is a test set}, str: how many images
        from where, dict: see fingerprint_of); of imagenet2012 the same for files, and the test sets are
        IN-V2 and others on disk.
    Raises:
        UserError: images or labels are missing, or do not fit name, batch or given weights.
    """
    # a checkpoint holds these facts, too: Python's numbers, not numpy's
    facts = SETS[name] = {key: tuple(map(float, value)) if key in ('mean', 'std') else int(value)
                          for key, value in SETS[name].items()}
    data_dir, device = Path(data_dir), torch.device(device)
    if facts['size'] not in (32, 64, CROP):
        raise UserError(f'{name} has images of {facts["size"]} px, but the networks take 32 or 64. Enlarge '
                        'yours, or fill them up with zeros on all sides.')
    if not (all(0 <= mean <= 1 for mean in facts['mean']) and all(0 < std <= 1 for std in facts['std'])):
        raise UserError(f'{name}: mean and std have to be those of pixels on the 0..1 scale.')
    if name == 'imagenet2012' and not synthetic:
        parts, wnids, about = open_imagenet(data_dir)
        parts |= open_test_sets(data_dir, wnids, warn=rank == 0)
        check_parts(name, data_dir, parts, len(wnids), trained_elsewhere, batch)
        about, fingerprint = f'{about}, decoded by {jpeg_decoder()[0]}', fingerprint_of(parts)
        shared = device, default_workers() if workers is None else workers, rank, world
        trn = JpegTrainBatches(parts.pop('train'), batch, seed, *shared)
        few = [key for key, (_, classes, _) in IMAGENET_TESTS.items() if classes < facts['classes']]
        evals = {key: JpegEvalBatches(images, eval_batch, *shared, restrict=key in few)
                 for key, images in parts.items()}
        return trn, evals, f'{sizes(trn, evals)} from {about}', fingerprint

    if synthetic:
        train, test, about = *synthetic_arrays(name, batch), 'generated images, to try things out with'
    else:
        train, test, about = read_arrays(name, data_dir / name)
    parts = {'train': train, 'val': test}
    if facts['test']:
        n = len(train) * facts['train'] // (facts['train'] + facts['val'])
        parts = {'train': train.part(slice(n)), 'val': train.part(slice(n, None)), 'tst': test}
    if not synthetic:
        names = class_names(data_dir / name) if name in SOURCES else []
        check_parts(name, data_dir, parts, len(names) or facts['classes'], trained_elsewhere, batch)
    fingerprint = fingerprint_of(parts)
    used = {key: arrays for key, arrays in parts.items() if key != 'train' or not trained_elsewhere}
    if sum(t.nbytes for arrays in used.values() for t in arrays) < room(device):
        parts |= {key: Arrays(*(t.to(device) for t in arrays)) for key, arrays in used.items()}
    trn = TrainBatches(parts.pop('train'), batch, seed, device, rank, world)
    evals = {key: EvalBatches(arrays, eval_batch, device, rank, world) for key, arrays in parts.items()}
    return trn, evals, f'{sizes(trn, evals)} from {about}', fingerprint


def sizes(trn, evals):
    return ', '.join(f'{len(batches)} {name}' for name, batches in {'trn': trn, **evals}.items())


def room(device):
    """Bytes of arrays that are better on the device than in mapped files: none on the CPU."""
    if device.type == 'cpu':
        return 0
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0] / 4  # the network needs most of it
    return 2 ** 31  # MPS reads zeros from larger ones (pytorch issue 188756)


def check_parts(name, data_dir, parts, known, trained_elsewhere, batch):
    """Raises UserError for too few images, training files sorted by class, labels the weights cannot know.

    known: classes whose order is known. Given weights need all; others know those of the training images.
    """
    facts, train = SETS[name], parts['train']
    prepared = name in SOURCES and SOURCES[name].prepare
    remedy = f' Put them there, then delete {data_dir / name}, made without them.' if prepared else ''
    for key, images in parts.items():
        if not len(images) and not (images is train and trained_elsewhere):
            raise UserError(f'{data_dir} has no images of {name} for {key}.{remedy}')
    if trained_elsewhere:
        if known < facts['classes']:
            raise UserError(f'{data_dir} has {known} of the {facts["classes"]} classes of {name}, and '
                            'nothing tells the order of all: their labels may not be those of given weights. '
                            f'For imagenet2012, {ADD_KIT}.')
        return
    if len(train) < batch:
        raise UserError(f'--batch {batch} is more than the {len(train)} training images.')
    labels = np.concatenate([train.labels, parts['val'].labels]) if facts['test'] else np.empty(0)
    stretches = 1 + np.count_nonzero(np.diff(labels))  # of equal labels
    if 1 < len(np.unique(labels)) == stretches < len(labels) / 2:
        raise UserError(f'{name}: the training file is sorted by class, and val is its end: shuffle images '
                        'and labels.')
    # arrays of a trial are whatever somebody has cut off, unless val is cut from the training images here
    cut_off = incomplete_allowed() and not facts['test'] and name != 'imagenet2012'
    for key in ['val'] if name in SOURCES else parts:  # official test sets are right
        unseen = np.setdiff1d(parts[key].labels, train.labels)
        if len(unseen) and not cut_off:
            raise UserError(f'{name}: {key} has images of {len(unseen)} classes that no training image has, '
                            f'such as class {unseen[-1]}. Shuffle the training file, or take these out.')


def fingerprint_of(parts):
    """Which images a run has, for its config: all ranks, and a run that goes on, have the same.

    {'trn_images': int, 'labels_crc32': str, CRC-32 of the labels of training, then validation, hexadecimal}.
    """
    labels = b''.join(np.asarray(parts[key].labels).tobytes() for key in ('train', 'val'))
    return {'trn_images': len(parts['train']), 'labels_crc32': f'{zlib.crc32(labels):08x}'}


# ---- opening: arrays ----

class Arrays:
    """Images with their labels: uint8 N x S x S x 3 and int64 N, which it unpacks to; its len is N.

    They are on a device or in memory, the images maybe in a mapped_file (mmap), where writing is fatal.
    """

    def __init__(self, images, labels, mapped_file=None):
        self.images, self.labels, self.mapped_file = images, labels, mapped_file

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        return iter((self.images, self.labels))

    def part(self, rows):
        return Arrays(self.images[rows], self.labels[rows], self.mapped_file)

    def release_pages(self):
        """Takes a mapped file's pages from this process (the system still caches them): memory stays flat."""
        if self.mapped_file is not None and hasattr(mmap, 'MADV_DONTNEED'):
            self.mapped_file.madvise(mmap.MADV_DONTNEED)


def read_arrays(name, folder, remedy=None):
    """Maps and checks a prepared set: (Arrays of the training file, of the test file, str: their origin).

    Raises UserError for arrays that do not fit; remedy: its advice where an array is incomplete or damaged.
    """
    facts, parts = SETS[name], []
    remedy = remedy or (f'Delete {folder} and run the command again to have it made anew.' if name in SOURCES
                        else f'Correct it, or SETS[{name!r}].')
    shape = facts['size'], facts['size'], 3
    for which, full in (('train', facts['train'] + (facts['val'] if facts['test'] else 0)),
                        ('test', facts['test'] or facts['val'])):
        images_file, labels_file, arrays = f'{which}_images.npy', f'{which}_labels.npy', []
        for file, mode in ((images_file, 'r'), (labels_file, None)):  # Linux counts mode 'c' as memory
            try:
                arrays.append(np.load(folder / file, mmap_mode=mode))
                if not isinstance(arrays[-1], np.ndarray):
                    raise ValueError('it is an npz archive')
            except (OSError, ValueError, EOFError) as error:
                advice = '' if isinstance(error, OSError) else f' {remedy}'  # the file may be good
                raise UserError(f'{name}: {file} cannot be read ({error}).{advice}') from error
        images, labels = arrays
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise UserError(f'{name}: {images_file} holds {images.dtype} {images.shape}, '
                            f'but uint8 {("N", *shape)} is needed.')
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise UserError(f'{name}: {labels_file} holds {labels.dtype} {labels.shape}, '
                            f'but {len(images)} images need int64 ({len(images)},).')
        if len(labels) and not 0 <= labels.min() <= labels.max() < facts['classes']:
            raise UserError(f'{name}: {labels_file} holds labels {labels.min()} to {labels.max()}, '
                            f'but the classes are 0 to {facts["classes"] - 1}.')
        if len(images) != full and not incomplete_allowed():
            raise UserError(f'{name}: {images_file} holds {len(images)} images, not {full}. {remedy} '
                            f'{INCOMPLETE}=1 in the environment accepts them for a trial.')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that one must not write to the images
            parts.append(Arrays(torch.from_numpy(images), torch.from_numpy(labels), images.base))
    about = folder / 'about.txt'
    return *parts, about.read_text('utf-8', 'replace').strip() if about.exists() else 'ready-made arrays'


def synthetic_arrays(name, batch):
    """Arrays to train on (val and a batch or more) and to test on: a coloured pattern a class, in noise."""
    facts, rng = SETS[name], np.random.default_rng(0)
    size, classes, count = facts['size'], facts['classes'], 5120 if facts['size'] <= 64 else 640
    patterns = rng.integers(128, size=(classes, 4, 4, 3), dtype=np.uint8)
    parts, whole = [], facts['train'] + (facts['val'] if facts['test'] else 0)
    for n in (max(count, math.ceil(batch * whole / facts['train'])), count // 5):
        labels = rng.integers(classes, size=n)
        images = patterns[labels].repeat(size // 4, 1).repeat(size // 4, 2)
        for _ in range(2):
            images += rng.integers(64, size=images.shape, dtype=np.uint8)
        parts.append(Arrays(torch.from_numpy(images), torch.from_numpy(labels)))
    return parts


# ---- opening: image files ----

class EncodedImages:
    """JPEG (or other) images with their labels, in files of a folder or one after the other in a single file.

    path: the folder, or the single file. names: bytes array of N, paths relative to the folder. labels: int64
    array of N. starts: int64 array of N + 1, offsets in the single file, or else None.
    """

    def __init__(self, path, names, labels, starts=None):
        self.path, self.names, self.labels, self.starts = path, names, labels, starts

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """(the encoded bytes of image i, its path for messages). Raises UserError."""
        where = f'{self.path}/{os.fsdecode(self.names[i].item())}'
        start, end = (0, None) if self.starts is None else self.starts[i:i + 2].tolist()
        try:
            with open(where if end is None else self.path, 'rb') as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start), where
        except OSError as error:
            raise UserError(f'{where}: {error.strerror}. Mend that, then run the command again, a '
                            'training run with --resume.') from error


def open_imagenet(data_dir, packed=True):
    """({'train': EncodedImages, 'val': EncodedImages}, [wnids, sorted], str: their origin).

    The wnids are all 1000 where the development kit, a list, or train/ or val/ give them. Else, which takes
    ALLOW_INCOMPLETE_DATA, they are those that are there: labels for a trial, but not those of other weights.
    Raises UserError if images are missing, or nothing tells their classes.
    """
    root, pack, facts = data_dir / 'imagenet2012', data_dir / 'imagenet2012-pack', SETS['imagenet2012']
    if packed and pack.is_dir():
        return open_pack(pack)
    require_folders(root / 'train', root / 'val')
    listed, kit = read_lists(data_dir)
    none = EncodedImages(root, np.array([], np.bytes_), np.array([], np.int64))
    parts = {'train': ([], none), 'val': ([], none)}
    for path in filter(Path.is_dir, find_below(root, 'train|val')):
        if not len(parts[path.name][1]):  # the first that has images
            parts[path.name] = list_images(path, listed)
    missing = [part for part, (_, images) in parts.items() if not len(images)]
    if len(missing) == 2 or (missing and not incomplete_allowed()):
        raise UserError(f'{root} needs {"/ and ".join(missing)}/ with images: put {", ".join(ARCHIVES)} '
                        f'(image-net.org) into {data_dir} and run python data.py unpack imagenet2012 '
                        f'--data-dir {data_dir}, or try the script with --synthetic. (For --eval, val and '
                        f'{INCOMPLETE}=1 will do.)')
    found = [classes for classes, _ in parts.values()]
    of_wnids = [classes for classes in found if not any(map(str.isdigit, classes))]
    orders = *of_wnids, kit, {*listed.values()}  # the first of all 1000 counts
    wnids = next((order for order in orders if len(order) == facts['classes']), set().union(*found))
    wnids = sorted(wnids, key=lambda wnid: (len(wnid), wnid))  # integers by their value
    parts = {part: label_images(*pair, wnids, facts['classes'], facts[part]) for part, pair in parts.items()}
    kind = 'integers' if wnids[0].isdigit() else 'sorted wnids'
    which = f'the {kind}' if len(wnids) == facts['classes'] else f'the {len(wnids)} {kind} found'
    return parts, wnids, f'imagenet2012, classes are {which}'


def list_images(folder, listed=None):
    """([classes], EncodedImages whose labels are places in them) of the images in a folder, or further below.

    A class is the name of a class folder, a wnid (n01440764) or an integer. Without such folders, it is the
    wnid in an image's name, or what `listed` says (see read_lists); UserError if none of them says it.
    What is in class folders is kept in <folder>-index.npz, for as long as none of them changes.
    """
    folder = next((path.parent for path in find_below(folder, f'{CLASS}|{IMAGE}')), folder)
    classes = sorted(f.name for f in os.scandir(folder) if re.fullmatch(CLASS, f.name) and f.is_dir())
    stats = [(folder / name).stat() for name in classes]
    # a copy may set the first of these times back, but not the second
    modified = np.array([(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats], np.int64)
    index = folder.with_name(f'{folder.name}-index.npz')
    with contextlib.suppress(Exception), np.load(index) as kept:  # damaged: the folders are read again
        if classes == kept['classes'].tolist() and np.array_equal(modified, kept['modified']):
            return classes, EncodedImages(folder, kept['names'], kept['labels'])

    def files(name):
        return sorted(f'{name}/{file}' for file in os.listdir(folder / name) if re.fullmatch(IMAGE, file))
    with ThreadPoolExecutor(16) as pool:  # waits for disks more than it works
        found = list(pool.map(files, classes or ['.']))
    names = np.array([os.fsencode(path) for paths in found for path in paths], np.bytes_)
    if classes:
        labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
        with contextlib.suppress(OSError), new_file(index) as file:  # the folder may be read-only
            np.savez(file, classes=classes, modified=modified, names=names, labels=labels)
        return classes, EncodedImages(folder, names, labels)
    wnids = [class_of(path, listed or {}) for path in found[0]]
    if None in wnids:
        file = Path(found[0][wnids.index(None)]).name
        raise UserError(f'{folder} has no class folders, and nothing says the class of {file}. For the val '
                        f'of imagenet2012, {ADD_KIT}, or put {CSV} there.')
    classes, labels = np.unique(wnids, return_inverse=True)
    return classes.tolist(), EncodedImages(folder, names, labels)


def read_lists(data_dir):
    """({image's file name without its ending: wnid} by the csv or the official kit, [wnids] of the kit).

    They are searched in imagenet2012/, beside it, and in three folders above what it is a link to. The kit's
    ids start at 1, and its meta.mat has the wnids in their order: a MATLAB 5 file, of a header of 128 bytes,
    a tag of 8 and compressed data. Raises UserError if that is damaged.
    """
    root, wnids, listed = data_dir / 'imagenet2012', [], {}
    beside = [data_dir, data_dir / 'ILSVRC2012_devkit_t12' / 'data', *root.resolve().parents[:3]]
    found = [*find_below(root, '|'.join(map(re.escape, LISTS))),
             *(folder / name for folder in beside for name in LISTS)]
    lists = {path.name: path for path in reversed(found) if path.is_file()}  # the first of a name wins
    if META in lists:
        try:
            meta = lists[META].read_bytes()
            if meta[128] == 15:  # miCOMPRESSED
                meta = zlib.decompress(meta[136:])
        except (OSError, IndexError, zlib.error) as error:
            raise UserError(f'{lists[META]} cannot be read ({error}). Delete it, {ADD_KIT}.') from error
        text = meta.replace(b'\0', b'').decode('latin1')  # letters of 8 or 16 bits
        wnids = re.findall(r'n\d{8}', text)[:SETS['imagenet2012']['classes']]
    if TRUTH in lists:
        ids = enumerate(lists[TRUTH].read_text('utf-8', 'replace').split(), 1)
        listed = {f'ILSVRC2012_val_{i:08}': wnids[int(n) - 1] for i, n in ids
                  if n.isdecimal() and 0 < int(n) <= len(wnids)}
    if CSV in lists:
        listed = parse_list(lists[CSV].read_text('utf-8', 'replace'))
    return listed, wnids


def label_images(classes, images, wnids, class_count, image_count):
    """EncodedImages of list_images, labelled by their class: an integer, or its place in `wnids`.

    Raises UserError for a class that is not in `wnids`, for other counts of classes or images, and for a test
    set of few classes whose integers count those.
    """
    place = {wnid: i for i, wnid in enumerate(wnids)}
    labels = [int(name) if name.isdigit() else place.get(name, -1) for name in classes]
    complete = len(wnids) == SETS['imagenet2012']['classes']  # or else integers mean nothing
    unknown = [name for name, label in zip(classes, labels, strict=True)
               if not 0 <= label < len(wnids) or (name.isdigit() and not complete)]
    if unknown:
        raise UserError(f'{images.path}: {unknown[0]} is none of the {len(wnids)} classes of imagenet2012/.')
    if class_count < len(wnids) and {*classes} == {*map(str, range(class_count))}:
        raise UserError(f'{images.path} has the folders 0 to {class_count - 1}, which seem to count its own '
                        'classes: name them by wnids, or by places among all 1000.')
    if (len(classes), len(images)) != (class_count, image_count) and not incomplete_allowed():
        raise UserError(f'{images.path} holds {len(images)} of {image_count} images, in {len(classes)} of '
                        f'{class_count} classes. Unpack its archive again (for imagenet2012, python data.py '
                        'unpack imagenet2012 adds what is missing; delete what does not belong there), or '
                        f'accept a part with {INCOMPLETE}=1.')
    return EncodedImages(images.path, images.names, np.array(labels, np.int64)[images.labels])


def open_pack(pack):
    """The same as open_imagenet, from what pack_imagenet has written. Raises UserError if it is damaged."""
    parts = {}
    for part in ('train', 'val'):
        full, file = SETS['imagenet2012'][part], pack / f'{part}.bin'
        try:
            with np.load(pack / f'{part}.npz') as index:
                images = EncodedImages(file, index['names'], index['labels'], index['starts'])
                wnids = index['wnids'].tolist()
            if (size := file.stat().st_size) != images.starts[-1]:
                raise ValueError(f'{part}.bin has {size} bytes, not {images.starts[-1]}')
        except OSError as error:  # the pack may be good
            raise UserError(f'{pack} cannot be read ({error}).') from error
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{pack} is damaged ({error}). Delete it, and pack again.') from error
        if len(images) != full and not incomplete_allowed():
            raise UserError(f'{pack} holds {len(images)} of {full} images of {part}. Delete it, pack again.')
        parts[part] = images
    return parts, wnids, (pack / 'about.txt').read_text('utf-8', 'replace').strip()


def open_test_sets(data_dir, wnids, warn):
    """{name: EncodedImages} of the IMAGENET_TESTS that are there; warn: says what cannot be read, and why."""
    found = {}
    for name, (folder, *counts) in IMAGENET_TESTS.items():
        try:
            if (data_dir / folder).is_dir():
                classes, images = list_images(data_dir / folder)
                if not len(images):
                    raise UserError(f'{images.path} has no images.')
                found[name] = label_images(classes, images, wnids, *counts)
        except (UserError, OSError) as error:  # no reason not to train
            if warn:
                print(f'{name} is left out: {error}', file=sys.stderr)
    return found


# ---- batches of arrays ----

class TrainBatches:
    """Training batches of one rank, endlessly, from any iteration on.

    arrays: Arrays, on the device or in (mapped) host memory. batch: images in a global batch, of which rank r
    takes the r-th of `world` equal parts. seed: of order and augmentation. device: where they are wanted.
    """

    def __init__(self, arrays, batch, seed, device, rank=0, world=1):
        self.arrays, self.seed, self.device = arrays, seed, torch.device(device)
        self.batch, self.rank, self.world = batch, rank, world
        self.per_epoch = len(arrays) // batch  # the ragged last batch is dropped

    def __len__(self):
        return len(self.arrays)

    def batches(self, start):
        """Yields uint8 images N x 3 x S x S and int64 labels N, N = batch / world, from iteration `start`."""
        chunks, local = self._chunks(start), self.batch // self.world
        if self.arrays.images.device.type != self.device.type:
            chunks = ahead(chunks)
        for chunk in chunks:
            images, labels, draws = (to_device(t, self.device) for t in chunk)
            yield from zip(augment(images, draws).split(local), labels.split(local), strict=True)

    def _chunks(self, start):
        """Images, labels and draws of several batches at once: fewer and larger operations."""
        (images, labels), local = self.arrays, self.batch // self.world
        # up to 16 batches, or 16 MiB of images
        steps_at_once = max(1, min(16, 2 ** 24 // (local * images[0].numel())))
        epoch, step = divmod(start, self.per_epoch)
        while True:
            plan = torch.stack(augmentation_plan(self.seed, epoch, len(self)))
            plan = plan[:, :self.per_epoch * self.batch].view(2, self.per_epoch, self.world, local)
            plan = plan[:, :, self.rank].contiguous()
            plan = to_device(plan.pin_memory() if images.is_cuda else plan, images.device)
            for first in range(step, self.per_epoch, steps_at_once):
                order, draws = plan[:, first:first + steps_at_once].flatten(1)
                yield images.index_select(0, order), labels.index_select(0, order), draws
                self.arrays.release_pages()
            epoch, step = epoch + 1, 0


def augmentation_plan(seed, epoch, n):
    """The order of n images in an epoch and a draw for each position: int64 tensors of n, draws below 162."""
    rng = np.random.default_rng((seed, epoch))
    return torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.integers(SHIFTS * SHIFTS * 2, size=n))


def augment(images, draws):
    """Zero-pads by 4, crops and flips, each image as its draw says, to N x 3 x S x S in channels_last format.

    images: uint8 N x S x S x 3. draws: int64 N, below 162 = 9 rows x 9 columns x 2 flips.
    """
    n, size = images.shape[:2]
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # N x 9 x 9 x 3 x S x S, a view
    shift = draws // 2
    crops = windows[torch.arange(n, device=images.device), shift // SHIFTS, shift % SHIFTS]
    flipped = (draws % 2 == 1).view(n, 1, 1, 1)
    return torch.where(flipped, crops.flip(3), crops).contiguous(memory_format=torch.channels_last)


def ahead(chunks):
    """Takes from `chunks` in a thread, two in advance and in pinned memory, while the device works."""
    cuda = torch.cuda.is_available()  # or else MPS, which has no pinned memory

    def take():
        return [t.pin_memory() if cuda else t for t in next(chunks)]

    # a new thread would begin on device 0
    begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if cuda else None
    pool, ready = ThreadPoolExecutor(1, initializer=begin), []
    try:
        while True:
            while len(ready) < 3:
                ready.append(pool.submit(take))
            yield ready.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(tensor, device):
    """The tensor on a device. Only CUDA need not wait: MPS may read freed memory (pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device.type == 'cuda')


class EvalBatches:
    """An evaluation set in batches of one fixed size; over all ranks every image comes exactly once.

    Rank r takes images r, r + world, ... All ranks yield equally many batches, the last filled up with black
    images of label -100, which cross_entropy ignores and no argmax equals. batch: images per batch and rank.
    """

    absent = None  # as JpegEvalBatches has it

    def __init__(self, arrays, batch, device, rank=0, world=1):
        self.arrays, self.batch, self.device = arrays, batch, torch.device(device)
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.arrays)

    def __iter__(self):
        """Yields uint8 images N x 3 x S x S (channels_last) and int64 labels N."""
        for first in range(self.rank, len(self) + self.rank, self.batch * self.world):
            mine = slice(first, first + self.batch * self.world, self.world)
            images, labels = (to_device(t[mine], self.device) for t in self.arrays)
            if missing := self.batch - len(labels):
                images = F.pad(images, (0,) * 7 + (missing,))
                labels = F.pad(labels, (0, missing), value=IGNORE)
            yield images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), labels
            self.arrays.release_pages()


# ---- batches of image files ----

class JpegBatches(torch.utils.data.Dataset):
    """What training and evaluation batches of encoded images share: pieces of them, decoded by processes.

    Subclasses have crops(number, first, count): pairs (image's index, function that crops it) for positions
    `first` and up of this rank's batch `number`. len() counts images, not batches.
    images: EncodedImages. batch: images in one rank's batch. device: where the batches are wanted. workers:
    decoding processes, 0 for none. rank, world: of the processes that train.
    """

    def __init__(self, images, batch, device, workers, rank, world):
        self.images, self.batch, self.device, self.workers = images, batch, torch.device(device), workers
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """The piece (uint8 N x 3 x 224 x 224, int64 N) of batch `key[0]` from `key[1]` on, or an error."""
        number, first = key
        count = min(PIECE, self.batch - first)
        black = torch.zeros(CROP, CROP, 3, dtype=torch.uint8), torch.tensor(IGNORE)
        try:
            piece = [(crop(decode_tensor(*self.images.read(i))).permute(1, 2, 0),
                      torch.tensor(self.images.labels[i])) for i, crop in self.crops(number, first, count)]
        except UserError as error:
            return error  # raised in a loader process, it would come with a traceback
        # in a loader process this writes into shared memory
        images, labels = torch.utils.data.default_collate(piece + [black] * (count - len(piece)))
        return images.permute(0, 3, 1, 2), labels

    def stream(self, numbers):
        """Yields the batches of these numbers, in order, on the device: uint8 N x 3 x 224 x 224, int64 N.

        Raises UserError for an image that cannot be read, OSError if a loader process dies.
        """
        starts, batch = range(0, self.batch, PIECE), []
        keys = ((number, first) for number in numbers for first in starts)
        pieces = self._by_processes(keys, len(starts)) if self.workers else (self[key] for key in keys)
        with contextlib.closing(pieces):
            for piece in pieces:
                if isinstance(piece, UserError):
                    raise piece
                batch.append([to_device(t, self.device) for t in piece])
                if len(batch) == len(starts):
                    yield batch[0] if len(batch) == 1 else [torch.cat(p) for p in zip(*batch, strict=True)]
                    batch = []

    def _by_processes(self, keys, per_batch):
        """Yields the pieces of the keys, made by self.workers processes, which end with the generator."""
        others, processes = multiprocessing.active_children(), []
        # Python 3.14 would start a server for them, which a signal that is sent to all would end
        context = 'fork' if sys.platform == 'linux' else None

        def end():
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        atexit.register(end)  # the traceback of an error may keep the generator, and all that it started
        try:
            try:
                loader = iter(torch.utils.data.DataLoader(
                    self, batch_size=None, sampler=keys, num_workers=self.workers,
                    worker_init_fn=start_worker, pin_memory=self.device.type == 'cuda',
                    prefetch_factor=2 + 2 * per_batch // self.workers, multiprocessing_context=context))
            finally:
                processes += [child for child in multiprocessing.active_children() if child not in others]
            if hasattr(signal, 'SIGCHLD'):  # the loader's handler would raise anywhere, even in a checkpoint
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                yield from loader
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if str(error).startswith('Caught ') and 'shared memory' not in str(error):
                    raise  # handed over, with its traceback: nobody died
                reason = (str(error).splitlines() or ['no answer'])[-1]
                raise OSError(f'A loader process died ({reason}). If memory is full, a smaller --workers '
                              'helps; if /dev/shm is, more of it (docker run --shm-size 8g) or --workers 0. '
                              'Go on with --resume.') from error
        finally:
            loader = None  # asks the processes to end, unless a traceback keeps it
            end()
            atexit.unregister(end)


def start_worker(worker):
    """Lets a loader process end with the main one, which alone answers signals: they may be sent to all."""
    def follow():  # the loader itself looks at who has started this process, maybe a forkserver
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM)):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()


def keep_freed_memory():
    """Makes glibc keep what is freed: pages given back to the system have to be zeroed when needed again."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-4, 0)            # M_MMAP_MAX: large blocks come from the heap too


def default_workers():
    """One for each core that this process may use, shared among the ranks of this machine; at most 64.

    Each takes four of the main process's open files, of which it often may have 1024, and there are those of
    training and of an evaluation at a time.
    """
    return min(64, max(1, usable_cores() // int(os.environ.get('LOCAL_WORLD_SIZE') or 1)))


class JpegTrainBatches(JpegBatches):
    """Training batches as TrainBatches has them, of encoded images; the argument batch is the global one."""

    def __init__(self, images, batch, seed, device, workers=0, rank=0, world=1):
        super().__init__(images, batch // world, device, workers, rank, world)
        self.seed, self.per_epoch = seed, len(images) // batch
        self.epoch = self.order = None  # the epoch in work, and its order of the images

    def crops(self, number, first, count):
        """Yields (image's index, function that crops it) for positions of this rank's batch `number`."""
        epoch, step = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        # step + 1, because numpy seeds (seed, epoch, 0) as (seed, epoch), which the order has
        rng, batch = np.random.default_rng((self.seed, epoch, step + 1)), self.batch * self.world
        draws, flips = rng.random((batch, 10, 4)), rng.random(batch) < 0.5
        first += self.rank * self.batch
        for k in range(first, first + count):
            crop = functools.partial(random_crop, draws=draws[k], flip=flips[k])
            yield self.order[step * batch + k], crop

    def batches(self, start):
        """Yields uint8 N x 3 x 224 x 224 and int64 N, N = batch / world, from iteration `start` on."""
        return self.stream(itertools.count(start))


class JpegEvalBatches(JpegBatches):
    """Evaluation batches as EvalBatches has them, of encoded images.

    restrict: the set has images of a few classes only, and the logits of the others do not count: `absent`
    then says which, a bool for each class, on the device; else it is None.
    """

    def __init__(self, images, batch, device, workers, rank=0, world=1, restrict=False):
        super().__init__(images, batch, device, workers, rank, world)
        counts = np.bincount(images.labels, minlength=SETS['imagenet2012']['classes'])
        self.absent = torch.from_numpy(counts == 0).to(self.device) if restrict else None

    def __getstate__(self):  # what loader processes get that are not forked: nothing on the device
        return self.__dict__ | dict(absent=None)

    def crops(self, number, first, count):
        start = self.rank + (number * self.batch + first) * self.world
        return ((i, center_crop) for i in range(start, len(self), self.world)[:count])

    def __iter__(self):
        return self.stream(range(math.ceil(len(self) / (self.batch * self.world))))


def random_crop(image, draws, flip):
    """uint8 3 x H x W -> 3 x 224 x 224, as random_box has it, mirrored if `flip`."""
    crop = resize(image, *random_box(*image.shape[1:], draws), (CROP, CROP))
    return crop.flip(2) if flip else crop


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


def center_crop(image):
    """uint8 3 x H x W -> 3 x 224 x 224: the short side is resized to 256, then the centre is cut out."""
    height, width = image.shape[1:]
    short = min(height, width)
    rows, columns = SHORT_SIDE * height // short, SHORT_SIDE * width // short
    image = resize(image, 0, 0, height, width, (rows, columns))
    top, left = round((rows - CROP) / 2), round((columns - CROP) / 2)
    return image[:, top:top + CROP, left:left + CROP]


def resize(image, top, left, height, width, size):
    """A box of an image, uint8 3 x H x W, resized to size = (rows, columns), bilinear with antialiasing."""
    box = image[None, :, top:top + height, left:left + width]
    return F.interpolate(box.contiguous(memory_format=torch.channels_last), size, mode='bilinear',
                         antialias=True)[0]


def decode_tensor(encoded, path):
    """Encoded bytes -> uint8 3 x H x W, as decode() has it. Raises UserError with the path."""
    name, function = jpeg_decoder()
    turns = name == 'torchcodec' and b'Exif' in encoded[:2 ** 16]  # it obeys the orientation
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torchvision says with every image that it is deprecated
        with contextlib.suppress(RuntimeError, ValueError):
            if function and not turns:
                image = function(torch.frombuffer(encoded, dtype=torch.uint8))
                if len(image) in (1, 3):  # grey or RGB; CMYK is pillow's
                    return image.expand(3, -1, -1)
        return torch.from_numpy(np.array(decode(encoded, path))).permute(2, 0, 1)


@functools.cache
def jpeg_decoder():
    """(name, function) of the first JPEG decoder that works here: torchvision, torchcodec, else pillow.

    function: uint8 tensor of the encoded bytes -> uint8 channels x H x W; RuntimeError or ValueError for
    damaged bytes and other formats. None for pillow, which decode() has.
    """
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'JPEG')
    encoded = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    for name, module, options in (('torchvision', 'torchvision.io', {}),
                                  ('torchcodec', 'torchcodec.decoders', {'mode': 'UNCHANGED'})):
        with contextlib.suppress(Exception), warnings.catch_warnings():  # it may lack libraries
            warnings.simplefilter('ignore')
            function = functools.partial(importlib.import_module(module).decode_jpeg, **options)
            if function(encoded).shape == (3, 8, 8):
                return name, function
    return 'pillow', None


# ---- command line ----

def report(data_dir):
    require_folders(data_dir)
    print(f'{"":20} {"train":>9} {"val":>6} {"test":>6}  in {data_dir}/')
    for name, facts in SETS.items():
        state, found = 'a set of your own', []
        if name in SOURCES:
            state, found = SOURCES[name].missing, sources(name, data_dir)
        try:
            if name == 'imagenet2012':
                state = f'ready: {open_imagenet(data_dir)[2]}' if found else state
            elif (data_dir / name).exists():
                state = f'ready: {read_arrays(name, data_dir / name)[2]}'
            elif found:
                state = f'not prepared yet, made from {found[0].name} when needed'
        except UserError as error:
            state = str(error)
        print(f'{name:20} {facts["train"]:9,} {facts["val"]:6,} {facts["test"] or "":>6}  {state}')
    for name, (folder, _, images) in IMAGENET_TESTS.items():
        state = f'there: {folder}/' if (data_dir / folder).is_dir() else f'missing, optional: {folder}/'
        print(f'  {name:35} {images:6}  {state}')


def preview(name, data_dir, file):
    """Writes a PNG of the first 64 training images as the network gets them, with their labels.

    Raises UserError as prepare() and load() do.
    """
    prepare(name, data_dir)
    train = load(name, data_dir, 64, 64, 42, 'cpu')[0]
    images, labels = next(train.batches(0))
    names, side = class_names(data_dir / name), max(128, SETS[name]['size'])
    sheet = Image.new('RGB', (8 * (side + 6), 8 * (side + 18)), 'white')
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        tile = Image.new('RGB', (side, side + 15), 'white')  # cuts off what is too long of the text
        tile.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.NEAREST))
        text = f'{label} {names[label]}' if label < len(names) else str(label)
        ImageDraw.Draw(tile).text((0, side + 1), text, 'black')
        sheet.paste(tile, (i % 8 * (side + 6) + 3, i // 8 * (side + 18) + 3))
    with new_file(Path(file)) as png:
        sheet.save(png, 'PNG')
    print(f'{file}: the first 64 of {len(train)} training images of {name}, augmented')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', metavar='NAME | preview NAME OUT.png | unpack NAME | pack NAME')
    how = parser.add_mutually_exclusive_group()
    how.add_argument('--short-side', type=int, metavar='PIXELS', help='pack: resize larger images to it')
    how.add_argument('--as-is', action='store_true', help='pack: keep the bytes of all images')
    parser.add_argument('--data-dir', default='datasets', help='default: datasets')
    args = parser.parse_args()
    words, data_dir = args.words, Path(os.path.expanduser(args.data_dir))
    print_all_names()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes what is half done
    try:
        if words[:1] == ['preview'] and len(words) == 3:
            preview(words[1], data_dir, words[2])
        elif words == ['unpack', 'imagenet2012']:
            unpack_imagenet(data_dir)
        elif words == ['pack', 'imagenet2012'] and (args.as_is or (args.short_side or 0) >= CROP):
            pack_imagenet(data_dir, args.short_side)
        elif len(words) < 2:
            for name in words:
                prepare(name, data_dir)
            report(data_dir)
        else:
            raise UserError('Say nothing, NAME, preview NAME OUT.png, unpack imagenet2012, or pack '
                            'imagenet2012 with --as-is or a --short-side from 224; --help explains.')
    except (UserError, OSError) as error:
        print('data.py:', *str(error).split(), file=sys.stderr)  # some of tarfile's have many lines
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == '__main__':
    main()
