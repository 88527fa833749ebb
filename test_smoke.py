"""The tests: `python -m pytest test_smoke.py`, under four minutes on two cores, no network and no GPU needed.

    python test_smoke.py --sync    copies the tail of cifar10_x32.py into the other scripts
"""
import ast
import csv
import difflib
import importlib
import io
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import resnet

HERE = Path(__file__).resolve().parent
SCRIPTS = ['cifar10_x32', 'cifar100_x32', 'tinyimagenet200_x32', 'tinyimagenet200_x64', 'imagenet1k_x32',
           'imagenet1k_x64', 'imagenet2012']
MARK = '# ==== identical in all seven scripts below this line (test_smoke.py) ====\n'


# ---- helpers ----

def run(*command, ok=0, timeout=120, **env):
    """Runs `python command...` in the repository and returns its output, both streams together."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, env={**os.environ, **env},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == ok, f'exit code {done.returncode}, not {ok}:\n{done.stdout}'
    return done.stdout


def start(command):
    """Starts `python command...` on the small data set; its output comes line by line from .stdout."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env={**os.environ, **SMALL},
                            stdout=subprocess.PIPE, text=True)


def torchrun(ranks, *command, **options):
    launch = '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'
    return run(*launch, *command, **options)


def says(text, *words):
    """One or two sentences that hold these words, and no traceback."""
    assert 'Traceback' not in text and len(text.strip().splitlines()) <= 2, text
    for word in words:
        assert str(word) in text, f'{word!r} is not in: {text}'


def rows(text):
    return [line.split() for line in text.splitlines() if line[:7].strip().isdigit()]


def result(text):
    lines = re.findall(r'^RESULT (.*)$', text, re.M)
    assert len(lines) == 1, text
    return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', lines[0]))


def only(folder, pattern):
    found = list(Path(folder).rglob(pattern))
    assert len(found) == 1, found
    return found[0]


def weights(folder):
    checkpoint = torch.load(only(folder, '*.last.pt'), weights_only=True)
    return {**checkpoint['net'], **{f'momentum {k}': v for k, v in checkpoint['momentum'].items()}}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_rows(a, b):
    """The logs of two folders have the same rows and results, each once; the times differ."""
    a, b = (only(folder, '*.log').read_text() for folder in (a, b))
    assert [row[:6] for row in rows(a)] == [row[:6] for row in rows(b)]
    times = dict.fromkeys(('iter_per_min', 'img_per_s', 'hours'))
    assert {**result(a), **times} == {**result(b), **times}


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    """--data-dir with a CIFAR10_x32 of 250 + 50 images: what a subprocess trains on in seconds."""
    folder = tmp_path_factory.mktemp('data') / 'CIFAR10_x32'
    folder.mkdir()
    (images, labels), (test_images, test_labels) = data.synthetic_arrays('CIFAR10_x32', 1)
    data.save_arrays(folder, 'train', images[:250], labels[:250])
    data.save_arrays(folder, 'test', test_images[:50], test_labels[:50])
    return folder.parent


SMALL = dict(ALLOW_INCOMPLETE_DATA='1')
SHORT = ['cifar10_x32.py', '--batch', 32, '--lr', 0.05, '--iters', 24, '--precision', 'fp32', '--device',
         'cpu']


# ---- resnet.py ----

REFERENCE = list(csv.DictReader(open(HERE / 'logs' / 'reference.csv')))


def test_parameter_counts_of_all_reference_rows():
    for row in REFERENCE:
        facts = data.SETS[row['dataset']]
        with torch.device('meta'):
            net = resnet.ResNet(int(row['depth']), int(row['width']), facts['size'], facts['classes'],
                                facts['mean'], facts['std'])
        assert resnet.parameters(net) == int(row['params']), row


@pytest.mark.parametrize('depth,width,name', [(18, 1, 'resnet18'), (34, 1, 'resnet34'), (50, 1, 'resnet50'),
                                              (101, 1, 'resnet101'), (152, 1, 'resnet152'),
                                              (50, 2, 'wide_resnet50_2')])
