"""Files as users have them: python -m tests.fuzz --mutations 1000 [--seed 0]

Every kind of file that is read has its bytes, encoding, strings, name, file type or permission
changed. A changed checkpoint or state must be refused (or hold what it held); the others are
refused or valid. Every kind of file that is written meets a full disk: the old or the new content
is left, whole. Anything but an error of one line is a finding, and so is a wait of 20 seconds.
"""

import argparse
import builtins
import collections
import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

from etrm_arc import checkpoint, cli, config, score, show, solve, sources, train
from etrm_arc.config import UserError
from etrm_arc.extras import cache, published, report, submissions
from etrm_arc.tests.test_train import SET, tiny

DATA = Path(__file__).parent / "data"
NAMES = ["x[red].json", "[b]", "\x1b[31m", "a\nb", "\u202e", "\u2028", os.fsdecode(b"\xff\xfe")]
NAMES += ["n" * 240, ".hidden", "-x", "%s {0} $\\frac$", "<script>", "~", " ", "\u00e9"]


def changed_bytes(content, draw):
    """One to three changes."""
    for _ in range(draw.randint(1, 3)):
        digits = [i for i, byte in enumerate(content[:4000]) if 48 <= byte < 58]
        a = draw.choice(digits if digits and draw.random() < 0.3 else range(len(content) + 1))
        b = a + draw.choice((0, 1, 40, len(content)))
        parts = [b"", b"7", b"-1", b"1e999", b"null", content[a:b] * 2, draw.randbytes(1)]
        content = content[:a] + draw.choice([*parts, b"[" * 10**5, b'{"a":' * 10**5]) + content[b:]
    return content


def other_encoding(content, draw):
    text = content.decode("latin-1")
    ends = text.replace("\n", draw.choice(("\r\n", "\r", "\u2028"))).encode()
    return draw.choice((b"\xef\xbb\xbf" + content, ends, text.encode("utf-16"), ends + b"\xe9"))


def odd_string(content, draw):
    """A string within the file, a name or a key, becomes an odd one."""
    pieces = content.split(b'"')
    if len(pieces) > 2:
        odd = draw.choice([json.dumps(name)[1:-1].encode() for name in NAMES] + [b"\x1b[31m\xff"])
        pieces[draw.randrange(1, len(pieces), 2)] = odd
    return b'"'.join(pieces)


CONTENTS = {"bytes": changed_bytes, "encoding": other_encoding, "string": odd_string}
FAMILIES = [*CONTENTS, "name", "file", "permission"]


def other_file(path, draw):
    """A pipe, a folder, a device, a link to nothing or itself, or nothing at all."""
    path.unlink()
    makers = [os.mkfifo, Path.mkdir, Path.touch]
    makers += [functools.partial(Path.symlink_to, target=x) for x in ("/dev/zero", "gone", path)]
    draw.choice(makers)(path)


