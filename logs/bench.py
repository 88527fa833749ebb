"""How fast this machine trains: our scripts beside the same nets in the usual PyTorch style.

    python logs/bench.py                      nets that suit this machine
    python logs/bench.py 20x1 18x1@64:128     depth x width @ pixels (32) : images in a batch (256)
    python logs/bench.py --ours 20x1 20x4     without the usual style, which takes most of the time
    python logs/bench.py imagenet2012         how fast its files are decoded and cropped, on the CPU

Images are generated, so no data set is needed. `ours` is the script with its default precision; on CUDA,
`compiled` is the same without CUDA graphs and `eager` with --no-compile. `usual` is NCHW, fp32, a
DataLoader with PIL transforms and loss.item() in each step. They run in turns and the medians count, since
machines have slow minutes.

iter/min, img/s   training alone: no evaluation, no checkpoints, not the updates before the first row
wait %            of that time, until a batch was there
start s           from the command to the end of the first update, or of the first evaluation if there is one
memory MB         the most that the training process held (on CUDA: that it allocated on the device)
limit %           speed relative to multiplying large matrices of the same type without a pause
ratio             img/s relative to the usual style in the same turn

With imagenet2012, the files under --data-dir are decoded, cropped to 224 px and flipped, by one process and
then by loaders with 1, 2, 4 ... of them. The usual style is torchvision's ImageFolder with PIL transforms;
it reads the original files, ours the pack where there is one.
"""
import argparse
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402 (found only with the line above)
from logs.run import commit, cpu_name  # noqa: E402
from resnet import STAGES, ResNet, multiply_adds  # noqa: E402

DATASETS = {32: 'CIFAR10_x32', 64: 'TinyImageNet200_x64', 224: 'imagenet2012'}  # pixels -> data set, script
CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
NETS = ['20x1', '20x4', '56x1', '18x1', '18x1@64', '50x1@224'] if CUDA else ['20x1', '18x1:64', '50x1@224:16']
STYLES = ['ours', 'compiled', 'eager', 'usual'] if CUDA else ['ours', 'usual']


def net(text):
    """'18x1@64:128' -> (18, 1, 64, 128); 'imagenet2012' stays as it is."""
    if text == 'imagenet2012':
        return text
    match = re.fullmatch(r'(\d+)x(\d+)(?:@(\d+))?(?::(\d+))?', text)
    depth, width, size, batch = [int(group or 0) for group in match.groups()] if match else [0] * 4
    if depth not in STAGES or width < 1 or (size or 32) not in DATASETS:
        raise argparse.ArgumentTypeError(f'{text} is no net like 20x1, 18x1@64 or 50x1@224:16')
    return depth, width, size or 32, batch or 256


class Images(torch.utils.data.Dataset):
    """Generated images for the usual style, which decodes, augments and normalises them one by one."""

    def __init__(self, size, batch):
        from torchvision import transforms
        self.facts = data.SETS[DATASETS[size]]
        self.images, self.labels = data.synthetic_arrays(DATASETS[size], batch)[0]
        self.transform = transforms.Compose([
            transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(self.facts['mean'], self.facts['std'])])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(data.Image.fromarray(self.images[i].numpy())), self.labels[i].item()


