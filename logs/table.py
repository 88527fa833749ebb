"""Turns the logs of finished runs into the README's tables, the reference's figures beside ours.

The table of what nets cost comes from logs/bench.txt, which is what python logs/bench.py --ours printed.

    python logs/table.py                          prints the tables
    python logs/table.py --write                  puts them into README.md, between its markers
    python logs/table.py --check                  fails if README.md, a link in it or a RESULT line is wrong
    python logs/table.py --plot out.png LOG...    draws learning curves (needs matplotlib)

The logs that count have a RESULT line and lie in the folders of the seven data sets: unfinished runs, those
on -synthetic and -incomplete data and those of copied scripts stay out. Figures are means over seeds, ± the
standard deviation of a sample (n - 1). Of runs that differ in nothing but their date the newest counts. Runs
on different devices get lines of their own.

A run stands beside a row of reference.csv if data set, net, precision, batch, updates, learning rate and
weight decay are the same. A run of the same schedule whose net or precision the reference lacks (say,
bf16 on a CPU) gets a line in the same table, without reference figures. All others, most of them shorter,
come last.
"""
import argparse
import csv
import functools
import re
import shlex
import statistics
import sys
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import UserError  # noqa: E402 - the line above finds these
from logs.run import run_folder_name  # noqa: E402
from resnet import ResNet, multiply_adds, parameters  # noqa: E402

NUMBER = r'(-?\d+\.?\d*(?:e[-+]\d+)?|-?inf|nan)'
ROW = re.compile(r' *([1-9]\d*) +' + f'{NUMBER} +' * 9 + r'((?:\d+ days?, )?\d+:\d\d:\d\d)( \*)?')
ROW_KEYS = 'iter lr trn_loss trn_acc val_acc val_nll iter_per_min img_per_s wait skipped elapsed best'.split()
EVALUATION = re.compile(rf'(\S+) +acc {NUMBER}  nll {NUMBER}  \d+ images')
SCHEDULE = ('batch', 'iters', 'lr', 'wd')
SETTINGS = ('dataset', 'depth', 'width', 'precision', *SCHEDULE)
INTEGERS = ('depth', 'width', 'seed', 'params', 'batch', 'iters', 'best_iter', 'world')
FLOATS = ('lr', 'wd', 'val_acc', 'val_nll', 'iter_per_min', 'img_per_s', 'hours')
MARKERS = '<!-- {}: made by python logs/table.py --write -->', '<!-- end of {} -->'


# ---- logs ----

def read_log(path):
    """The parts of a log, all strings; lines of other kinds are left out.

    header: dict. rows: list of dicts of ROW_KEYS, `best` is ' *' or None. evals: dict, val_acc and so on,
    from the lines below the rows. devices: '2 x NVIDIA ...', of the last start. result: dict, or None while
    unfinished. Raises UserError if there is a RESULT line that cannot be read, or anything after it.
    """
    log = SimpleNamespace(path=path, header={}, rows=[], evals={}, devices=None, result=None)
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        if log.result and line.strip():
            raise UserError(f'{path}: the RESULT line is not the last one.')
        if match := ROW.fullmatch(line):
            log.rows.append(dict(zip(ROW_KEYS, match.groups(), strict=True)))
        elif match := EVALUATION.fullmatch(line):
            key = match[1].lower().replace('-', '')
            log.evals |= {f'{key}_acc': match[2], f'{key}_nll': match[3]}
        elif match := re.fullmatch(r'resumed at update \d+ on (.*)', line):
            log.devices = match[1]
        elif line.startswith('RESULT'):
            log.result = read_result(path, line)
        elif not log.rows and ': ' in line:
            key, value = line.split(': ', 1)
            log.header[key.strip()] = value
    log.devices = log.devices or log.header.get('devices')
    return log


