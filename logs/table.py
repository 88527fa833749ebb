"""Turns logs into tables and pictures of README.md and logs/README.md, the reference's figures beside ours.

    python logs/table.py              prints the tables
    python logs/table.py --write      puts them into both pages, and the published weights into .gitignore
    python logs/table.py --check      fails if a log, a table or a link is wrong
    python logs/table.py --plot       draws logs/curves-<DATASET>.png (needs matplotlib)

The logs that count lie in the folders of the seven data sets; those of copied scripts, and of -synthetic and
-incomplete data, do not. A run stands beside a row of reference.csv if data set, net and schedule (batch,
updates, learning rate, weight decay) are the same. Where the reference has such a row in fp32 and in fp16,
runs in fp32 stand beside the first, all others beside the second. Runs that were stopped, or still go on,
count as far as their rows go. Finished runs without a row to stand beside come last.

Figures are means over seeds, ± the standard deviation of a sample (n - 1). Of runs with the same settings,
seed and device the newest counts; one that was stopped only if none is finished. Other devices have other
lines; README.md has the newest finished one of each row.
Weights (.best.pt) of finished runs beside a row are published if they are there and have at most 5 MB.
"""
import csv
import difflib
import functools
import itertools
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import SETS, UserError, new_file  # noqa: E402 - the line above finds these
from logs.run import plain_errors, run_folder_name  # noqa: E402
from resnet import ResNet, parameters  # noqa: E402

NUMBER = r'(-?\d+\.?\d*(?:e[-+]\d+)?|-?inf|nan)'
ROW = re.compile(r' *([1-9]\d*) +' + f'{NUMBER} +' * 9 + r'((?:\d+ days?, )?\d+:\d\d:\d\d)( \*)?')
ROW_KEYS = 'iter lr trn_loss trn_acc val_acc val_nll iter_per_min img_per_s wait skipped elapsed best'.split()
EVALUATION = re.compile(rf'(\S+) +acc {NUMBER}  nll {NUMBER}  \d+ images')
SCHEDULE = ('dataset', 'depth', 'width', 'batch', 'iters', 'lr', 'wd')
SETTINGS = (*SCHEDULE, 'precision')
CURVE = ('dataset', 'depth', 'width', 'batch', 'precision', 'hardware')
TEST_SETS = {'IN-V2': 'inv2_acc', 'IN-R': 'inr_acc', 'IN-A': 'ina_acc', 'IN-Sketch': 'insketch_acc'}
NAMES = {'batch': 'batch', 'iters': 'updates', 'lr': 'learning rate', 'wd': 'weight decay',
         'hardware': 'reference on'}


# ---- logs ----

def read_log(path):
    """The parts of a log, all strings; lines of other kinds are left out.

    header: dict. rows: list of dicts of ROW_KEYS, `best` is ' *' or None. evals: dict, val_acc and so on,
    from the lines below the rows. devices: '2 x NVIDIA ...', of the last start. result: dict, or None while
    unfinished. Raises ValueError if there is a RESULT line that cannot be read, or anything after it.
    """
    log = SimpleNamespace(path=path, header={}, rows=[], evals={}, devices=None, result=None)
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        if log.result and line.strip():
            raise ValueError('the RESULT line is not the last one')
        if match := ROW.fullmatch(line):
            log.rows.append(dict(zip(ROW_KEYS, match.groups(), strict=True)))
        elif match := EVALUATION.fullmatch(line):
            key = match[1].lower().replace('-', '')
            log.evals |= {f'{key}_acc': match[2], f'{key}_nll': match[3]}
        elif match := re.fullmatch(r'resumed at update \d+ on (.*?)(;.*)?', line):
            log.devices = match[1]
        elif line.startswith('RESULT'):
            log.result = read_result(line)
        elif not log.rows and ': ' in line:
            key, value = line.split(': ', 1)
            log.header[key.strip()] = f'{float(value):g}' if key.strip() in ('lr', 'wd') else value
    log.devices = log.devices or log.header.get('devices')
    return log


def read_result(line):
    """{key: value} of a RESULT line, which has to be what these give when they are written again."""
    result = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
    if line != ' '.join(['RESULT', *(f'{key}={value}' for key, value in result.items())]):
        raise ValueError('the RESULT line cannot be read: it takes key=value pairs, each key once')
    return {key: value.strip('"') for key, value in result.items()}


@functools.cache
def count_parameters(depth, width, image_size, num_classes):
    with torch.device('meta'):
        return parameters(ResNet(depth, width, image_size, num_classes, mean=(0.5,) * 3, std=(0.5,) * 3))