def usual(depth, width, size, batch, iters):
    """Trains in the style of most published CIFAR scripts, printing rows as our logs have them."""
    images = Images(size, batch)
    torch.backends.cudnn.benchmark = True
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=batch * iters)
    loader = torch.utils.data.DataLoader(images, batch, sampler=sampler, pin_memory=CUDA,
                                         num_workers=min(8, torch.get_num_threads()))
    # this mean and std change nothing: the images come normalised
    net = ResNet(depth, width, size, images.facts['classes'], (0.0,) * 3, (1 / 255,) * 3).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    every, total_loss, waited, start = max(1, iters // 10), 0.0, 0.0, time.perf_counter()
    wait_start = start
    for it, (x, y) in enumerate(loader, 1):
        waited += time.perf_counter() - wait_start
        x, y = x.to(DEVICE), y.to(DEVICE)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total_loss += loss.item()
        wait_start = time.perf_counter()
        if it % every == 0:
            seconds = wait_start - start
            print(f'{it:7} 0.1 {total_loss / every:.4f} - - - - {every * batch / seconds:.0f} '
                  f'{100 * waited / seconds:.1f} - -', flush=True)
            total_loss, waited, start = 0.0, 0.0, wait_start


def child(style, *arguments):
    """What a process of its own does: trains, then says how much memory that took."""
    if style == 'usual':
        usual(*map(int, arguments))
    else:
        os.environ['TORCHINDUCTOR_CUDAGRAPHS'] = str(int(style == 'ours'))
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name='__main__')
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    print('PEAK', peak)


def measure(style, depth, width, size, batch, iters):
    """Trains for `iters` updates, 2 or more, in a new process: (img/s, wait %, start s, memory MB, type).

    The numbers are NaN if it fails: the other styles and nets have theirs all the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [style, depth, width, size, batch, iters] if style == 'usual' else [
            style, ROOT / f'{DATASETS[size].lower()}.py', '--synthetic', '--depth', depth, '--width', width,
            '--batch', batch, '--iters', iters, '--log-dir', folder, '--device', DEVICE,
            *{'compiled': ['--compile'], 'eager': ['--no-compile']}.get(style, [])]
        command = [sys.executable, __file__, '--child', *map(str, command)]
        start, first, rows, peak, precision = time.perf_counter(), None, [], 0.0, 'fp32'
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for fields in map(str.split, process.stdout):
                if len(fields) > 10 and fields[0].isdigit():
                    first = first or (time.perf_counter() - start, int(fields[0]))
                    rows.append((float(fields[7]), float(fields[8])))
                elif fields[:2] == ['precision', ':']:
                    precision = fields[2]
                elif fields[:1] == ['PEAK']:
                    peak = float(fields[1]) / 1e6
    if process.returncode:
        print(f'bench.py: this failed: {" ".join(command)}', file=sys.stderr)
        return *[math.nan] * 4, precision
    img_per_s, wait = np.median(rows[1:], axis=0)
    seconds, updates = first
    return img_per_s, wait, seconds - (updates - 1) * batch / img_per_s, peak, precision


def matrix_rate(precision):
    """Multiply-adds per second in the product of two large matrices."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions have it by default
    dtype = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}[precision]
    side, best = 8192 if CUDA else 2048, math.inf
    a = torch.ones(side, side, dtype=dtype, device=DEVICE)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return side ** 3 / best