def read_result(path, line):
    try:
        pairs = [word.split('=', 1) for word in shlex.split(line)[1:]]
        result = dict(pairs)
        numbers = [int(result[key]) for key in INTEGERS] + [float(result[key]) for key in FLOATS]
        if len(result) < len(pairs) or min(numbers) < 0 or not all(
                result[key] for key in ('dataset', 'precision', 'device')):
            raise ValueError('a key twice, an empty value or a negative number')
        return result
    except (ValueError, KeyError) as error:
        raise UserError(f'{path}: the RESULT line cannot be read ({error}).') from error


@functools.cache
def count_parameters(depth, width, image_size, num_classes):
    with torch.device('meta'):
        return parameters(ResNet(depth, width, image_size, num_classes, mean=(0.5,) * 3, std=(0.5,) * 3))


def contradictions(log, logs):
    """Yields how a RESULT line contradicts its log's header and rows, resnet.py, or its place in `logs`."""
    result, rows, header = log.result, log.rows, log.header
    try:
        last, best = rows[-1], [row for row in rows if row['best']][-1]
        header = header | {key: f'{float(header[key]):g}' for key in ('lr', 'wd')}
        shape = [int(header[key]) for key in ('depth', 'width', 'image_size', 'num_classes')]
        said = [('params', str(count_parameters(*shape)), 'resnet.py')]
        said += [(key, header[key], 'the header') for key in (*SETTINGS, 'seed', 'params')]
    except (IndexError, KeyError, ValueError) as error:
        yield f'it has a RESULT line, but its header or rows are incomplete ({error})'
        return
    said += [('iters', last['iter'], 'the last row'), ('iter_per_min', last['iter_per_min'], 'the last row'),
             ('best_iter', best['iter'], 'the last row with *')]
    said += [(key, best[key], 'the last row with *') for key in ('val_acc', 'val_nll')]
    evaluated = sorted({*log.evals, *(key for key in result if key.endswith(('_acc', '_nll')))})
    said += [(key, log.evals.get(key), 'the lines below the rows') for key in evaluated]
    said += [('device', (log.devices or '').removeprefix(f'{result["world"]} x '), 'the last start')]
    for key, value, source in said:
        if result.get(key) != value:
            yield f'RESULT has {key}={result.get(key)}, {source} {value}'
    if float(best['val_acc']) < max(float(row['val_acc']) for row in rows):
        yield 'the last row with * does not have the highest val acc'
    every, iters = int(rows[0]['iter']), int(last['iter'])
    if [int(row['iter']) for row in rows] != [*range(every, iters, every), iters]:
        yield f'its rows are not those of every {every} updates, each once'
    speeds = [float(row['img_per_s']) for row in rows]
    if not min(speeds) <= float(result['img_per_s']) <= max(speeds):
        yield f'RESULT has img_per_s={result["img_per_s"]}, its rows {min(speeds):.0f} to {max(speeds):.0f}'
    units = zip(reversed(re.findall(r'\d+', last['elapsed'])), (1, 60, 3600, 86400), strict=False)
    if not -2 < 3600 * float(result['hours']) - sum(int(count) * unit for count, unit in units) < 60:
        yield f'RESULT has hours={result["hours"]}, the last row {last["elapsed"]}'
    settings = {key: int(result[key]) for key in INTEGERS} | {key: float(result[key]) for key in ('lr', 'wd')}
    name = run_folder_name(settings | {'precision': result['precision']})
    if (folder := logs / result['dataset'] / name / result['seed']) != log.path.parent:
        yield f'with these settings it belongs into {folder.relative_to(logs)}'


