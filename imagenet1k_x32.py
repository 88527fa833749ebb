"""Trains a residual network on ImageNet downsampled to 32 px (1000 classes) from scratch.

    python imagenet1k_x32.py --depth 50                         one GPU, or the CPU where there is none
    torchrun --nproc_per_node 2 imagenet1k_x32.py --depth 50    two GPUs, the same global batch
    python imagenet1k_x32.py --depth 50 --resume                goes on where that run was stopped

Reference validation accuracy (JAX, seed 42, fp16): 18x1 0.546, 34x1 0.573, 50x1 0.613. Reference time on two
RTX 3090: 2.1 hours for 18x1, 5.7 for 50x1.
"""
import argparse
import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from logs.run import Run, Stopped, cuda_graphs, evaluation_lines, load_weights, plain_errors, set_up
from resnet import STAGES, ResNet, parameters

# ---- recipe: with the docstring, all that differs between the seven scripts ----
DATASET = 'ImageNet1k_x32'
DEPTH = 18            # 18 34 50 101 152, or 20 32 44 56 110
WIDTH = 1             # multiplies the channels
SEED = 42             # of initial weights, order and augmentation
BATCH = 1024          # images per update, over all devices
ITERS = 128_000       # updates: 102 epochs
LR = 0.4              # the highest; in proportion to --batch, ITERS inversely so
MOMENTUM = 0.9        # plain SGD: no Nesterov, no dampening
WEIGHT_DECAY = 1e-4   # of every parameter, batch norm and biases too
WARMUP = 0.1          # of ITERS, linear from 0; a cosine to 0 follows
EVAL_EVERY = 1000     # updates between evaluations and checkpoints; a tenth of --iters if that is less
PRECISION = 'fp16'    # on CUDA; bf16 on a CPU that computes in it (AVX512-BF16, AMX), or else fp32
# ==== identical in all seven scripts below this line (test_smoke.py) ====

def lr_at(it, iters, peak):
    """Learning rate of update `it`, from 0 on: linear from 0 over the warm-up, then a cosine to 0. Update 0
    changes no weights, as in the reference."""
    warmup = WARMUP * iters
    if it < warmup:
        return peak * it / warmup
    return peak * (1 + math.cos(math.pi * (it - warmup) / (iters - warmup))) / 2


def parse_args():
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s [flags]    without flags it trains the recipe; --help lists them')
    add = parser.add_argument
    add('--depth', type=int, default=DEPTH, choices=sorted(STAGES), help='layers (default: %(default)s)')
    add('--width', type=int, default=WIDTH, help='multiplies the channels (default: %(default)s)')
    add('--seed', type=int, default=SEED, help='of weights, order, augmentation (default: %(default)s)')
    add('--batch', type=int, default=BATCH, help='images per update, over all devices (default: %(default)s)')
    add('--iters', type=int, help=f'updates (default: {ITERS} x {BATCH} / batch)')
    add('--lr', type=float, help=f'highest learning rate (default: {LR} x batch / {BATCH})')
    add('--wd', type=float, default=WEIGHT_DECAY, help='weight decay (default: %(default)s)')
    add('--precision', choices=['fp16', 'bf16', 'fp32'],
        help=f'default: {PRECISION} on CUDA, bf16 on a CPU with AVX512-BF16 or AMX, else fp32')
    add('--compile', action=argparse.BooleanOptionalAction, help='torch.compile (default: on CUDA)')
    add('--accum', type=int, default=1,
        help='gradient accumulation: passes per batch; batch norm sees one (default: 1)')
    add('--device', choices=['cuda', 'mps', 'cpu'], help='default: the first one available')
    add('--workers', type=int, help='loader processes per rank, where images are files (default: by cores)')
    add('--data-dir', type=Path, default='datasets',
        help='data sets (default: %(default)s, in the current folder)')
    add('--log-dir', type=Path, default=Path(__file__).resolve().parent / 'logs',
        help='logs and checkpoints (default: logs, beside this file)')
    add('--synthetic', action='store_true', help='generated images: try it out without a data set')
    add('--resume', action='store_true', help='continue the newest unfinished run of these settings, if any')
    add('--eval', type=Path, metavar='CKPT', help='evaluate the weights in this file, train nothing')
    args = parser.parse_args()
    args.lr = LR * args.batch / BATCH if args.lr is None else args.lr
    args.iters = ITERS * BATCH // max(1, args.batch) if args.iters is None else args.iters
    return args