def bench_files(data_dir, turns):
    """Prints how fast image files become training crops, ours beside torchvision's usual pipeline."""
    from torchvision import datasets, transforms
    os.environ[data.INCOMPLETE] = '1'  # some hundreds of images are enough
    parts, _, about = data.open_imagenet(data_dir)
    images, rng = parts['train'], np.random.default_rng(0)
    if len(images) < 32:
        raise data.UserError(f'{images.path} has {len(images)} images, but a batch of 32 is measured.')
    folder = datasets.ImageFolder(data_dir / 'imagenet2012' / 'train', transforms.Compose([
        transforms.RandomResizedCrop(data.CROP), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor()]))
    torch.set_num_threads(1)  # as in the loader's processes

    def each(function):  # of 32 random images at a time
        while True:
            yield [function(i) for i in rng.integers(len(images), size=32).tolist()]

    def ours(workers):
        return data.JpegTrainBatches(images, 32, 0, 'cpu', workers).batches(0)

    def usual(workers):
        sampler = torch.utils.data.RandomSampler(folder, replacement=True, num_samples=10 ** 6)
        return iter(torch.utils.data.DataLoader(folder, 32, sampler=sampler, num_workers=workers))

    def rate(batches, processes):  # images per second and process
        for _ in range(4 * processes):  # until all of them are at work
            next(batches)
        start = time.perf_counter()
        for _ in range(16 * processes):
            next(batches)
        return 16 * 32 / (time.perf_counter() - start)

    cases = {'decode': (1, lambda: each(lambda i: data.decode_tensor(*images.read(i))),
                        lambda: each(lambda i: folder.loader(folder.samples[i][0]))),
             'decode, crop, flip': (1, lambda: ours(0), lambda: each(folder.__getitem__))}
    workers = 1
    while workers <= data.usable_cores():
        cases[f'loader, {workers} processes'] = (
            workers, lambda n=workers: ours(n), lambda n=workers: usual(n))
        workers *= 2
    print(f'{len(images)} images from {about}; medians of {turns} turns, images per second and core\n\n'
          f'{"":22}  ours  usual  ratio')
    for name, (processes, *styles) in cases.items():
        rates = [[rate(style(), processes) for style in styles] for _ in range(turns)]
        medians, ratio = np.median(rates, axis=0), np.median([a / b for a, b in rates])
        print(f'{name:22} {medians[0]:5.0f} {medians[1]:6.0f} {ratio:6.2f}', flush=True)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('nets', nargs='*', type=net, default=[net(text) for text in NETS],
                        help=f'default here: {" ".join(NETS)}')
    parser.add_argument('--ours', action='store_true', help='leave out the other styles')
    parser.add_argument('--turns', type=int, default=3, help='runs of each style (default: %(default)s)')
    parser.add_argument('--updates', type=int, help='in a run (default: 20 to 2000, by the cost of the net)')
    parser.add_argument('--data-dir', type=Path, default=Path('datasets'), help='default: %(default)s')
    args = parser.parse_args()
    if args.turns < 1 or args.updates is not None and args.updates < 2:
        parser.error('--turns starts at 1, --updates at 2')
    if 'imagenet2012' in args.nets:
        try:
            if len(args.nets) > 1:
                raise data.UserError('imagenet2012 is measured by itself: leave out the nets.')
            return bench_files(args.data_dir, args.turns)
        except (data.UserError, OSError) as error:
            parser.exit(2, f'bench.py: {error}\n')
    styles, rates = STYLES[:1] if args.ours else STYLES, {'fp32': matrix_rate('fp32')}
    name = torch.cuda.get_device_name() if CUDA else cpu_name()
    sources = *ROOT.glob('*.py'), *(ROOT / 'logs').glob('*.py')
    print(f'{name}, torch {torch.__version__}, commit {commit(sources)}; medians of {args.turns} turns\n\n'
          '  net  px batch style    type iter/min   img/s wait % start s memory MB limit %'
          + ' ratio' * (not args.ours))
    failed = False
    for depth, width, size, batch in args.nets:
        with torch.device('meta'):
            macs = multiply_adds(ResNet(depth, width, size, 1000, (0.5,) * 3, (0.5,) * 3), size)
        macs *= 3  # forward, and backward to inputs and to weights
        updates = args.updates or min(max(20, int(15 * rates['fp32'] / macs / batch)), 2000)
        turns = [[measure(style, depth, width, size, batch, updates) for style in styles]
                 for _ in range(args.turns)]
        for style, *runs in zip(styles, *turns, strict=True):
            img_per_s, wait, start, peak = np.median([run[:4] for run in runs], axis=0)
            precision = runs[0][4]
            rates[precision] = rates.get(precision) or matrix_rate(precision)
            ratio = np.median([run[0] / turn[-1][0] for run, turn in zip(runs, turns, strict=True)])
            failed |= math.isnan(img_per_s)
            print(f'{depth:3}x{width} {size:3} {batch:5} {style:8} {precision} {60 * img_per_s / batch:8.0f} '
                  f'{img_per_s:7.0f} {wait:6.1f} {start:7.1f} {peak:9.0f} '
                  f'{100 * img_per_s * macs / rates[precision]:7.0f}'
                  f'{"" if args.ours else f" {ratio:5.2f}"}', flush=True)
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']:
        child(*sys.argv[2:])
    else:
        main()