def read_finished(logs, datasets):
    """(logs with a RESULT line in the folders of these data sets, sentences on what is wrong with them)."""
    finished, problems = [], []
    for path in sorted(path for name in datasets for path in (logs / name).rglob('*.log')):
        try:
            log = read_log(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if log.result:
            finished.append(log)
            problems += [f'{path}: {text}.' for text in contradictions(log, logs)]
    return finished, problems


# ---- tables: a line is a pair of a row (of reference.csv, or like one) and the logs of its seeds ----

def values(row, keys):
    return tuple(row[key] for key in keys)


def device(log):
    return f'{log.result["world"]} x {log.result["device"]}'


def pair_up(reference, logs):
    """All lines: those of the reference in its order, with or without logs, then those of other settings."""
    seeds = {}
    for log in sorted(logs, key=lambda log: log.path.name):  # by date, so that the newest stays
        seeds.setdefault((values(log.result, SETTINGS), device(log)), {})[int(log.result['seed'])] = log
    groups = [(settings, [group[seed] for seed in sorted(group)])
              for (settings, _), group in sorted(seeds.items())]
    lines, known = [], [values(row, SETTINGS) for row in reference]
    for row in reference:
        lines += [(row, group) for key, group in groups if key == values(row, SETTINGS)] or [(row, [])]
    for settings, group in groups:
        if settings not in known:
            row = dict.fromkeys(reference[0], '') | dict(zip(SETTINGS, settings, strict=True))
            lines.append((row | {'params': group[0].result['params']}, group))
    return lines


def mean(key, decimals, factor=1):
    """A column: mean ± standard deviation over logs. '—' if there are none, '' if one lacks the key."""
    def cell(row, logs):
        if not logs:
            return '—'
        if not all(key in log.result for log in logs):
            return ''
        numbers = [factor * float(log.result[key]) for log in logs]
        spread = f' ± {statistics.stdev(numbers):.{decimals}f}' if len(numbers) > 1 else ''
        return f'{statistics.fmean(numbers):.{decimals}f}{spread}'
    return cell


def script(row, logs):
    name = f'{row["dataset"].lower()}.py'
    return f'[{name}]({name})' if (ROOT / name).exists() else name


def links(row, logs):
    return ' '.join(f'[{log.result["seed"]}]({"/".join(log.path.parts[-5:])})' for log in logs) or '—'


FIGURES = {'val': ('val_acc', 4), 'tst': ('tst_acc', 4), 'tst nll': ('tst_nll', 4), 'IN': ('in_acc', 4),
           'IN-V2': ('inv2_acc', 4), 'iter/min': ('iter_per_min', 0)}  # what the reference has, too
CELL = {  # title of a column -> function of a line
    'script': script,
    'data set': lambda row, logs: row['dataset'],
    'net': lambda row, logs: f'R{row["depth"]}x{row["width"]}',
    'params': lambda row, logs: f'{int(row["params"]) / 1e6:.2f} M',
    'precision': lambda row, logs: row['precision'],
    **{key: lambda row, logs, key=key: row[key] for key in ('batch', 'lr', 'wd')},
    'updates': lambda row, logs: row['iters'],
    **{title: mean(*figure) for title, figure in FIGURES.items()},
    **{f'ref. {title}': lambda row, logs, key=key: row[key] for title, (key, _) in FIGURES.items()},
    'minutes': mean('hours', 1, factor=60),
    'img/s': mean('img_per_s', 0),
    'ref. device': lambda row, logs: row['hardware'],
    'device': lambda row, logs: device(logs[0]) if logs else '—',
    'n': lambda row, logs: str(len(logs)),
    'logs by seed': links,
}


def markdown(titles, lines):
    cells = [titles, ['-'] * len(titles), *([CELL[title](*line) for title in titles] for line in lines)]
    return ''.join(f'| {" | ".join(texts)} |\n' for texts in cells)


def make_tables(reference, logs):
    """Markdown for the two places in README.md: {'headline': ..., 'results': ...}.

    The headline has the row of each data set with the highest reference accuracy, among those run if any was.
    """
    lines, headline, results, others = pair_up(reference, logs), [], '', []
    for dataset in dict.fromkeys(row['dataset'] for row in reference):
        rows = [row for row in reference if row['dataset'] == dataset]
        schedules, usual = {values(row, SCHEDULE) for row in rows}, []
        for row, group in lines:
            if row['dataset'] == dataset:
                (usual if values(row, SCHEDULE) in schedules else others).append((row, group))
        headline.append(max((line for line in usual if line[0] in rows),
                            key=lambda line: (line[1] != [], float(line[0]['val_acc']), len(line[1]))))
        titles = ['net', 'params', 'precision', *['batch'] * (len({row['batch'] for row in rows}) > 1)]
        for title, (key, _) in FIGURES.items():
            titles += [f'ref. {title}', title] if any(row[key] for row in rows) else []
        titles += ['ref. device', 'device', 'n', 'logs by seed']
        results += f'### {dataset}\n\n{markdown(titles, usual)}\n'
    if others:
        titles = ('data set', 'net', 'precision', 'batch', 'updates', 'lr', 'wd', 'val', 'tst', 'minutes',
                  'img/s', 'device', 'n', 'logs by seed')
        results += f'### Shorter runs and other settings\n\n{markdown(titles, others)}'
    titles = ('script', 'net', 'params', 'precision', 'ref. val', 'val', 'ref. tst', 'tst', 'minutes',
              'device', 'logs by seed')
    return dict(headline=markdown(titles, headline), results=results)


@functools.lru_cache
def cost_table(bench):
    """Markdown for what nets cost, the first one as the unit, from the text that bench.py --ours printed."""
    pattern = r' *(\d+)x(\d+) +(\d+) +(\d+) +ours +\w+ +(\d+) +(\d+) +\S+ +\S+ +(\d+) +(\d+)\s*'
    table = [match.groups() for match in map(re.compile(pattern).fullmatch, bench.splitlines()) if match]
    if not table:
        raise UserError('logs/bench.txt has no line of a net: it is made by python logs/bench.py --ours')
    units, lines = [], ''
    for depth, width, px, batch, iter_per_min, img_per_s, memory, limit in table:
        with torch.device('meta'):
            net = ResNet(int(depth), int(width), int(px), 1000, (0.5,) * 3, (0.5,) * 3)
        rate = float(img_per_s)
        if int(iter_per_min) > rate:  # both are rounded: the larger one has more digits
            rate = int(iter_per_min) * int(batch) / 60
        costs = multiply_adds(net, int(px)) / 1e6, 1 / rate
        units = units or costs
        lines += (f'| R{depth}x{width} | {px} | {batch} | {costs[0]:.0f} | {costs[0] / units[0]:.1f} '
                  f'| {costs[1] / units[1]:.1f} | {iter_per_min} | {img_per_s} | {int(memory) / 1000:.1f} '
                  f'| {limit} % |\n')
    titles = ('net', 'px', 'batch', 'multiply-adds, M', 'relative', 'time per image, relative', 'iter/min',
              'img/s', 'memory, GB', 'of the matrix rate')
    return (f'| {" | ".join(titles)} |\n|{" - |" * len(titles)}\n{lines}\n'
            f'[logs/bench.txt](logs/bench.txt): {bench.splitlines()[0]}.')


# ---- README.md ----

def put(readme, name, text):
    """A README with `text` between the markers called `name`."""
    start, end = (marker.format(name) for marker in MARKERS)
    if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(start) > readme.index(end):
        raise UserError(f'README.md needs the lines "{start}" and "{end}", each once and in this order.')
    return f'{readme.split(start)[0]}{start}\n\n{text.strip()}\n\n{end}{readme.split(end)[1]}'


def dead_links(readme, root):
    """Yields the targets of links that are neither on the web, nor a file, nor a heading of `readme`."""
    prose = re.sub(r'^```.*?^```$', '', readme, flags=re.M | re.S)
    anchors = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
               for heading in re.findall(r'^#+ (.*)', prose, re.M)]
    for target in re.findall(r'\]\(([^)\s]+)\)', prose):
        file, _, anchor = target.partition('#')
        if not re.match(r'\w+:', target) and not ((root / file).exists() if file else anchor in anchors):
            yield target