def contradictions(log, logs):
    """Yields what is wrong with a log, finished or not: with its header, its rows, its place in `logs`."""
    header, rows = log.header, log.rows
    try:
        config = {key: int(header[key]) for key in ('depth', 'width', 'batch', 'iters', 'seed', 'params')}
        config |= {key: float(header[key]) for key in ('lr', 'wd')} | {'precision': header['precision']}
        shape = [int(header[key]) for key in ('depth', 'width', 'image_size', 'num_classes')]
        values(header, ('command', 'versions', 'devices', 'commit', 'images', 'momentum', 'warmup'))
        place = Path(header['dataset'], run_folder_name(config), header['seed'])
    except (KeyError, ValueError) as error:
        yield f'its header is incomplete ({error})'
        return
    if count_parameters(*shape) != config['params']:
        yield f'the header has params {config["params"]}, resnet.py {count_parameters(*shape)}'
    if (header['momentum'], header['warmup']) != ('0.9', '0.1'):
        yield "its momentum or warm-up is not the recipe's: a copy of the script has a folder of its own"
    if logs / place != log.path.parent:
        yield f'with these settings it belongs in {place}'
    if not re.fullmatch(r'\d{8}-\d{6}', log.path.stem):
        yield 'its name is not the time of its start, like 20261124-183000.log'
    every = min(1000, max(1, config['iters'] // 10))
    complete = [*range(every, config['iters'], every), config['iters']]
    if [int(row['iter']) for row in rows] != (complete if log.result else complete[:len(rows)]):
        yield f'its rows are not those of every {every} updates, each once, up to {config["iters"]}'
    best = -1.0
    for row in rows:  # two that look the same may differ in what was rounded off
        accuracy = float(row['val_acc'])
        if accuracy > best and not row['best'] or accuracy < best and row['best']:
            yield f'row {row["iter"]} is {"" if row["best"] else "not "}marked as the best, wrongly'
        best = max(best, accuracy)
    if log.result and any(row['best'] for row in rows):
        yield from result_contradictions(log)


def result_contradictions(log):
    result, last, best = log.result, log.rows[-1], [row for row in log.rows if row['best']][-1]
    said = [(key, log.header[key], 'the header') for key in (*SETTINGS, 'seed', 'params')]
    said += [('iter_per_min', last['iter_per_min'], 'the last row')]
    said += [('best_iter', best['iter'], 'the last row with *')]
    said += [(key, best[key], 'the last row with *') for key in ('val_acc', 'val_nll')]
    evaluated = sorted({*log.evals, *(key for key in result if key.endswith(('_acc', '_nll')))})
    said += [(key, log.evals.get(key), 'the lines below the rows') for key in evaluated]
    said += [('device', log.devices.removeprefix(f'{result.get("world")} x '), 'the last start')]
    for key, value, source in said:
        if result.get(key) != value:
            yield f'RESULT has {key}={result.get(key)}, {source} {value}'
    speed, hours = (float(result.get(key, 'nan')) for key in ('img_per_s', 'hours'))
    speeds = [float(row['img_per_s']) for row in log.rows]
    if not min(speeds) <= speed <= max(speeds):
        yield f'RESULT has img_per_s={speed:g}, its rows {min(speeds):.0f} to {max(speeds):.0f}'
    units = zip(reversed(re.findall(r'\d+', last['elapsed'])), (1, 60, 3600, 86400), strict=False)
    if not -2 < 3600 * hours - sum(int(count) * unit for count, unit in units) < 60:
        yield f'RESULT has hours={hours:g}, the last row {last["elapsed"]}'


def read_logs(logs, datasets):
    """(good logs with rows in the folders of these data sets, sentences on what is wrong with the others)."""
    good, problems = [], []
    for path in sorted(path for name in datasets for path in (logs / name).rglob('*.log')):
        try:
            log = read_log(path)
            wrong = list(contradictions(log, logs))
        except ValueError as error:
            wrong = [error]
        problems += [f'{path}: {text}.' for text in wrong]
        good += [log] if not wrong and log.rows else []
    return good, problems


# ---- lines: a row of the reference and the runs beside it, which differ in their seed only ----

def values(row, keys):
    return tuple(row[key] for key in keys)


def read_reference(logs):
    """The rows of reference.csv, strings, each with its `curve`: {update: row of reference_curves.csv}."""
    rows, points = ([*csv.DictReader((logs / name).read_text().splitlines())]
                    for name in ('reference.csv', 'reference_curves.csv'))
    curves = {values(row, CURVE): {} for row in rows}
    for point in points:
        curves[values(point, CURVE)][point['iter']] = point
    return [row | {'curve': curves[values(row, CURVE)]} for row in rows]


def make_lines(reference, logs):
    """([(row, runs or [])] of all rows in their order, [(header, runs)] of finished runs without a row)."""
    finished = {values(log.header, (*SETTINGS, 'seed')) for log in logs if log.result}
    newest, groups, lines, others = {}, {}, [], []
    for log in sorted(logs, key=lambda log: log.path.name):  # by date
        run = values(log.header, (*SETTINGS, 'seed'))
        if log.result or run not in finished:
            newest[run, log.devices] = log
    for log in sorted(newest.values(), key=lambda log: int(log.header['seed'])):
        same = (values(log.header, SETTINGS), log.devices) if log.result else log.path  # one stopped is alone
        groups.setdefault(same, []).append(log)
    for runs in groups.values():
        header = runs[0].header
        fits = [row for row in reference if values(row, SCHEDULE) == values(header, SCHEDULE)]
        precision = 'fp32' if header['precision'] == 'fp32' else 'fp16'
        lines += [(row, runs) for row in [row for row in fits if row['precision'] == precision] or fits]
        others += [(header, runs)] if runs[0].result and not fits else []
    lines += [(row, []) for row in reference if all(row is not other for other, _ in lines)]
    return sorted(lines, key=lambda line: reference.index(line[0])), others


def compare(row, runs):
    """(training loss, reference / ours, at the last update that both logs have; ours over theirs at all)."""
    last, ratios = [], []
    for log in runs:
        common = [(row['curve'][point['iter']]['trn_loss'], point['trn_loss'])
                  for point in log.rows
                  if point['iter'] in row['curve'] and 0 < float(point['trn_loss']) < math.inf]
        last += common[-1:]
        ratios += [float(ours) / float(theirs) for theirs, ours in common]
    return pair(last[0][0], mean([float(ours) for _, ours in last], 4)) if last else '', ratios


def mean_ratio(row, runs):
    return statistics.geometric_mean(compare(row, runs)[1])


# ---- tables and sentences ----

def mean(numbers, decimals):
    spread = f' ± {statistics.stdev(numbers):.{decimals}f}' if len(numbers) > 1 else ''
    return f'{statistics.fmean(numbers):.{decimals}f}{spread}'


def ours(runs, key, decimals=4):
    """Mean ± standard deviation of a figure of RESULT lines, '' if there are none or one lacks it."""
    figures = [(log.result or {}).get(key) for log in runs]
    return mean([float(figure) for figure in figures], decimals) if figures and all(figures) else ''


def pair(theirs, ours):
    """The reference's figure and, in bold type, ours, as far as there are any."""
    return ' / '.join(filter(None, [theirs, ours and f'**{ours}**']))


def named(keys, figure):
    return ', '.join(f'{name} {figure(key)}' for name, key in keys.items() if figure(key))


def net(row):
    return f'R{row["depth"]}x{row["width"]}'


def links(runs, file=lambda log: log.path):
    return ' '.join(f'[{log.header["seed"]}]({"/".join(file(log).parts[-4:])})' for log in runs if file(log))


def weights(log):
    """Path of the weights of a run, or None if they are not there or too large to be published."""
    path = log.path.with_suffix('.best.pt')
    return path if path.exists() and path.stat().st_size <= 5_000_000 else None


def markdown(lines):
    """A table of dicts {title: text}, without the columns that would be empty; '' without lines."""
    if not lines:
        return ''
    titles = [title for title in lines[0] if any(line[title] for line in lines)]
    table = [titles, ['-'] * len(titles), *([line[title] for title in titles] for line in lines)]
    return ''.join(f'| {" | ".join(texts)} |\n' for texts in table)


def data_set_table(lines):
    """What the rows of a data set have in common, in a sentence, then a line for each."""
    same = [key for key in NAMES if len({row[key] for row, _ in lines}) == 1]
    sentence = ', '.join(f'{NAMES[key]} {lines[0][0][key]}' for key in same)
    more = [key for key in ('batch', 'hardware') if key not in same]  # the rest follows the batch
    return f'{sentence[0].upper()}{sentence[1:]}.\n\n' + markdown([{
        ', '.join(['net, parameters', *(NAMES[key] for key in more)]):
            ', '.join([net(row), f'{row["params_m"]}M', *values(row, more)]),
        'precision': pair(row['precision'], runs and runs[0].header['precision']),
        'val': pair(row['val_acc'], ours(runs, 'val_acc')),
        'tst': pair(row['tst_acc'], ours(runs, 'tst_acc')),
        'tst nll': pair(row['tst_nll'], ours(runs, 'tst_nll')),
        'IN': pair(row['in_acc'], row['in_acc'] and ours(runs, 'val_acc')),  # the same images
        'other test sets': pair(named(TEST_SETS, row.get), named(TEST_SETS, functools.partial(ours, runs))),
        'updates': pair('', runs and runs[0].rows[-1]['iter']),
        'trn loss, reference / ours': compare(row, runs)[0],
        'mean ratio': pair('', compare(row, runs)[0] and f'{mean_ratio(row, runs):.3f}'),
        'log by seed': links(runs)} for row, runs in lines])


def runs_table(lines):
    """A line for each run, or runs that differ in their seed only; the settings of those without a row."""
    both, settings = {'val': 'val_acc', 'tst': 'tst_acc'}, '{iters} updates, batch {batch}, lr {lr}, wd {wd}'
    return markdown([{
        'data set': row['dataset'],
        'net': f'{net(row)}, {runs[0].header["precision"]}',
        'settings': 'curve' not in row and settings.format_map(row) or '',
        'reference': named(both, row.get),
        'ours': named(both, functools.partial(ours, runs)),
        'hours': ours(runs, 'hours', 2),
        'device': runs[0].devices,
        'log by seed': links(runs),
        'weights': links(runs, weights)} for row, runs in lines])


def on_finished(row, runs):
    kind, key = ('test', 'tst_acc') if row['tst_acc'] else ('validation', 'val_acc')
    images, accuracy = SETS[row['dataset']]['test' if key == 'tst_acc' else 'val'], float(row[key])
    error = math.sqrt(accuracy * (1 - accuracy) / images)  # standard deviation of a binomial distribution
    off, most = mean_ratio(row, runs) - 1, max(abs(ratio - 1) for ratio in compare(row, runs)[1])
    return (f'{net(row)} on {row["dataset"]} ({runs[0].header["precision"]}, {runs[0].devices}, '
            f'{ours(runs, "hours", 2)} hours) reaches a {kind} accuracy of **{ours(runs, key)}**, the '
            f'reference {row[key]} (standard error on {images} images: {error:.3f}); its training loss is '
            f'within {100 * most:.1f} % of the reference\'s at all {len(runs[0].rows)} rows of their logs, '
            f'{100 * abs(off):.1f} % {"higher" if off > 0 else "lower"} in the geometric mean.')


def on_stopped(lines):
    means = [mean_ratio(*line) for line in lines]
    updates = [int(runs[0].rows[-1]['iter']) for _, runs in lines]
    return (f'Runs not finished: {len(lines)}. Their training losses over the first {min(updates)} to '
            f'{max(updates)} updates are {min(means):.3f} to {max(means):.3f} times the reference\'s, in the '
            f'geometric mean of each run.') if lines else ''


def on_missing(datasets, lines):
    missing = [dataset for dataset in datasets if dataset not in [row['dataset'] for row, _ in lines]]
    return f'Data sets without a run yet: {", ".join(missing)}.' if missing else ''


# ---- pages ----

def make(root):
    """({page: {name of a place on it: text}}, what is wrong with the logs, in sentences)."""
    logs = root / 'logs'
    reference = read_reference(logs)
    datasets = [*dict.fromkeys(row['dataset'] for row in reference)]
    good, problems = read_logs(logs, datasets)
    lines, others = make_lines(reference, good)
    first = {runs[0].path: row for row, runs in reversed(lines) if runs}  # of the rows that a run fits
    begun = [(row, runs) for row, runs in lines if runs and row is first[runs[0].path]]
    finished = [(row, runs) for row, runs in begun if runs[0].result]
    stopped = [(row, runs) for row, runs in begun if not runs[0].result and compare(row, runs)[0]]
    tables = ''
    for dataset in datasets:
        mine = [line for line in lines if line[0]['dataset'] == dataset]
        picture = f'![{dataset}](curves-{dataset}.png)\n\n' if any(runs for _, runs in mine) else ''
        tables += f'### {dataset}\n\n{picture}{data_set_table(mine)}\n'
    published = [weights(log).relative_to(root) for _, runs in finished for log in runs if weights(log)]
    by_row = itertools.groupby(finished, key=lambda line: reference.index(line[0]))
    newest = [max(runs, key=lambda line: max(log.path.name for log in line[1])) for _, runs in by_row]
    full = [line for line in newest if compare(*line)[1]]
    return {
        'README.md': {'headline': on_finished(*full[0]) if full else '',
                      'results': f'{runs_table(newest).replace("](", "](logs/")}\n{on_stopped(stopped)} '
                                 f'{on_missing(datasets, begun)}'},
        'logs/README.md': {'results': tables, 'others': runs_table(others),
                           'costs': f'```\n{(logs / "bench.txt").read_text(encoding="utf-8").strip()}\n```'},
        '.gitignore': {'weights': '\n'.join(f'!/{path.as_posix()}' for path in published)},
    }, problems


def put(page, text, name, new):
    """The text of a page with `new` between the markers called `name`."""
    marker = '# {}' if page == '.gitignore' else '<!-- {} -->'
    start, end = map(marker.format, (f'{name}: made by python logs/table.py --write', f'end of {name}'))
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f'{page} needs the lines "{start}" and "{end}", each once and in this order.')
    return text.split(start)[0] + '\n'.join(filter(None, [start, new.strip(), end])) + text.split(end)[1]


def dead_links(path):
    """Yields the targets of links on a page that are neither on the web, nor a file, nor a heading of it."""
    prose = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.M | re.S)
    anchors = ['#' + re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
               for heading in re.findall(r'^#+ (.*)', prose, re.M)]
    for target in re.findall(r'\]\(([^)\s]+)\)', prose):
        if not re.match(r'\w+:', target) and target not in anchors and not (path.parent / target).exists():
            yield target


