"""Trains a residual network on TinyImageNet (64 px, 200 classes) from scratch.

    python tinyimagenet200_x64.py --depth 20 --width 4               one GPU, or the CPU where there is none
    torchrun --nproc_per_node 2 tinyimagenet200_x64.py --depth 18    two GPUs, the same global batch
    python tinyimagenet200_x64.py --depth 20 --width 4 --resume      goes on where that run was stopped

Reference test accuracy (JAX, seed 42, fp32): 20x1 0.508, 20x2 0.570, 20x4 0.598, 18x1 0.647; the test set is
the official validation set. Reference time on one RTX 3090: 33 minutes for 20x1, 125 for 18x1.
"""
import argparse
import contextlib
import datetime
import hashlib
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from resnet import STAGES, ResNet, parameters

# ---- recipe: the only lines that differ between the seven scripts ----
DATASET = 'TinyImageNet200_x64'
DEPTH = 20            # 20 32 44 56 110, or 18 34 50 101 152
WIDTH = 1             # multiplies the channels
SEED = 42             # of initial weights, order and augmentation
BATCH = 256           # images per update, over all devices
ITERS = 48_000        # updates: 150 epochs
LR = 0.1              # the highest learning rate; it grows with --batch, as ITERS shrinks
MOMENTUM = 0.9        # plain SGD: no Nesterov, no dampening
WEIGHT_DECAY = 1e-3   # of every parameter, batch norm and biases too
WARMUP = 0.1          # of ITERS, linear from 0; a cosine to 0 follows
EVAL_EVERY = 1000     # updates between evaluations and checkpoints; shorter runs have about ten of them
PRECISION = 'fp16'    # on CUDA; bf16 on a CPU that computes in it (AVX512-BF16, AMX), or else fp32
# ==== identical in all seven scripts below this line (test_smoke.py) ====

SCRIPT = Path(__file__).resolve()
RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
WORLD = int(os.environ.get('WORLD_SIZE', 1))
COLUMNS = '   iter         lr trn loss trn acc val acc val nll iter/min   img/s wait % skipped  elapsed\n'


def lr_at(it, iters, peak):
    """Learning rate of update `it`, counted from 0: linear from 0 over the warm-up, then a cosine to 0."""
    warmup = WARMUP * iters
    if it < warmup:
        return peak * it / warmup
    return peak * (1 + math.cos(math.pi * (it - warmup) / (iters - warmup))) / 2


def duration(seconds):
    return str(datetime.timedelta(seconds=int(seconds)))


def speed(rows):
    """(updates per minute with evaluation, per second without) over the last 5000, from rows as in `run`."""
    end = rows[-1]
    start = next(row for row in rows if end[0] - row[0] <= 5000)
    updates, seconds, eval_seconds = (b - a for a, b in zip(start, end, strict=True))
    return 60 * updates / seconds, updates / (seconds - eval_seconds)


def parse_args():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s [flags]    without flags it trains the recipe; --help lists them')
    add = parser.add_argument
    add('--depth', type=int, default=DEPTH, choices=sorted(STAGES), help='layers (default: %(default)s)')
    add('--width', type=int, default=WIDTH, help='multiplies the channels (default: %(default)s)')
    add('--seed', type=int, default=SEED, help='of weights, order, augmentation (default: %(default)s)')
    add('--batch', type=int, default=BATCH, help='images per update, over all devices (default: %(default)s)')
    add('--iters', type=int, help=f'updates (default: {ITERS} at batch {BATCH}, half of it at twice that)')
    add('--lr', type=float, help=f'highest learning rate (default: {LR} at batch {BATCH}, in proportion)')
    add('--wd', type=float, default=WEIGHT_DECAY, help='weight decay (default: %(default)s)')
    add('--precision', choices=['fp16', 'bf16', 'fp32'],
        help=f'default: {PRECISION} on CUDA, bf16 on a CPU with AVX512-BF16 or AMX, else fp32')
    add('--compile', action=argparse.BooleanOptionalAction, help='torch.compile (default: on CUDA)')
    add('--accum', type=int, default=1, help='passes that make up a batch, to save memory (default: 1)')
    add('--device', choices=['cuda', 'mps', 'cpu'], help='default: the first of these that there is')
    add('--workers', type=int, help='loader processes per rank, where images are files (default: by cores)')
    add('--data-dir', type=Path, default=Path('datasets'), help='data sets (default: %(default)s)')
    add('--log-dir', type=Path, default=SCRIPT.parent / 'logs',
        help='logs and checkpoints (default: logs, beside this file)')
    add('--synthetic', action='store_true', help='generated images: try it out without a data set')
    add('--resume', action='store_true', help='continue the newest unfinished run of these settings, if any')
    add('--eval', type=Path, metavar='CKPT', help='evaluate the weights in this file, train nothing')
    args = parser.parse_args()
    args.lr = LR * args.batch / BATCH if args.lr is None else args.lr
    args.iters = ITERS * BATCH // max(1, args.batch) if args.iters is None else args.iters
    if min(args.width, args.batch, args.accum, args.iters) < 1 or \
            min(args.seed, args.lr, args.wd, args.workers or 0) < 0:
        raise data.UserError('--width, --batch, --accum and --iters start at 1; --seed, --lr, --wd and '
                             '--workers at 0.')
    if args.batch % (WORLD * args.accum):
        raise data.UserError(f'--batch {args.batch} is not divisible by {WORLD} ranks x {args.accum} passes.')
    return args