def make(root):
    """(tables for README.md as in `make_tables`, and costs; what is wrong with the logs, in sentences)."""
    reference = list(csv.DictReader((root / 'logs' / 'reference.csv').read_text().splitlines()))
    logs, problems = read_finished(root / 'logs', {row['dataset'] for row in reference})
    bench = (root / 'logs' / 'bench.txt').read_text(encoding='utf-8')
    return make_tables(reference, logs) | {'costs': cost_table(bench)}, problems


def check(root, write=False):
    """What is wrong under `root` with logs, and with tables and links of README.md, as a list of sentences.

    `write` puts the tables right first, unless something is wrong with the logs.
    """
    tables, problems = make(root)
    path, temporary = root / 'README.md', root / 'README.tmp'
    readme = current = path.read_text(encoding='utf-8')
    for name, text in tables.items():
        current = put(current, name, text)
    if write and not problems:
        temporary.write_text(current, encoding='utf-8')
        temporary.replace(path)
        readme = current
    for number, (old, new) in enumerate(zip_longest(readme.split('\n'), current.split('\n')), 1):
        if old != new:
            problems.append(f'README.md, line {number}, disagrees with the logs. It has\n    {old}\nbut they '
                            f'give\n    {new}\nRun python logs/table.py --write.')
            break
    return problems + [f'README.md: the link {target} is dead.' for target in dead_links(readme, root)]


