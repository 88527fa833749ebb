"""What a run leaves on disk."""


def run_folder_name(config):
    """resnet_<D>x<W>..., with what differs from batch 256, lr 0.1 and fp32."""
    name = f'resnet_{config["depth"]}x{config["width"]}'
    name += f'-batch_{config["batch"]}' if config['batch'] != 256 else ''
    iters = config['iters']
    name += f'-iter_{iters // 1000}k' if iters % 1000 == 0 else f'-iter_{iters}'
    name += f'-lr_{config["lr"]:g}' if config['lr'] != 0.1 else ''
    wd = config['wd']
    name += f'-wd_{wd:.4f}' if round(wd, 4) == wd else f'-wd_{wd:g}'
    return name + (f'-{config["precision"]}' if config['precision'] != 'fp32' else '')