def check(root, write=False):
    """What is wrong under `root` with logs, and with tables and links of the pages, as a list of sentences.

    `write` puts the tables right first, unless something is wrong with the logs.
    """
    pages, problems = make(root)
    write = write and not problems
    for page, places in pages.items():
        path = root / page
        old = new = path.read_text(encoding='utf-8')
        for name, text in places.items():
            new = put(page, new, name, text)
        if write:
            with new_file(path) as file:
                file.write(new.encode('utf-8'))
        elif old != new:
            diff = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm='')
            problems.append('\n'.join([f'{page} disagrees with the logs: run python logs/table.py --write.',
                                       *itertools.islice(diff, 2, 8)]))
        problems += [f'{page}: the link {target} is dead.' for target in dead_links(path)]
    return problems


# ---- curves ----

def plot(root):
    """Draws a picture of every data set that has runs, of each net those that went furthest.

    Returns what is wrong with the logs, in sentences.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise UserError('Drawing needs matplotlib: python -m pip install matplotlib') from error
    reference = read_reference(root / 'logs')
    logs, problems = read_logs(root / 'logs', {row['dataset'] for row in reference})
    lines = [line for line in make_lines(reference, logs)[0] if line[1]]
    furthest = {(line[0]['dataset'], net(line[0])): line
                for line in sorted(lines, key=lambda line: len(line[1][0].rows))}
    lines = [line for line in lines if line in furthest.values()]
    for dataset in {row['dataset'] for row, _ in lines}:
        figure = Figure(figsize=(7.5, 4.3), dpi=140, layout='constrained')
        panels = ('training loss', 'trn_loss', 'log'), ('validation accuracy', 'val_acc', 'linear')
        for axes, (title, key, scale) in zip(figure.subplots(1, 2), panels, strict=True):
            colors = {}
            for row, runs in [line for line in lines if line[0]['dataset'] == dataset]:
                color = colors.setdefault(net(row), f'C{len(colors)}')
                for rows, style in [(row['curve'].values(), ':'), *((log.rows, '.-') for log in runs)]:
                    axes.plot([int(row['iter']) for row in rows], [float(row[key]) for row in rows], style,
                              color=color, linewidth=1.1 if style == ':' else 1.6)
            axes.set(title=title, xlabel='updates', xscale='log', yscale=scale)
            for axis in (axes.xaxis, axes.yaxis) if scale == 'log' else (axes.xaxis,):
                axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
                         major_formatter='{x:g}')
            axes.grid(alpha=0.3)
        for name, color in colors.items():
            axes.plot([], color=color, label=name)
        figure.legend(loc='outside lower center', ncols=4)
        figure.suptitle(f'{dataset}: ours solid, the reference dotted')
        with new_file(root / 'logs' / f'curves-{dataset}.png') as file:
            figure.savefig(file, metadata={'Software': None})
    return problems


def main():
    match sys.argv[1:]:
        case []:
            pages, problems = make(ROOT)
            print(*(text for places in pages.values() for text in places.values()), sep='\n')
        case ['--write' | '--check' as task]:
            problems = check(ROOT, write=task == '--write')
            if not problems:
                print('Logs, tables and links agree.')
        case ['--plot']:
            problems = plot(ROOT)
        case ['-h' | '--help']:
            return print(__doc__)
        case _:
            sys.exit(__doc__)
    if problems:
        sys.exit('\n'.join(problems))


if __name__ == '__main__':
    with plain_errors():
        main()