# ---- learning curves ----

def plot(picture, paths):
    """Draws validation accuracy and training loss of logs, finished or not; the ending says the format."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('Drawing needs matplotlib: python -m pip install matplotlib') from error
    logs = [read_log(path) for path in paths]
    for log in logs:
        if not log.rows or not {*SETTINGS, 'seed'} <= log.header.keys():
            raise UserError(f'{log.path} is not a log with rows to draw.')
    # a run is called by its data set and net, and by what else is not the same for all
    differing = [key for key in ('precision', *SCHEDULE, 'seed')
                 if len({log.header[key] for log in logs}) > 1]
    figure = Figure(figsize=(9, 4), dpi=100, layout='constrained')
    for axes, key, title in zip(figure.subplots(1, 2), ('val_acc', 'trn_loss'),
                                ('validation accuracy', 'training loss'), strict=True):
        for i, log in enumerate(logs):
            name = '{dataset} {depth}x{width}'.format_map(log.header)
            axes.plot([int(row['iter']) for row in log.rows], [float(row[key]) for row in log.rows],
                      label=', '.join([name, *(f'{key} {log.header[key]}' for key in differing)]),
                      color=colormaps['viridis'](0.8 * i / len(logs)),
                      linestyle=('-', '--', '-.', ':')[i % 4],
                      marker='osD^vX'[i % 6], markersize=5, markevery=max(1, len(log.rows) // 10))
        axes.set(xlabel='updates', title=title)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    temporary = picture.with_name(f'{picture.name}.tmp')
    try:
        figure.savefig(temporary, format=picture.suffix[1:])
        temporary.replace(picture)
    except ValueError as error:  # an unknown format
        raise UserError(f'{picture}: {error}') from error
    finally:
        temporary.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument('--write', action='store_true', help='put the tables into README.md')
    task.add_argument('--check', action='store_true', help='say what is wrong, and exit with 1')
    task.add_argument('--plot', type=Path, metavar='PICTURE', help='draw the learning curves of LOG...')
    parser.add_argument('logs', type=Path, nargs='*', metavar='LOG')
    args = parser.parse_args()
    if bool(args.plot) != bool(args.logs):
        raise UserError('To draw, name a picture and logs: python logs/table.py --plot out.png LOG...')
    if args.plot:
        plot(args.plot, args.logs)
        return
    if args.write or args.check:
        problems = check(ROOT, args.write)
    else:
        tables, problems = make(ROOT)
        print(*tables.values(), sep='\n')
    if problems:
        sys.exit('\n'.join(problems))


if __name__ == '__main__':
    try:
        main()
    except (UserError, OSError) as error:
        print(f'table.py: {error}', file=sys.stderr)
        sys.exit(2)