def average_running_statistics(net, ranks):
    """Each rank's batch norm saw its own images: evaluation and checkpoints take the mean over ranks."""
    for name, buffer in net.named_buffers():
        if 'running' in name:  # running_mean, running_var
            buffer.copy_(ranks.sum(buffer) / ranks.world)


@torch.no_grad()
def evaluate(net, forward, batches, ranks):
    """(accuracy, mean negative log-likelihood) of an evaluation set, every image counted once.

    forward: uint8 images -> logits. batches: an evaluation set of data.load(). The net is in training mode
    afterwards. On a stop signal ranks.check_signals() raises Stopped.
    """
    net.eval()
    totals = torch.zeros(3, device=batches.device)  # correct answers, summed nll, images
    for images, labels in batches:
        ranks.check_signals()
        logits = forward(images)
        if batches.absent is not None:  # classes of which the set has no images
            logits = logits.masked_fill(batches.absent, -math.inf)
        nll = F.cross_entropy(logits, labels, reduction='sum')
        # the last batch is filled up with images of label -100, which count nowhere
        totals += torch.stack([(logits.argmax(1) == labels).sum(), nll, (labels >= 0).sum()])
    net.train()
    correct, nll, count = ranks.sum(totals).tolist()
    assert count == len(batches), f'{count} images were evaluated, {len(batches)} are in the set'
    return correct / count, nll / count


# logs/README.md explains them
COLUMNS = '   iter         lr trn loss trn acc val acc val nll iter/min   img/s wait % skipped  elapsed\n'