def can_compile():
    """torch.compile needs Triton on CUDA; Triton a C compiler, Python.h and a GPU that is not too old."""
    try:
        from torch.utils._triton import has_triton, triton_backend
        return has_triton() and triton_backend() is not None
    except Exception:  # of many kinds, down to those of the C compiler
        return False


def set_up_device(args):
    """(torch.device, its name); fills in the flags that hang on it: device, precision and compile."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    args.device = args.device or ('cuda' if cuda else 'mps' if mps else 'cpu')
    args.precision = args.precision or (
        PRECISION if args.device == 'cuda' else 'bf16' if args.device == 'cpu' and native_bf16 else 'fp32')
    if args.device == 'cuda':
        if LOCAL_RANK >= torch.cuda.device_count():
            found = f'torch {torch.__version__} finds {torch.cuda.device_count()} GPUs'
            raise data.UserError(f'--device cuda: {found} for local rank {LOCAL_RANK}. Try --device cpu.')
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        args.compile = can_compile() if args.compile is None else args.compile
        return torch.device('cuda', LOCAL_RANK), torch.cuda.get_device_name()
    if args.device == 'mps' and not mps:
        raise data.UserError(f'--device mps: torch {torch.__version__} finds none. Use --device cpu.')
    args.compile = bool(args.compile)
    data.keep_freed_memory()  # or activations would get new pages in every step
    cpuinfo = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    name = re.search(r'model name\s*: (.*)', cpuinfo)
    name = name[1] if name else platform.machine()
    return torch.device(args.device), f'{name}, {torch.get_num_threads()} threads'


def run_folder(args, dataset):
    """logs/<data set>/resnet_<D>x<W>.../<seed>, with what differs from batch 256, lr 0.1 and fp32."""
    copied = SCRIPT.stem != DATASET.lower()  # such a script has a folder of its own
    top = SCRIPT.stem + dataset.removeprefix(DATASET) if copied else dataset
    name = f'resnet_{args.depth}x{args.width}'
    name += f'-batch_{args.batch}' if args.batch != 256 else ''
    name += f'-iter_{args.iters // 1000}k' if args.iters % 1000 == 0 else f'-iter_{args.iters}'
    name += f'-lr_{args.lr:g}' if args.lr != 0.1 else ''
    name += f'-wd_{args.wd:.4f}' if round(args.wd, 4) == args.wd else f'-wd_{args.wd:g}'
    name += f'-{args.precision}' if args.precision != 'fp32' else ''
    return args.log_dir / top / name / str(args.seed)


def header(args, config, devices, trn, evals, about):
    """The first lines of a log: what it takes to judge the run, and to do it again."""
    sources, commit = [SCRIPT, SCRIPT.with_name('resnet.py'), SCRIPT.with_name('data.py')], ''
    if shutil.which('git'):
        git = dict(cwd=SCRIPT.parent, capture_output=True, text=True)
        commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], **git).stdout.strip()
        if commit and subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', *sources], **git).returncode:
            commit += ', changed since'
    lines = {
        'command': f'{SCRIPT.name} {shlex.join(sys.argv[1:])}',
        'started': time.strftime('%Y-%m-%d %H:%M:%S'),
        'versions': f'torch {torch.__version__}, python {platform.python_version()}, {platform.system()}',
        'devices': devices,
        'commit': commit or 'unknown',
        **{f'sha256 {file.name}': hashlib.sha256(file.read_bytes()).hexdigest() for file in sources},
        **config,
        'compile': args.compile,
        'images': ', '.join(f'{len(batches)} {name}' for name, batches in {'trn': trn, **evals}.items()),
        'images from': about,
        'ranks, passes': f'{WORLD} x {args.accum} x {args.batch // WORLD // args.accum} images make a batch',
        'epochs': f'{args.iters / trn.per_epoch:.1f} of {trn.per_epoch} updates',
    }
    return ''.join(f'{key:22}: {value}\n' for key, value in lines.items()) + '\n' + COLUMNS


def average_running_statistics(net):
    """Each rank's batch norm saw its own images: evaluation and checkpoints take the mean over ranks."""
    for name, buffer in net.named_buffers():
        if WORLD > 1 and 'running' in name:
            dist.all_reduce(buffer)
            buffer /= WORLD