def test_torchvision_weights_both_ways(depth, width, name):
    from torchvision.models import get_model
    theirs = get_model(name)
    ours = resnet.ResNet(depth, width, 224, 1000, **data.IMAGENET_PIXELS)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():  # running statistics and biases too: none may be left out
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.4, 0.6)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
        mean, std = (torch.tensor(data.IMAGENET_PIXELS[k]).view(3, 1, 1) for k in ('mean', 'std'))
        expected = theirs.eval()((images / 255 - mean) / std)
        error = (ours.eval()(images) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, error
        get_model(name).load_state_dict(ours.state_dict(), strict=True)


def test_initial_values():
    net = resnet.ResNet(20, 2, 32, 10, (0.5,) * 3, (0.25,) * 3)
    assert not net.fc.weight.any() and not net.fc.bias.any()
    for name, parameter in net.named_parameters():
        if name.endswith('bn2.weight'):
            assert not parameter.any(), name
        elif parameter.ndim == 4 and parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx((2 / parameter[0].numel()) ** 0.5, rel=0.05), name
        elif name.endswith('weight') and 'bn' in name:
            assert (parameter == 1).all(), name


def test_logits_are_float32_and_layer_shapes():
    for size, side in ((32, 8), (64, 16), (224, 14)):
        net = resnet.ResNet(20, 1, size, 7, (0.5,) * 3, (0.25,) * 3)
        shapes = []
        net.layer3.register_forward_hook(lambda m, i, o, shapes=shapes: shapes.append((o.shape, o.dtype)))
        with torch.autocast('cpu', torch.bfloat16):
            logits = net(torch.zeros(2, 3, size, size, dtype=torch.uint8))
        assert shapes == [((2, 64, side, side), torch.bfloat16)]
        assert logits.dtype == torch.float32 and logits.shape == (2, 7)


def test_unknown_networks_are_refused():
    for depth, width, size in ((19, 1, 32), (20, 0, 32), (20, 1, 48)):
        with pytest.raises(ValueError, match='choose from|1 or more'):
            resnet.ResNet(depth, width, size, 10, (0.5,) * 3, (0.25,) * 3)


def test_resnet_prints_its_table():
    table = run('resnet.py')
    assert '272,474' in table and '25,557,032' in table and '4089.2' in table  # as torchvision documents


# ---- the seven scripts ----

def test_scripts_are_identical_below_the_mark():
    heads, tails = zip(*((HERE / f'{name}.py').read_text().split(MARK) for name in SCRIPTS), strict=True)
    for name, tail in zip(SCRIPTS, tails, strict=True):
        diff = difflib.unified_diff(tails[0].splitlines(), tail.splitlines(), 'cifar10_x32.py', name, n=0)
        assert tail == tails[0], '\n'.join([*diff][:10] + ['python test_smoke.py --sync repairs this'])
    assert not re.search('cifar|imagenet', tails[0], re.I) and 'if DATASET' not in tails[0]
    for head in heads:  # the same constants in the same order
        names = [node.targets[0].id for node in ast.parse(head).body if isinstance(node, ast.Assign)]
        assert names == ('DATASET DEPTH WIDTH SEED BATCH ITERS LR MOMENTUM WEIGHT_DECAY WARMUP EVAL_EVERY '
                         'PRECISION').split()


def test_recipes_give_every_reference_row():
    modules = {module.DATASET: module for module in map(importlib.import_module, SCRIPTS)}
    for row in REFERENCE:
        module, batch = modules[row['dataset']], int(row['batch'])
        assert float(row['lr']) == pytest.approx(module.LR * batch / module.BATCH)
        assert int(row['iters']) == module.ITERS * module.BATCH // batch
        assert float(row['wd']) == module.WEIGHT_DECAY
        assert module.SEED == 42 and module.MOMENTUM == 0.9 and module.EVAL_EVERY == 1000


def test_learning_rate():
    import cifar10_x32
    rates = [cifar10_x32.lr_at(it, 48000, 0.1) for it in range(48000)]
    assert rates[0] == 0
    for end, mean in ((1000, '1.041e-02'), (5000, '9.332e-02'), (6000, '9.992e-02'), (24000, '6.047e-02'),
                      (48000, '4.413e-05')):
        assert f'{sum(rates[end - 1000:end]) / 1000:.3e}' == mean


# ---- data.py: batches ----

def arrays(n, size=32, classes=10):
    rng = np.random.default_rng(1)
    return (torch.from_numpy(rng.integers(256, size=(n, size, size, 3), dtype=np.uint8)),
            torch.from_numpy(rng.integers(classes, size=n)))


def test_augment_against_a_plain_loop():
    images, _ = arrays(162)
    draws = torch.arange(162)
    fast = data.augment(images, draws)
    assert fast.is_contiguous(memory_format=torch.channels_last) and fast.dtype == torch.uint8
    for image, draw, out in zip(images.numpy(), draws.tolist(), fast, strict=True):
        top, left, flip = draw // 18, draw // 2 % 9, draw % 2
        crop = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top:top + 32, left:left + 32]
        crop = crop[:, ::-1] if flip else crop
        assert np.array_equal(out.permute(1, 2, 0).numpy(), crop)


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize('world', [2, 4])
def test_same_images_for_any_number_of_ranks_and_any_resume_point(world):
    images, labels = arrays(100)

    def sequence(rank, world, start, count):
        return take(data.TrainBatches(images, labels, 16, 7, 'cpu', rank, world).batches(start), count)
    whole = sequence(0, 1, 0, 20)  # more than three epochs of six batches
    ranks = [sequence(rank, world, 0, 20) for rank in range(world)]
    for (x, y), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
    for start in (1, 5, 6, 13):
        for (x, y), (a, b) in zip(whole[start:], sequence(0, 1, start, 20 - start), strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def test_every_image_once_an_epoch_and_a_new_order_each_time():
    images, _ = arrays(96)
    batches = data.TrainBatches(images, torch.arange(96), 16, 7, 'cpu').batches(0)
    epochs = [torch.cat([labels for _, labels in take(batches, 6)]) for _ in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(96)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    other = data.TrainBatches(images, torch.arange(96), 16, 8, 'cpu').batches(0)
    assert not torch.equal(torch.cat([labels for _, labels in take(other, 6)]), epochs[0])


def test_half_of_the_images_are_flipped_and_all_crops_are_equally_likely():
    order, draws = data.augmentation_plan(3, 0, 162 * 500)
    counts = torch.bincount(draws, minlength=162)
    assert len(counts) == 162 and 380 < counts.min() and counts.max() < 620  # 500 +- 5.4 standard deviations
    assert order.sort().values.equal(torch.arange(162 * 500))


def test_prefetching_gives_the_same_batches_and_hands_over_errors():
    images, labels = arrays(100)
    trn = data.TrainBatches(images, labels, 16, 7, 'cpu')
    for a, b in zip(take(trn._chunks(3), 5), take(data.ahead(trn._chunks(3)), 5), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def broken():
        yield labels,
        raise OSError('disk gone')
    chunks = data.ahead(broken())
    next(chunks)
    with pytest.raises(OSError, match='disk gone'):
        next(chunks)


@pytest.mark.parametrize('n,batch,world', [(50, 8, 1), (50, 8, 4), (7, 8, 4), (64, 8, 2), (1, 4, 2)])
def test_every_evaluation_image_once(n, batch, world):
    images, _ = arrays(n)
    ranks = [list(data.EvalBatches(images, torch.arange(n), batch, 'cpu', r, world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # or the ranks would wait for each other
    seen = []
    for x, y in (pair for batches in ranks for pair in batches):
        assert x.shape == (batch, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
        real = y != data.IGNORE
        assert torch.equal(x[real].permute(0, 2, 3, 1), images[y[real]])
        seen += y[real].tolist()
    assert sorted(seen) == list(range(n))


def test_evaluate_ignores_the_filling():
    import cifar10_x32
    images, labels = arrays(50)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    logits = net(images.permute(0, 3, 1, 2).float())
    batches = data.EvalBatches(images, labels, 8, 'cpu')
    accuracy, nll = cifar10_x32.evaluate(net, lambda x: net(x.float()), batches, lambda: None)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert nll == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_memory_does_not_grow_with_mapped_arrays(tmp_path):
    np.lib.format.open_memmap(tmp_path / 'x.npy', 'w+', np.uint8, (40000, 64, 64, 3)).flush()  # 490 MB
    program = f'''
import numpy, torch, data
def resident(): return int(open('/proc/self/status').read().split('RssFile:')[1].split()[0]) / 1024
array = numpy.load({str(tmp_path / 'x.npy')!r}, mmap_mode='c')
images = torch.from_numpy(array)
images.mapping = array.base
batches = data.TrainBatches(images, torch.zeros(40000, dtype=torch.long), 256, 0, 'cpu').batches(0)
for _ in range(20): next(batches)
before = resident()
for _ in range(150): next(batches)
print(resident() - before)
'''
    assert float(run('-c', program)) < 20  # MB


# ---- data.py: preparation ----

def jpeg(image, quality=90):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'JPEG', quality=quality)
    return buffer.getvalue()


@pytest.fixture
def tiny(tmp_path):
    """tiny-imagenet-200.zip with the official layout and a few images, some of them grey."""
    rng, wnids = np.random.default_rng(0), ['n02', 'n01', 'n03']
    files = {'wnids.txt': '\n'.join(wnids), 'words.txt': 'n01\tone, first\nn02\ttwo'}
    for i, wnid in enumerate(wnids):
        for j in range(4):
            image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
            files[f'train/{wnid}/images/{wnid}_{j}.JPEG'] = jpeg(image[:, :, 0] if j == 3 else image)
        files[f'val/images/val_{i}.JPEG'] = jpeg(image)
    files['val/val_annotations.txt'] = ''.join(f'val_{i}.JPEG\t{w}\t0\t0\n' for i, w in enumerate(wnids))
    with zipfile.ZipFile(tmp_path / 'tiny-imagenet-200.zip', 'w') as archive:
        for name, content in files.items():
            archive.writestr(f'tiny-imagenet-200/{name}', content)
    return tmp_path, files


def test_tiny_imagenet(tiny, monkeypatch):
    folder, files = tiny
    with pytest.raises(data.UserError, match='n01_4.JPEG .with .* others. is missing'):
        data.prepare('TinyImageNet200_x64', folder)
    assert not (folder / 'TinyImageNet200_x64').exists() and not list(folder.glob('*.part*'))
    monkeypatch.setenv(data.INCOMPLETE, '1')
    data.prepare('TinyImageNet200_x32', folder)
    read = data.read_arrays('TinyImageNet200_x64', folder / 'TinyImageNet200_x64')
    (images, labels), (test_images, test_labels), about = read
    names = sorted(name for name in files if name.startswith('train/'))
    for i, j in enumerate(np.random.RandomState(0).permutation(12)):
        expected = np.asarray(Image.open(io.BytesIO(files[names[j]])).convert('RGB'))
        assert np.array_equal(images[i], expected) and labels[i] == int(names[j][8]) - 1  # n01 -> 0
    assert test_labels.tolist() == [1, 0, 2] and 'sorted' in about
    small, _, _ = data.read_arrays('TinyImageNet200_x32', folder / 'TinyImageNet200_x32')
    blocks = images.numpy().reshape(12, 32, 2, 32, 2, 3).astype(float).mean((2, 4))
    assert np.array_equal(small[0], np.floor(blocks + 0.5)) and torch.equal(small[1], labels)
    assert (folder / 'TinyImageNet200_x32/classes.txt').read_text() == 'n01 one, first\nn02 two\nn03\n'
    trn, evals, _ = data.load('TinyImageNet200_x64', folder, 4, 4, 0, 'cpu')
    assert (len(trn), len(evals['val']), len(evals['tst'])) == (9, 3, 3)  # 12 * 81920 / 100000
    monkeypatch.delenv(data.INCOMPLETE)
    with pytest.raises(data.UserError, match='holds 12 of 100000 images'):
        data.load('TinyImageNet200_x64', folder, 4, 4, 0, 'cpu')


def test_a_damaged_image_is_named(tiny, monkeypatch):
    folder, files = tiny
    monkeypatch.setenv(data.INCOMPLETE, '1')
    root = folder / 'tiny-imagenet-200'
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    victim = root / 'train/n01/images/n01_2.JPEG'
    victim.write_bytes(victim.read_bytes()[:600])
    with pytest.raises(data.UserError, match='n01_2.JPEG is damaged'):
        data.prepare('TinyImageNet200_x64', folder)
    assert not list(folder.glob('TinyImageNet*'))


@pytest.mark.parametrize('member', ['../evil', '/etc/evil', 'a/../../evil', 'a\\..\\..\\evil', 'C:/evil'])
def test_zip_members_outside_of_their_folder_are_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / 'tiny-imagenet-200.zip', 'w') as archive:
        archive.writestr(member, 'x')
    with pytest.raises(data.UserError, match='points outside'):
        data.prepare('TinyImageNet200_x64', tmp_path)


def batch_file(rng, n, size):
    return {'data': rng.integers(256, size=(n, 3 * size * size), dtype=np.uint8),
            'labels': rng.integers(1, 1001, size=n).tolist(), 'mean': np.zeros(3 * size * size)}


@pytest.mark.parametrize('size,folders,zipped', [
    (32, ['Imagenet32_train'], False), (64, ['Imagenet64_train'], True),
    (64, ['Imagenet64_train_part1', 'Imagenet64_train_part2'], False)])
def test_official_imagenet_batches(tmp_path, monkeypatch, size, folders, zipped):
    rng, name = np.random.default_rng(0), f'ImageNet1k_x{size}'
    batches = {f'train_data_batch_{i}': batch_file(rng, 5, size) for i in range(1, 11)}
    homes = {batch: folders[i * len(folders) // 10] for i, batch in enumerate(batches)} | \
        {'val_data': f'Imagenet{size}_val'}
    batches['val_data'] = batch_file(rng, 7, size)
    for i, (batch, home) in enumerate(homes.items()):
        content = pickle.dumps(batches[batch], protocol=2 + i % 4)
        if zipped:
            with zipfile.ZipFile(tmp_path / f'{home}.zip', 'a') as archive:
                archive.writestr(batch, content)
        else:
            (tmp_path / home).mkdir(exist_ok=True)
            (tmp_path / home / batch).write_bytes(content)
    with pytest.raises(data.UserError, match='holds 50 of 1281167'):
        data.prepare(name, tmp_path)
    monkeypatch.setenv(data.INCOMPLETE, '1')
    data.prepare(name, tmp_path)
    (images, labels), (test_images, test_labels), about = data.read_arrays(name, tmp_path / name)
    pixels = np.concatenate([batches[f'train_data_batch_{i}']['data'] for i in range(1, 11)])
    assert np.array_equal(images, pixels.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))
    assert (labels + 1).tolist() == sum([b['labels'] for name, b in batches.items() if 'train' in name], [])
    assert test_labels.tolist() == [x - 1 for x in batches['val_data']['labels']] and 'own order' in about
    trn, evals, _ = data.load(name, tmp_path, 8, 4, 0, 'cpu')
    assert len(trn) == 50 and list(evals) == ['val'] and len(evals['val']) == 7


def test_missing_imagenet_batches_are_named(tmp_path):
    with pytest.raises(data.UserError, match='train_data_batch_1, .* not found in .* --synthetic'):
        data.prepare('ImageNet1k_x32', tmp_path)
    (tmp_path / 'Imagenet32_train').mkdir()
    for i in range(1, 10):
        (tmp_path / 'Imagenet32_train' / f'train_data_batch_{i}').touch()
    with pytest.raises(data.UserError, match='train_data_batch_10, val_data not found'):
        data.prepare('ImageNet1k_x32', tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ('touch evil',)


@pytest.mark.parametrize('content', [
    pickle.dumps({'data': Evil(), 'labels': []}), pickle.dumps(np.array([Evil()], object)), b'', b'\x80\x04x',
    pickle.dumps({'labels': [1]}), pickle.dumps({'data': np.zeros((1, 9), np.uint8), 'labels': [1]}),
    pickle.dumps({'data': np.zeros((1, 3072), np.uint8), 'labels': [0]})])
def test_pickles_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'batch').write_bytes(content)
    with pytest.raises(data.UserError, match='is not a downsampled ImageNet batch'):
        data.read_batch(tmp_path / 'batch', 32)
    assert not (tmp_path / 'evil').exists()


def test_downsampled_imagenet_from_the_original_images(tmp_path, monkeypatch):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        for wnid in ('n02', 'n01'):
            (tmp_path / 'imagenet2012' / part / wnid).mkdir(parents=True)
            image = rng.integers(256, size=(90, 120, 3), dtype=np.uint8)
            (tmp_path / 'imagenet2012' / part / wnid / f'{part}.JPEG').write_bytes(jpeg(image))
    data.prepare('ImageNet1k_x32', tmp_path)
    (images, labels), _, about = data.read_arrays('ImageNet1k_x32', tmp_path / 'ImageNet1k_x32')
    source = Image.open(tmp_path / 'imagenet2012/train/n01/train.JPEG').convert('RGB')
    assert np.array_equal(images[0], np.asarray(source.resize((32, 32), Image.BOX)))
    assert labels.tolist() == [0, 1] and 'sorted wnids' in about


def test_ready_made_arrays_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    folder = tmp_path / 'CIFAR10_x32'
    folder.mkdir()
    good = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)

    def refused(images, labels, words):
        np.save(folder / 'train_images.npy', images)
        np.save(folder / 'train_labels.npy', labels)
        with pytest.raises(data.UserError, match=words):
            data.read_arrays('CIFAR10_x32', folder)
    data.save_arrays(folder, 'test', *good)
    refused(good[0].astype(np.float32), good[1], 'float32')
    refused(good[0].transpose(0, 3, 1, 2), good[1], r'but uint8 .*32, 32, 3. is needed')
    refused(good[0], good[1][:3], '4 images need int64')
    refused(good[0], good[1].astype(np.int32), 'int32')
    refused(good[0], good[1] + 10, 'labels 10 to 10, but the classes are 0 to 9')
    data.save_arrays(folder, 'train', *good)
    os.truncate(folder / 'test_images.npy', 5000)
    with pytest.raises(data.UserError, match='test_images.npy cannot be read.*Delete'):
        data.read_arrays('CIFAR10_x32', folder)
    (folder / 'test_labels.npy').unlink()
    with pytest.raises(data.UserError, match='lacks test_labels.npy'):
        data.prepare('CIFAR10_x32', tmp_path)


def test_a_killed_preparation_is_begun_anew(tiny):
    folder, _ = tiny
    slow = ('import data, os, signal\n'
            'data.describe = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n'
            f'data.prepare("TinyImageNet200_x64", {str(folder)!r})')
    run('-c', slow, ok=-9, **SMALL)
    assert len(list(folder.glob('TinyImageNet200_x64.part*'))) == 1
    run('data.py', 'TinyImageNet200_x64', '--data-dir', folder, **SMALL)
    assert not list(folder.glob('*.part*'))
    run('-c', f'import data; data.read_arrays("TinyImageNet200_x64", data.Path({str(folder)!r}) / '
        '"TinyImageNet200_x64")', **SMALL)


def test_data_report_and_preview(small, tmp_path):
    report = run('data.py', '--data-dir', small, **SMALL)
    assert re.search(r'CIFAR10_x32 +40,960 +9,040 .*ready', report) and 'downloaded when needed' in report
    run('data.py', 'preview', 'CIFAR10_x32', tmp_path / 'sheet.png', '--data-dir', small, **SMALL)
    assert Image.open(tmp_path / 'sheet.png').size == (1072, 1168)
    says(run('data.py', 'CIFAR11', ok=2), 'no data set CIFAR11', 'CIFAR10_x32')


# ---- data.py: images in files ----

def picture(rng, height, width):
    """A smooth random image: what JPEG and resizing are made for."""
    coarse = rng.integers(256, size=(6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


def class_folders(root, names, count, sizes=((120, 160), (200, 150), (300, 400)), suffix='.JPEG'):
    rng = np.random.default_rng(len(names))
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            image = picture(rng, *sizes[(i + j) % len(sizes)])
            (root / name / f'{name}_{j}{suffix}').write_bytes(jpeg(image))


WNIDS = [f'n{i:08}' for i in range(11)]


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory):
    """--data-dir with a small imagenet2012 and test sets: integer folders, and a few classes only."""
    folder = tmp_path_factory.mktemp('imagenet')
    class_folders(folder / 'imagenet2012/train', WNIDS, 5)
    class_folders(folder / 'imagenet2012/val', WNIDS, 2)
    class_folders(folder / 'imagenetv2-matched-frequency-format-val', ['0', '1', '10', '2'], 1)
    class_folders(folder / 'imagenet-r', WNIDS[1:3], 2, suffix='.jpg')
    return folder


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8).copy()


def test_all_kinds_of_files_are_decoded_as_pillow_does():
    image = Image.fromarray(picture(np.random.default_rng(0), 90, 120))
    turned = Image.Exif()
    turned[0x0112] = 6  # the EXIF tag of orientation: to be ignored
    files = [encoded(image.convert(mode), kind) for mode, kind in (
        ('RGB', 'JPEG'), ('L', 'JPEG'), ('CMYK', 'JPEG'), ('RGB', 'PNG'), ('P', 'PNG'), ('LA', 'PNG'))]
    files += [encoded(image, 'JPEG', exif=turned), encoded(image, 'JPEG', progressive=True)]
    for file in files:
        expected = np.asarray(Image.open(io.BytesIO(file.tobytes())).convert('RGB'))
        assert np.array_equal(data.decode_tensor(file, 'x').permute(1, 2, 0), expected)
    deep = encoded(Image.fromarray(np.arange(0, 65536, 16, np.uint16).reshape(64, 64)), 'PNG')
    assert np.array_equal(data.decode_tensor(deep, 'x')[1].flatten(), np.arange(4096) // 16)
    for damaged in (files[0][:600], files[3][:300], np.zeros(0, np.uint8), np.zeros(99, np.uint8)):
        with pytest.raises(data.UserError, match='some/where.JPEG is damaged'):
            data.decode_tensor(damaged, 'some/where.JPEG')


def test_evaluation_crop_against_torchvision():
    from torchvision import transforms
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for height, width in ((375, 500), (500, 333), (256, 256), (200, 700), (600, 601)):
        image = picture(np.random.default_rng(height), height, width)
        ours = data.center_crop(torch.from_numpy(image.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        error = np.abs(ours.astype(int) - np.asarray(usual(Image.fromarray(image))).astype(int))
        assert ours.shape == (224, 224, 3) and error.mean() < 0.3 and error.max() <= 2, (height, width)


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


def jpeg_train(folder, workers=0, rank=0, world=1, seed=7):
    return data.load('imagenet2012', folder, 8, 4, seed, 'cpu', rank, world, workers=workers)[0]


def test_same_crops_for_any_number_of_workers_and_ranks(imagenet, monkeypatch):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    monkeypatch.setattr(data, 'PIECE', 3)  # several pieces a batch, the last a smaller one
    whole = take(jpeg_train(imagenet).batches(0), 14)  # two epochs of six batches, and more
    assert whole[0][0].shape == (8, 3, 224, 224) and whole[0][0].dtype == torch.uint8
    for workers in (1, 3):
        for a, b in zip(whole, take(jpeg_train(imagenet, workers).batches(0), 14), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    ranks = [take(jpeg_train(imagenet, 0, rank, 2).batches(0), 14) for rank in range(2)]
    for a, *parts in zip(whole, *ranks, strict=True):
        for k in range(2):
            assert torch.equal(a[k], torch.cat([part[k] for part in parts]))
    for a, b in zip(whole[5:], take(jpeg_train(imagenet).batches(5), 9), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(whole[0][0], next(jpeg_train(imagenet, seed=8).batches(0))[0])
    first, second = (torch.cat([labels for _, labels in whole[i:i + 6]]) for i in (0, 6))
    assert torch.bincount(first).max() <= 5 and not torch.equal(first, second)
    seen = {x.numpy().tobytes() for images, _ in whole for x in images}
    assert len(seen) == 14 * 8  # other crops in every epoch


@pytest.mark.parametrize('batch,world,workers', [(4, 1, 0), (4, 2, 2), (64, 1, 1), (2, 4, 0)])
def test_every_evaluation_file_once(imagenet, monkeypatch, batch, world, workers):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    ranks = []
    for rank in range(world):
        evals = data.load('imagenet2012', imagenet, 8, batch, 0, 'cpu', rank, world, workers=workers)[1]
        ranks.append(list(evals['val']))
    assert len(evals['val']) == 22 and len({len(batches) for batches in ranks}) == 1
    images, labels = (torch.cat([pair[k] for batches in ranks for pair in batches]) for k in range(2))
    assert len(images) == len(ranks[0]) * batch * world
    images, labels = images[labels >= 0], labels[labels >= 0]
    assert labels.bincount().tolist() == [2] * 11 and len({x.numpy().tobytes() for x in images}) == 22


def test_test_sets_of_imagenet(imagenet, monkeypatch):
    """Integer folders are classes 0, 1, 10, 2 and not 0, 1, 2, 3; few classes restrict the logits to them."""
    import imagenet2012
    with pytest.raises(data.UserError, match='11 class folders .* not 1000'):
        data.prepare('imagenet2012', imagenet)
    monkeypatch.setenv(data.INCOMPLETE, '1')
    _, evals, _ = data.load('imagenet2012', imagenet, 8, 4, 0, 'cpu', workers=0)
    assert list(evals) == ['val', 'IN', 'IN-V2', 'IN-R'] and evals['IN'] is evals['val']
    assert evals['IN-V2'].images.labels.tolist() == [0, 1, 10, 2] and evals['IN-V2'].absent is None
    assert evals['IN-R'].images.labels.tolist() == [1, 1, 2, 2]
    logits = torch.full((4, 1000), 5.0)
    logits[:, 1] = 1.0
    accuracy, nll = imagenet2012.evaluate(torch.nn.Identity(), lambda x: logits, evals['IN-R'], lambda: None)
    restricted = F.cross_entropy(torch.tensor([[1.0, 5.0]] * 4), torch.tensor([0, 0, 1, 1]))
    assert accuracy == 0.5 and nll == pytest.approx(restricted.item())
    with pytest.raises(data.UserError, match='n00000002 is not one of the 2 classes'):
        data.open_folder(imagenet / 'imagenet-r', WNIDS[:2], 200, 30000)
    monkeypatch.delenv(data.INCOMPLETE)
    with pytest.raises(data.UserError, match='holds 4 of 30000 images, in 2 of 200 class folders'):
        data.open_folder(imagenet / 'imagenet-r', WNIDS, 200, 30000)


def test_the_list_of_files_follows_the_folders(tmp_path):
    class_folders(tmp_path / 'train', WNIDS[:2], 2)
    before = data.list_images(tmp_path / 'train')
    assert (tmp_path / 'train-index.npz').exists()
    for a, b in zip(before, data.list_images(tmp_path / 'train'), strict=True):
        assert np.array_equal(a, b)
    (tmp_path / 'train' / WNIDS[1] / 'new.JPEG').touch()
    assert len(data.list_images(tmp_path / 'train')[1]) == 5
    (tmp_path / 'train-index.npz').write_bytes(b'damaged')
    assert len(data.list_images(tmp_path / 'train')[1]) == 5


@pytest.fixture
def archives(tmp_path):
    """The official archives, small: training tars in a tar, flat val, development kit with a MATLAB file."""
    rng = np.random.default_rng(0)

    def tar(path, files, mode='w'):
        with tarfile.open(path, mode) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    inner = {}
    for wnid in WNIDS[:5]:
        tar(tmp_path / 'inner', {f'{wnid}_{j}.JPEG': jpeg(picture(rng, 80, 90)) for j in range(2)})
        inner[f'{wnid}.tar'] = (tmp_path / 'inner').read_bytes()
    tar(tmp_path / data.ARCHIVES[0], inner)
    order = [3, 1, 4, 0, 2]  # the kit has an order of its own
    truth = [1, 5, 2, 2, 3, 4] * 9000
    # as MATLAB writes it: a header of 128 bytes, a tag of 8, compressed data with 16-bit letters
    synsets = b'\1\2\0\3'.join(WNIDS[i].encode('utf-16-le') for i in order)
    kit = {'meta.mat': b'x' * 128 + b'\x0f\0\0\0\0\0\0\0' + zlib.compress(synsets), '../../evil': b'x',
           'ILSVRC2012_validation_ground_truth.txt': '\n'.join(map(str, truth[:50000])).encode()}
    tar(tmp_path / data.ARCHIVES[2], {f'ILSVRC2012_devkit_t12/data/{k}': v for k, v in kit.items()}, 'w:gz')
    images = {f'ILSVRC2012_val_{i:08}.JPEG': jpeg(picture(rng, 60, 70)) for i in range(1, 7)}
    tar(tmp_path / data.ARCHIVES[1], images | {'/tmp/evil.JPEG': b'x'})
    return tmp_path, [order[i - 1] for i in truth[:6]]


def test_official_archives_and_flat_val(archives, monkeypatch):
    folder, val_labels = archives
    with pytest.raises(data.UserError, match='unpack imagenet2012.* --synthetic'):
        data.prepare('imagenet2012', folder)
    monkeypatch.setenv(data.INCOMPLETE, '1')
    (folder / 'imagenet2012/train' / WNIDS[0]).mkdir(parents=True)  # unpacked before it was stopped
    (folder / 'imagenet2012/train' / WNIDS[0] / 'a.JPEG').touch()
    data.unpack_imagenet(folder)
    parts, wnids, _ = data.open_imagenet(folder)
    assert wnids == WNIDS[:5] and parts['train'].labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert parts['val'].labels.tolist() == val_labels and len(data.decode_tensor(*parts['val'].read(5))) == 3
    assert not list(folder.rglob('*evil*')) and not list(folder.rglob('*.part*'))
    (folder / 'imagenet2012/val/ILSVRC2012_val_00000003.JPEG').unlink()
    (folder / 'imagenet2012/ILSVRC2012_devkit_t12/data/meta.mat').write_bytes(b'x' * 200)
    with pytest.raises(data.UserError, match='do not fit together'):
        data.open_imagenet(folder)
    for archive in data.ARCHIVES:
        os.truncate(folder / archive, 700)
    with pytest.raises(data.UserError, match='is damaged .*Fetch it again'):
        shutil.rmtree(folder / 'imagenet2012')
        data.unpack_imagenet(folder)


@pytest.mark.parametrize('short_side', [None, 64])
def test_pack(imagenet, tmp_path, monkeypatch, short_side):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    (tmp_path / 'imagenet2012').symlink_to(imagenet / 'imagenet2012')
    files = data.open_imagenet(tmp_path)[0]
    data.pack_imagenet(tmp_path, short_side)
    packed, wnids, about = data.open_imagenet(tmp_path)
    assert wnids == WNIDS and 'packed' in about
    for part in ('train', 'val'):
        assert np.array_equal(packed[part].labels, files[part].labels)
        for i in range(len(files[part])):
            (a, path), (b, where) = files[part].read(i), packed[part].read(i)
            assert path.name == where.name
            if part == 'val' or not short_side:
                assert np.array_equal(a, b)
            else:
                assert min(data.decode_tensor(b, '').shape[1:]) == 64
    with pytest.raises(data.UserError, match='is there already'):
        data.pack_imagenet(tmp_path)
    os.truncate(tmp_path / 'imagenet2012-pack/train.bin', 500)
    with pytest.raises(data.UserError, match='train.bin has 500 bytes'):
        data.open_imagenet(tmp_path)


def test_torchvision_weights_are_evaluated_as_torchvision_does(imagenet, tmp_path, monkeypatch, capsys):
    from torchvision.models import resnet18
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    import imagenet2012
    torch.manual_seed(0)
    net = resnet18().eval()
    torch.save(net.state_dict(), tmp_path / 'resnet18.pth')
    usual = Compose([Resize(256), CenterCrop(224), ToTensor(),
                     Normalize(*(data.IMAGENET_PIXELS[k] for k in ('mean', 'std')))])
    files = sorted((imagenet / 'imagenet2012/val').rglob('*.JPEG'))
    with torch.no_grad():
        logits = net(torch.stack([usual(Image.open(file)) for file in files]))
    labels = torch.tensor([WNIDS.index(file.parent.name) for file in files])
    command = ['imagenet2012.py', '--data-dir', imagenet, '--precision', 'fp32', '--device', 'cpu',
               '--batch', 8, '--workers', 0, '--eval', tmp_path / 'resnet18.pth']
    monkeypatch.setenv(data.INCOMPLETE, '1')
    monkeypatch.setattr(sys, 'argv', [*map(str, command)])
    imagenet2012.main()
    printed = capsys.readouterr().out
    accuracy, nll = re.search(r'^IN +acc (\S+) +nll (\S+) +22 images', printed, re.M).groups()
    assert float(accuracy) == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    assert float(nll) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=2e-3)
    monkeypatch.setattr(sys, 'argv', [*map(str, command), '--depth', '34'])
    with pytest.raises(data.UserError, match='does not fit --depth'):
        imagenet2012.main()


def test_damaged_files_and_killed_loader_processes(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv(data.INCOMPLETE, '1')
    shutil.copytree(imagenet / 'imagenet2012', tmp_path / 'imagenet2012')
    batches = jpeg_train(tmp_path, 1).batches(0)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(OSError, match='A loader process died .*--workers'):
        take(batches, 99)
    for file in (tmp_path / 'imagenet2012/train').rglob('*_4.JPEG'):
        os.truncate(file, 900)
    for workers in (0, 2):
        with pytest.raises(data.UserError, match=r'_4.JPEG is damaged') as error:
            take(jpeg_train(tmp_path, workers).batches(0), 6)
        says(str(error.value))
    victim = next((tmp_path / 'imagenet2012/val').rglob('*_0.JPEG'))
    evals = data.load('imagenet2012', tmp_path, 8, 4, 0, 'cpu', workers=0)[1]
    victim.unlink()
    with pytest.raises(data.UserError, match='_0.JPEG: No such file'):
        list(evals['val'])


# ---- logs/bench.py ----

def test_bench_measures_ours_and_the_usual_style(monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE / 'logs')
    import bench
    assert [bench.net(text) for text in ('18x1', '20x4:64', '50x1@224:16')] == [
        (18, 1, 32, 256), (20, 4, 32, 64), (50, 1, 224, 16)]
    monkeypatch.setattr(sys, 'argv', ['bench.py', '20x1:64', '--ours', '--turns', '1', '--updates', '2'])
    bench.main()
    *_, head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:2] == ['net', 'px'] and row[:4] == ['20x1', '32', '64', 'ours']
    iter_per_min, img_per_s, wait, start, memory, limit = map(float, row[5:])
    assert img_per_s == pytest.approx(iter_per_min * 64 / 60, abs=1) and 0 < limit < 150
    assert 0 <= wait < 100 and 1 < start < 60 and 200 < memory < 20000
    bench.usual(20, 1, 32, 64, 3)  # in rows like those of our logs
    usual = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in usual] == ['1', '2', '3']
    assert all(len(row) == 11 and float(row[7]) > 0 and 0 <= float(row[8]) <= 100 for row in usual)
    monkeypatch.setattr(sys, 'argv', ['bench.py', '19x1'])
    with pytest.raises(SystemExit, match='2'):
        bench.main()
    assert '19x1 is no net like 20x1' in capsys.readouterr().err


# ---- runs ----

@pytest.fixture(scope='session')
def reference_run(small, tmp_path_factory):
    """The log folder and output of an uninterrupted run of 24 updates with a row after every second."""
    logs = tmp_path_factory.mktemp('logs')
    return logs, run(*SHORT, '--data-dir', small, '--log-dir', logs, **SMALL)


def test_a_run_learns_and_its_log_is_complete(tmp_path):
    run('cifar10_x32.py', '--synthetic', '--iters', 40, '--batch', 128, '--lr', 0.1, '--log-dir', tmp_path)
    log = only(tmp_path, '*.log')
    run_name, seed = log.parts[-3:-1]
    assert log.parts[-4] == 'CIFAR10_x32-synthetic' and seed == '42'
    assert run_name.startswith('resnet_20x1-batch_128-iter_40-wd_0.0010')
    text = log.read_text()
    table = rows(text)
    assert [int(row[0]) for row in table] == list(range(4, 41, 4))
    assert float(table[-1][2]) < 2.0 < float(table[0][2]) and float(table[-1][4]) > 0.3, text
    fields = result(text)
    assert fields['tst_acc'] == re.search(r'^tst +acc (\S+)', text, re.M)[1]
    assert float(fields['tst_acc']) > 0.3
    best = max(table, key=lambda row: float(row[4]))
    assert fields['val_acc'] == best[4] and best[-1] == '*'
    for key in ('dataset depth width seed params batch iters lr wd precision best_iter val_acc val_nll '
                'tst_acc tst_nll iter_per_min img_per_s hours world device torch').split():
        assert fields[key], key
    for name in ('command', 'commit', 'sha256 resnet.py', 'precision', 'images', 'momentum'):
        assert re.search(f'^{name} *: .', text, re.M), name
    assert max(len(line) for line in text.splitlines() if line[:7].strip().isdigit()) <= 110


def test_killed_and_resumed_weights_are_bit_identical(small, reference_run, tmp_path):
    command = [*SHORT, '--data-dir', small, '--log-dir', tmp_path, '--resume']  # the first time it starts
    for row in (4, 10):
        process = start(command)
        for line in process.stdout:
            if line[:7].strip() == str(row):
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run(*command, **SMALL)
    assert_same_weights(weights(tmp_path), weights(reference_run[0]))
    assert_same_rows(tmp_path, reference_run[0])


def test_a_checkpoint_is_never_half_written(small, reference_run, tmp_path):
    """A full disk (here: a limit on the size of files) ends the run; what was saved stays good."""
    command = [*SHORT, '--data-dir', small, '--log-dir', tmp_path]
    size = only(reference_run[0], '*.last.pt').stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, env={**os.environ, **SMALL},
                          capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and len(rows(only(tmp_path, '*.log').read_text())) == 1
    says(done.stderr, 'File too large')
    assert not list(tmp_path.rglob('*.pt')) and not list(tmp_path.rglob('*.tmp'))
    run(*command, '--resume', **SMALL)
    assert_same_weights(weights(tmp_path), weights(reference_run[0]))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(small, reference_run, tmp_path, number):
    command = [*SHORT, '--data-dir', small, '--log-dir', tmp_path]
    process = start(command)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line[:7].strip() == '6':
            time.sleep(0.1)  # into the middle of the next interval, most likely
            process.send_signal(number)
    assert process.wait() == 128 + number
    stopped = re.fullmatch(r'stopped by SIG\w+ at update (\d+); --resume continues\n', lines[-1])[1]
    assert f'resumed at update {stopped} on 1 x' in run(*command, '--resume', **SMALL)
    assert_same_rows(tmp_path, reference_run[0])
    assert_same_weights(weights(tmp_path), weights(reference_run[0]))


def test_two_ranks(small, tmp_path):
    """Two ranks give what one rank gives in two passes; the run may go on with another number of ranks."""
    flags = [*SHORT, '--data-dir', small]
    torchrun(2, *flags, '--log-dir', tmp_path / 'two', **SMALL)
    run(*flags, '--accum', 2, '--log-dir', tmp_path / 'one', **SMALL)
    two, one = (only(tmp_path / name, '*.log').read_text() for name in ('two', 'one'))
    for a, b in zip(rows(two)[:2], rows(one)[:2], strict=True):  # training loss and accuracy
        assert float(a[2]) == pytest.approx(float(b[2]), abs=2e-4) and a[3] == b[3]
    assert '2 x' in two and result(two)['world'] == '2'
    log = only(tmp_path / 'two', '*.log')
    log.write_text(two[:two.index('RESULT')])  # unfinished after all
    checkpoint = torch.load(log.with_suffix('.last.pt'), weights_only=True)
    # as if it had been killed after update 6, the best so far, before the best weights were written
    checkpoint['run'].update(it=6, row_it=6, best_it=6, best_acc=2.0)
    log.with_suffix('.best.pt').unlink()
    torch.save(checkpoint, log.with_suffix('.last.pt'))
    assert 'resumed at update 6 on 1 x' in run(*flags, '--log-dir', tmp_path / 'two', '--resume', **SMALL)


def test_fp16_skips_overflows_and_keeps_its_scale(small, tmp_path):
    """From an absurd first scale: updates are skipped and counted, momentum and weights stay finite, and a
    resumed run goes on with the scale it had."""
    copy = HERE / 'mine_for_test.py'
    text = (HERE / 'cifar10_x32.py').read_text()
    assert 'GradScaler(args.device, ' in text
    copy.write_text(text.replace('GradScaler(args.device, ', 'GradScaler(args.device, 2.0 ** 22, '))
    flags = [copy.name, '--data-dir', small, '--log-dir', tmp_path, '--batch', 4, '--lr', 0.05, '--iters', 10,
             '--precision', 'fp16', '--device', 'cpu', '--resume']
    try:
        process = start(flags)
        for line in process.stdout:
            if line[:7].strip() == '6':
                process.kill()
        run(*flags, **SMALL)
        skipped = sum(int(row[9]) for row in rows(only(tmp_path, '*.log').read_text()))
        checkpoint = torch.load(only(tmp_path, '*.last.pt'), weights_only=True)
        assert 0 < skipped < 10 and checkpoint['scaler']['scale'] == 2.0 ** (22 - skipped)
        assert all(t.isfinite().all() for t in weights(tmp_path).values())
        assert only(tmp_path, '*.log').parts[-4] == copy.stem  # a copied script has a folder of its own
    finally:
        copy.unlink()


def test_a_loss_that_is_not_finite_ends_the_run(small, tmp_path):
    flags = ['cifar10_x32.py', '--batch', 32, '--iters', 10, '--precision', 'fp32', '--device', 'cpu']
    output = run(*flags, '--lr', 1e30, '--data-dir', small, '--log-dir', tmp_path, ok=1, **SMALL)
    assert re.search(r'the loss was not finite in updates \d+ to \d+', output)
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def test_eval_reproduces_the_result(small, reference_run):
    logs, output = reference_run
    printed = run(*SHORT, '--data-dir', small, '--eval', only(logs, '*.best.pt'), **SMALL)
    for name in ('val', 'tst'):
        assert re.search(f'^{name} .*$', printed, re.M)[0] == re.search(f'^{name} .*$', output, re.M)[0]


def test_bad_input_gets_a_sentence(small, reference_run, tmp_path, monkeypatch):
    import cifar10_x32
    best = only(reference_run[0], '*.best.pt')
    (tmp_path / 'text').write_text('no checkpoint')
    (tmp_path / 'log_file').touch()
    torch.save({'config': Evil()}, tmp_path / 'evil.pt')
    monkeypatch.chdir(tmp_path)

    def refused(*flags, words, **env):
        monkeypatch.setattr(sys, 'argv', [str(x) for x in (*SHORT, '--log-dir', tmp_path, *flags)])
        monkeypatch.setenv(data.INCOMPLETE, env.get(data.INCOMPLETE, ''))
        with pytest.raises(data.UserError) as error:
            cifar10_x32.main()
        says(str(error.value), *words)
    says(run('cifar10_x32.py', '--depth', 19, ok=2), '19', '18, 20, 32')
    says(run('cifar10_x32.py', '--iter', 9, ok=2), 'unrecognized arguments: --iter')  # no guessing
    says(run(*SHORT, '--iters', 0, ok=2), 'start at 1')
    refused('--batch', 10, '--accum', 3, words=['--batch 10 is not divisible', '3 passes'])
    refused('--eval', best, '--depth', 32, '--data-dir', small, words=['depth 20', '32'], **SMALL)
    refused('--eval', tmp_path / 'text', '--data-dir', small, words=['not a checkpoint'], **SMALL)
    refused('--eval', tmp_path / 'evil.pt', '--data-dir', small, words=['not a checkpoint'], **SMALL)
    assert not (tmp_path / 'evil').exists()
    refused('--eval', tmp_path / 'none', '--data-dir', small, words=['No such file'], **SMALL)
    refused('--log-dir', tmp_path / 'log_file', '--data-dir', small, words=['log_file', '--log-dir'], **SMALL)
    refused('--data-dir', small, words=['holds 250 of 50000 images'])
    refused('--batch', 512, '--data-dir', small, words=['512', '204 training images'], **SMALL)
    if not torch.cuda.is_available():
        refused('--device', 'cuda', words=['GPU', '--device cpu'])


@pytest.mark.parametrize('file', [None, 'data_batch_3'])
def test_missing_and_damaged_cifar(tmp_path, file):
    words = ['--synthetic', 'cifar-10-python.tar.gz']
    if file:
        (tmp_path / 'cifar-10-batches-py').mkdir()
        (tmp_path / 'cifar-10-batches-py' / file).write_bytes(b'half of a file')  # as after a broken copy
        words.append('data_batch_3 is damaged')
    # a proxy that nobody serves stands for a missing network
    says(run('cifar10_x32.py', '--data-dir', tmp_path, '--log-dir', tmp_path, ok=2,
             https_proxy='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9'), *words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_update_waits_for_the_gpu(tmp_path):
    copy = HERE / 'mine_for_test.py'
    text = (HERE / 'cifar10_x32.py').read_text()
    marks = ["            for group in optimizer.param_groups:\n", '            run.it += 1\n']
    assert all(text.count(mark) == 1 for mark in marks)
    strict = "            torch.cuda.set_sync_debug_mode('error' if run.it > 2 else 0)\n"
    text = text.replace(marks[0], strict + marks[0])
    copy.write_text(text.replace(marks[1], marks[1] + '            torch.cuda.set_sync_debug_mode(0)\n'))
    try:
        for precision in ('fp16', 'fp32'):
            run(copy.name, '--synthetic', '--iters', 20, '--precision', precision, '--log-dir', tmp_path)
    finally:
        copy.unlink()


def sync():
    tail = (HERE / 'cifar10_x32.py').read_text().split(MARK)[1]
    for name in SCRIPTS[1:]:
        path = HERE / f'{name}.py'
        path.write_text(path.read_text().split(MARK)[0] + MARK + tail)


if __name__ == '__main__':
    if sys.argv[1:] != ['--sync']:
        sys.exit(__doc__)
    sync()