def main():
    args = parse_args()
    ranks = set_up(args, PRECISION)  # fills in --device, --precision and --compile, too
    device, world = ranks.device, ranks.world

    # training batches, and evaluation sets by name: val, then tst or IN-V2 and others
    if not args.synthetic:
        ranks.rank_0_first(data.prepare, DATASET, args.data_dir)
    per_pass = args.batch // world // args.accum  # images that go through one rank's net at once, val's too
    trn, evals, about, fingerprint = data.load(
        DATASET, args.data_dir, args.batch, per_pass, args.seed, device, ranks.rank, world, args.synthetic,
        args.workers, trained_elsewhere=bool(args.eval))
    ranks.require_same(f'images {about}, {fingerprint}', 'give all the same data and packages')

    # network, optimizer and the two forward passes
    facts = data.SETS[DATASET]
    shape = dict(depth=args.depth, width=args.width, image_size=facts['size'], num_classes=facts['classes'],
                 mean=facts['mean'], std=facts['std'])
    torch.manual_seed(args.seed)  # of the initial weights only: its state is not saved, batches need none
    net = ResNet(**shape).to(device)
    if args.device != 'mps':  # its batch norm is wrong then (pytorch issue 175189)
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=args.wd,
                                fused=args.device == 'cuda')  # or GradScaler would wait for the GPU
    for p in net.parameters():  # fused SGD leaves it uninitialised if fp16 skips the first update
        optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == 'fp16')
    dtype = {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(args.precision)  # None: no autocast
    model = net if world == 1 else DistributedDataParallel(  # of buffers: average_running_statistics
        net, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=args.accum == 1)

    def trn_forward(images, labels):
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        return loss / args.accum, torch.stack([loss.detach() * per_pass, (logits.argmax(1) == labels).sum()])

    def evl_forward(images):
        with torch.autocast(args.device, dtype, enabled=dtype is not None):
            return net(images)

    if args.compile:  # with CUDA graphs the next call overwrites what this one returns
        options = {'triton.cudagraphs': cuda_graphs(args, world, facts['size'])}
        trn_forward, evl_forward = (torch.compile(f, dynamic=False, options=options)
                                    for f in (trn_forward, evl_forward))
    if args.eval:
        origin = load_weights(net, args.eval, shape, fingerprint)
        results = {name: evaluate(net, evl_forward, batches, ranks) for name, batches in evals.items()}
        if ranks.rank == 0:
            print(f'{origin}\n{about}\n{evaluation_lines(results, evals)}', end='')
        return

    # a new run, or the newest unfinished one from its last checkpoint on
    it = row_it = best_it = 0  # updates done, at the last row, and at the best validation accuracy
    best_acc, best_nll, best_net = -1.0, 0.0, {}
    stats = torch.zeros(3, device=device)  # since the last row: summed loss, correct answers, skipped updates
    kind = '-synthetic' if args.synthetic else '-incomplete' if data.incomplete_allowed() else ''
    config = shape | dict(dataset=DATASET + kind, **fingerprint, params=parameters(net), seed=args.seed,
                          batch=args.batch, iters=args.iters, lr=args.lr, wd=args.wd,
                          precision=args.precision, momentum=MOMENTUM, warmup=WARMUP)
    run = Run(__file__, args, config, ranks)
    if state := run.begin(COLUMNS, trn, about):  # its last checkpoint
        net.load_state_dict(state['net'])
        groups = optimizer.state_dict()['param_groups']  # ours: `fused` depends on the device
        optimizer.load_state_dict(state['optimizer'] | dict(param_groups=groups))
        scaler.load_state_dict(state['scaler'])
        if ranks.rank == 0:  # saved as the sum over ranks
            stats += state['stats'].to(device)
        it, row_it, best_it, best_acc, best_nll = state['progress']
        best_net = state['best_net']
        run.save_best(best_it, best_acc, best_net)  # the file may be older or newer than the checkpoint

    def save():
        run.save(net=net.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 stats=ranks.sum(stats).cpu(), progress=(it, row_it, best_it, best_acc, best_nll),
                 best_net=best_net)

    every = min(EVAL_EVERY, max(1, args.iters // 10))
    batches = trn.batches(it)
    one = torch.ones((), device=device)
    loss_scale = scaler.scale(one)  # get_scale() would wait for the GPU
    ranks.catch_signals()
    if args.compile:
        run.status('torch.compile works on the network: less than a minute for R20x1, more for deeper nets')
    try:
        while True:
            if it > row_it and (it % every == 0 or it == args.iters):
                loss, correct, skipped = ranks.sum(stats).tolist()  # waits for the device: updates never do
                with run.not_training('evaluating'):
                    average_running_statistics(net, ranks)
                    val_acc, val_nll = evaluate(net, evl_forward, evals['val'], ranks)
                run.check_finite(loss, skipped, val_nll, scaler.get_scale(), start=row_it, end=it)
                if is_best := val_acc > best_acc:
                    best_it, best_acc, best_nll = it, val_acc, val_nll
                    best_net = {name: t.to('cpu', copy=True) for name, t in net.state_dict().items()}
                mean_lr = sum(lr_at(i, args.iters, args.lr) for i in range(row_it, it)) / (it - row_it)
                seen = (it - row_it) * args.batch
                iter_per_min, img_per_s, wait_percent, elapsed = run.new_row(it)
                run.log(f'{it:7} {mean_lr:10.3e} {loss / seen:8.4f} {correct / seen:7.4f} {val_acc:7.4f} '
                        f'{val_nll:7.4f} {iter_per_min:8.0f} {img_per_s:7.0f} {wait_percent:6.1f} '
                        f'{skipped:7.0f} {elapsed:>8}{" *" * is_best}\n')
                row_it = it
                stats.zero_()
                with run.not_training('saving'):
                    save()
                    if is_best:
                        run.save_best(best_it, best_acc, best_net)
            if it == args.iters:
                break
            ranks.check_signals()  # raises Stopped

            for group in optimizer.param_groups:
                group['lr'] = lr_at(it, args.iters, args.lr)
            with run.waiting():
                images, labels = next(batches)
            passes = zip(images.split(per_pass), labels.split(per_pass), strict=True)
            for i, (x, y) in enumerate(passes, 1):
                with model.no_sync() if world > 1 and i < args.accum else contextlib.nullcontext():
                    loss, loss_and_correct = trn_forward(x, y)
                    scaler.scale(loss).backward()
                stats[:2] += loss_and_correct
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            previous, loss_scale = loss_scale, scaler.scale(one)
            if ranks.rank == 0:  # it falls, on all ranks, if the update was skipped
                stats[2] += loss_scale < previous
            it += 1
            run.progress(it)

        # the only look at the test sets, with the weights of the best validation accuracy
        net.load_state_dict(best_net)
        results = {name: (best_acc, best_nll) if name == 'val' else evaluate(net, evl_forward, batches, ranks)
                   for name, batches in evals.items()}
    except Stopped as stopped:
        run.log(f'stopped by {stopped.args[0].name} at update {it}; --resume continues\n')
        if row_it < args.iters:  # or else it is saved already, and the net has its best weights
            average_running_statistics(net, ranks)
            save()
        ranks.wait()  # or torchrun would end the others before rank 0 has saved
        raise
    run.finish(best_it, results, evals)


if __name__ == '__main__':
    with plain_errors():
        main()