@torch.no_grad()
def evaluate(net, forward, batches, check_signals=lambda: None):
    """(accuracy, mean negative log-likelihood) of an evaluation set, every image counted once.

    forward: uint8 images -> logits. check_signals: called before each batch; may raise data.Stopped.
    """
    net.eval()
    totals = torch.zeros(3, device=batches.device)
    for images, labels in batches:
        check_signals()
        logits = forward(images)
        if batches.absent is not None:
            logits = logits.masked_fill(batches.absent.to(logits.device), -math.inf)
        nll = F.cross_entropy(logits, labels, reduction='sum')
        totals += torch.stack([(logits.argmax(1) == labels).sum(), nll, (labels >= 0).sum()])
    if WORLD > 1:
        dist.all_reduce(totals)
    correct, nll, count = totals.tolist()
    assert count == len(batches), f'{count} images were evaluated, {len(batches)} are in the set'
    net.train()
    return correct / count, nll / count


def evaluate_all(net, forward, evals, check_signals=lambda: None, known=()):
    """{name: (accuracy, nll)} of the sets in `evals`, each evaluated once, though IN and val are the same.

    known: {set: result} of those that need no evaluation.
    """
    results = dict(known)
    for batches in evals.values():
        if batches not in results:
            results[batches] = evaluate(net, forward, batches, check_signals)
    return {name: results[batches] for name, batches in evals.items()}


def evaluation_lines(results, evals):
    return ''.join(f'{name:9} acc {accuracy:.4f}  nll {nll:.4f}  {len(evals[name])} images\n'
                   for name, (accuracy, nll) in results.items())