@contextlib.contextmanager
def forbidden(path):
    """The file cannot be opened, whoever runs this."""

    def guarded(function, file, *args, **options):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return function(file, *args, **options)

    with contextlib.ExitStack() as patches:
        for owner in (builtins, io, os):
            patch = mock.patch.object(owner, "open", functools.partial(guarded, owner.open))
            patches.enter_context(patch)
        yield


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def verdict(use, path):
    """valid, refused, or a finding, of using the file as the command would."""
    signal.alarm(20)
    try:
        use(path)
        return "valid"
    except (UserError, OSError) as e:  # the command names the file of an OSError
        return "refused" if str(e) and cli.printable(e).isprintable() else "FINDING: no line"
    except (Exception, KeyboardInterrupt) as e:
        if signal.alarm(0) and isinstance(e, KeyboardInterrupt):  # not by the alarm
            raise
        traceback.print_exc()
        return f"FINDING: {type(e).__name__} in {path.name!a}"
    finally:
        signal.alarm(0)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--mutations", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    draw, work = random.Random(args.seed), Path(tempfile.mkdtemp())
    run, votes, sent = work / "run", work / "predictions.jsonl", work / "submission.json"
    train.fit(tiny(run, model__hidden=16))
    solve.evaluate([run], [SET], predictions_file=str(votes), submit=str(sent))
    last, whole = checkpoint.read(run / "last.safetensors"), checkpoint.load_state(run)
    torch.save(last[0], work / "step_1")

    def state(path):
        saved = checkpoint.load_state(path.parent)
        if saved.facts["step"] == whole.facts["step"]:
            equal = all(torch.equal(v, saved.tensors[k]) for k, v in whole.tensors.items())
            assert equal and saved.facts == whole.facts, "a wrong resume"

    def weights(path):
        checkpoint.load(path)
        assert path.read_bytes() == (run / "last.safetensors").read_bytes(), "damaged, yet read"

    def page(path):
        report.columns(report.compared([report.opened(path.parent)] * 2))
        report.report(path.parent, [])

    readers = {
        "checkpoint": ([run / "last.safetensors"], weights),
        "state": ([checkpoint.states(run)[-1]], state),
        "run": ([run / "metrics.jsonl", run / "run.json"], page),
        "published": ([work / "step_1"], published.read_state),
        "config": (sorted(config.SHIPPED.glob("*.toml")), config.load_config),
        "predictions": ([votes, sent], lambda path: score.unions(submissions.read_votes(path))),
        "task": (sorted(DATA.glob("**/*.json")), lambda path: report.describe(sources.load(path))),
    }
    counts = collections.defaultdict(collections.Counter)
    for kind, (files, use) in readers.items():
        for _ in range(args.mutations):
            family, name = draw.choice(FAMILIES), draw.choice(NAMES)
            folder, original = work / (name if family == "name" else "changed"), draw.choice(files)
            shutil.copytree(run if kind in ("state", "run") else SET, folder)
            path = folder / original.name
            shutil.copy(original, path)
            if family in CONTENTS:
                path.write_bytes(CONTENTS[family](path.read_bytes(), draw))
            elif family == "name" and kind not in ("state", "run"):
                path = path.rename(path.with_name(name + path.suffix))
            elif family == "file":
                other_file(path, draw)
            with forbidden(path) if family == "permission" else contextlib.nullcontext():
                counts[kind][f"{family} {verdict(use, path)}"] += 1
            shutil.rmtree(folder)
    runs, tasks, figure = [report.opened(run)] * 2, sources.load(SET), show.new_figure(1, 1)
    lines, table = votes.read_text().splitlines(), report.compared(runs)
    writers = {
        "a.json": lambda path: checkpoint.write_text(path, "x" * 5000),
        "a.safetensors": lambda path: checkpoint.save(path, *last),
        "a.png": lambda path: show.save(figure, path),
        "a.csv": lambda path: report.save_comparison(runs, table, str(path), ""),
        "a.npz": lambda path: cache.write(path, tasks),
        "a.jsonl": lambda path: score.append(path, lines),
    }
    for name, write in writers.items():
        for _ in range(args.mutations):
            folder, old = work / "full", b"old\n" * draw.randrange(300)
            folder.mkdir()
            write(folder / name)
            size = len((folder / name).read_bytes())
            (folder / name).write_bytes(old)
            with full_disk(draw.randrange(2 * size)):
                result = verdict(write, folder / name)
            [left] = [path.read_bytes() for path in folder.iterdir()]  # and nothing beside it
            intact = left == old or len(left) == size or (name == "a.jsonl" and old in left)
            counts[name][f"full disk {result if intact else 'FINDING: lost'}"] += 1
            shutil.rmtree(folder)
    shutil.rmtree(work)
    print(json.dumps(counts, sort_keys=True))
    sys.exit(any("FINDING" in result for found in counts.values() for result in found))


if __name__ == "__main__":
    main()