def main():
    args = parse_args()
    device, device_name = set_up_device(args)
    control = None  # the process group for flags and for waiting, which keeps off the device
    if WORLD > 1:
        dist.init_process_group('nccl' if args.device == 'cuda' else 'gloo')
        control = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=2))
        warnings.filterwarnings('ignore', '.*broadcast_buffers')  # torch 2.6 does not know its new name

    # data: rank 0 prepares the set, then the first rank of any machine that has a disk of its own
    for my_turn in (RANK == 0, LOCAL_RANK == 0):
        if my_turn and not args.synthetic:
            data.prepare(DATASET, args.data_dir)
        if WORLD > 1:
            dist.barrier(control)
    facts, per_pass = data.SETS[DATASET], args.batch // WORLD // args.accum
    trn, evals, about = data.load(DATASET, args.data_dir, args.batch, per_pass, args.seed, device,
                                  RANK, WORLD, args.synthetic, args.workers)
    for name, batches in evals.items():
        if not len(batches):
            raise data.UserError(f'{args.data_dir} has no images of {DATASET} for {name}.')
    kind = '-synthetic' if args.synthetic else '-incomplete' if data.incomplete_allowed() else ''

    # network, optimizer and the two forward passes
    torch.manual_seed(args.seed)
    shape = dict(depth=args.depth, width=args.width, image_size=facts['size'], num_classes=facts['classes'],
                 mean=facts['mean'], std=facts['std'])
    net = ResNet(**shape).to(device)
    if args.device != 'mps':
        net.to(memory_format=torch.channels_last)
    config = shape | dict(dataset=DATASET + kind, params=parameters(net), seed=args.seed, batch=args.batch,
                          iters=args.iters, lr=args.lr, wd=args.wd, precision=args.precision,
                          momentum=MOMENTUM, warmup=WARMUP)
    optimizer = torch.optim.SGD(net.parameters(), 0.0, MOMENTUM, weight_decay=args.wd,
                                fused=args.device == 'cuda')
    momentum = {}
    for name, p in net.named_parameters():  # fused SGD leaves it uninitialised if fp16 skips the first step
        momentum[name] = optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == 'fp16')
    dtype = {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(args.precision)  # None: no autocast
    model = net if WORLD == 1 else DistributedDataParallel(
        net, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=args.accum == 1)

    def trn_forward(images, labels):
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        return loss, torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    def evl_forward(images):
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            return net(images)

    if args.compile:
        trn_forward, evl_forward = (torch.compile(f, dynamic=False) for f in (trn_forward, evl_forward))
    if args.eval:
        data.load_weights(net, args.eval, shape)
        results = evaluate_all(net, evl_forward, evals)
        if RANK == 0:
            print(evaluation_lines(results, evals), end='')
        return
    if trn.per_epoch == 0:
        raise data.UserError(f'--batch {args.batch} is more than the {len(trn)} training images.')

    # a new run, or the newest unfinished one from its last checkpoint on
    run = SimpleNamespace(it=0, row_it=0, best_it=0, best_acc=-1.0, best_nll=0.0, log_size=0, seconds=0.0,
                          eval_seconds=0.0, rows=[(0, 0.0, 0.0)])  # of each row: it, seconds, eval_seconds
    stats = torch.zeros(3, device=device)  # since the last row: summed loss, correct answers, skipped updates
    best_net = {}  # the weights of the best validation accuracy
    state = [None]
    if RANK == 0:
        log_path = data.open_log(run_folder(args, config['dataset']), args.resume)
        last, previous, best = (log_path.with_suffix(f'.{name}.pt') for name in ('last', 'prev', 'best'))
        state[0], resumed_from = data.read_last_checkpoint(
            last, previous, config, 'net', 'momentum', 'best', 'scaler', 'stats', 'run')
    if WORLD > 1:
        dist.broadcast_object_list(state, group=control)
    state = state[0]
    if state:
        net.load_state_dict(state['net'])
        for name in momentum:
            momentum[name].copy_(state['momentum'][name])
        scaler.load_state_dict(state['scaler'])
        stats += state['stats'].to(device) * (RANK == 0)
        best_net = state['best']
        vars(run).update(state['run'])
    live, clock = RANK == 0 and sys.stdout.isatty(), time.perf_counter
    started, shown, waited = clock() - run.seconds, clock(), 0.0
    every = EVAL_EVERY if args.iters >= 10 * EVAL_EVERY else max(1, args.iters // 10)
    devices = f'{WORLD} x {device_name}'

    def log(text):
        if RANK == 0:
            with open(log_path, 'a') as file:
                file.write(text)
            print(('\r\033[K' if live else '') + text, end='', flush=True)

    def total_stats():
        total = stats.clone()
        if WORLD > 1:
            dist.all_reduce(total)
        return total.cpu()

    def save():
        total, run.seconds = total_stats(), clock() - started
        if RANK == 0:
            run.log_size = log_path.stat().st_size
            data.write_checkpoint(last, previous, config=config, net=net.state_dict(), momentum=momentum,
                                  best=best_net, scaler=scaler.state_dict(), stats=total, run=vars(run))

    def save_best():
        if RANK == 0 and best_net:
            data.write_checkpoint(best, config=config, net=best_net, it=run.best_it, val_acc=run.best_acc)

    if RANK == 0:
        os.truncate(log_path, min(run.log_size, log_path.stat().st_size))  # later rows will be written again
        log(f'resumed at update {run.it} on {devices}{resumed_from}\n' if state else
            header(args, config, devices, trn, evals, about))
        save_best()  # the file may be older or newer than the checkpoint, or damaged
    signals = data.StopSignals(control)
    batches, one = trn.batches(run.it), torch.ones((), device=device)
    try:
        while True:
            if run.it > run.row_it and (run.it % every == 0 or run.it == args.iters):
                loss, correct, skipped = total_stats().tolist()  # waits for the device: the updates never do
                eval_start, updates = clock(), run.it - run.row_it
                average_running_statistics(net)
                val_acc, val_nll = evaluate(net, evl_forward, evals['val'], signals.check)
                # an update that fp16 skips may have had an infinite loss
                diverged = (not math.isfinite(loss) and not skipped) or not math.isfinite(val_nll)
                if diverged or scaler.get_scale() < 1:  # below 1 the gradients overflow fp16 by themselves
                    raise FloatingPointError(
                        f'the loss or its gradients were not finite in updates {run.row_it} to {run.it} '
                        f'(loss scale {scaler.get_scale():g}): try a smaller --lr, or --precision bf16.'
                        + f' The checkpoint of update {run.row_it} is good.' * (run.row_it > 0))
                run.seconds = clock() - started
                run.eval_seconds += clock() - eval_start
                run.rows.append((run.it, run.seconds, run.eval_seconds))
                iter_per_min, img_per_s = speed(run.rows)[0], args.batch * speed(run.rows[-2:])[1]
                lr = sum(lr_at(i, args.iters, args.lr) for i in range(run.row_it, run.it)) / updates
                is_best = val_acc > run.best_acc
                if is_best:
                    run.best_it, run.best_acc, run.best_nll = run.it, val_acc, val_nll
                    best_net = {name: t.clone() for name, t in net.state_dict().items()}
                seen = updates * args.batch
                wait_percent = 100 * waited * img_per_s / seen
                log(f'{run.it:7} {lr:10.3e} {loss / seen:8.4f} {correct / seen:7.4f} {val_acc:7.4f} '
                    f'{val_nll:7.4f} {iter_per_min:8.0f} {img_per_s:7.0f} {wait_percent:6.1f} '
                    f'{skipped:7.0f} {duration(run.seconds):>8}{" *" * is_best}\n')
                run.row_it, waited = run.it, 0.0
                stats.zero_()
                save_start = clock()
                save()
                if is_best:
                    save_best()
                run.eval_seconds += clock() - save_start
            if run.it == args.iters:
                break
            signals.check()

            optimizer.param_groups[0]['lr'] = lr_at(run.it, args.iters, args.lr)
            wait_start = clock()
            images, labels = next(batches)
            waited += clock() - wait_start
            passes = zip(images.split(per_pass), labels.split(per_pass), strict=True)
            for i, (images, labels) in enumerate(passes):
                with model.no_sync() if WORLD > 1 and i + 1 < args.accum else contextlib.nullcontext():
                    loss, loss_and_correct = trn_forward(images, labels)
                    scaler.scale(loss / args.accum).backward()
                stats[:2] += loss_and_correct
            scale = scaler.scale(one)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            stats[2] += (scaler.scale(one) < scale) / WORLD  # the scale falls if the update was skipped
            run.it += 1
            if live and clock() - shown > 0.5:
                shown, (it, seconds, _) = clock(), run.rows[-1]
                rate = (run.it - it) / (shown - started - seconds)
                print(f'\r{run.it} of {args.iters}   {60 * rate:.0f} iter/min   '
                      f'{duration((args.iters - run.it) / rate)} left\033[K', end='', flush=True)

        # the only look at the test sets, with the weights of the best validation accuracy
        net.load_state_dict(best_net)
        known = {evals['val']: (run.best_acc, run.best_nll)}
        results = evaluate_all(net, evl_forward, evals, signals.check, known)
    except data.Stopped as stopped:
        log(f'stopped by {stopped.args[0].name} at update {run.it}; --resume continues\n')
        if run.row_it < args.iters:  # or else last.pt has been written, and the net is at its best weights
            average_running_statistics(net)
            save()
        if WORLD > 1:
            dist.barrier(control)  # or torchrun would end the others before rank 0 has saved
        sys.exit(128 + stopped.args[0])

    fields = {key: config[key] for key in ('dataset', 'depth', 'width', 'seed', 'params', 'batch', 'iters')}
    fields |= dict(lr=f'{args.lr:g}', wd=f'{args.wd:g}', precision=args.precision, best_iter=run.best_it)
    for name, (accuracy, nll) in results.items():
        key = name.lower().replace('-', '')  # val, tst; in, inv2
        fields |= {f'{key}_acc': f'{accuracy:.4f}', f'{key}_nll': f'{nll:.4f}'}
    iter_per_min, trn_iter_per_s = speed(run.rows)
    fields |= dict(iter_per_min=f'{iter_per_min:.0f}', img_per_s=f'{trn_iter_per_s * args.batch:.0f}',
                   hours=f'{run.seconds / 3600:.3f}', world=WORLD, device=f'"{device_name}"',
                   torch=torch.__version__)
    result = ' '.join(f'{key}={value}' for key, value in fields.items())
    log(f'{evaluation_lines(results, evals)}RESULT {result}\n')


if __name__ == '__main__':
    with data.plain_errors():
        main()
        if WORLD > 1:
            dist.destroy_process_group()
