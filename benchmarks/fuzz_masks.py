"""Fuzz masked runs: the files of stored masks beside a step log, and the masks in its records. Part of fuzz_log.py.

What a mutated run is replayed to must be refused, with a message that names the file and says what to do, or be what its masks say, looked
up element by element here.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.masks import Mask, MaskRule
from zo_lightning.engine.masks.rules import Chosen, Draw, Layer
from zo_lightning.engine.masks.select import band, lot
from zo_lightning.engine.noise import Change, Rademacher, apply_changes
from zo_lightning.engine.noise.members import Bits, Listed, Lot
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.seeds import parameter_key, query_seed
from zo_lightning.engine.trajectory import Trajectory, load_base, read_log, replay
from zo_lightning.engine.trajectory.comparing import NAME
from zo_lightning.engine.trajectory.encoding import canonical, encode
from zo_lightning.engine.trajectory.fingerprint import fingerprint
from zo_lightning.engine.trajectory.records import MASKS, MaskEntry, MaskRecord, Record, Segment
from zo_lightning.engine.updates import GroupSettings
from zo_lightning.log import main

Mutate = Callable[[bytes, bytes, random.Random], bytes]
Sign = Callable[[list[tuple[int, int, bytes]]], bytes]
Tensors = dict[str, Tensor]
STEPS, REFRESH = 7, 3
COMMAND_EACH = 10
ADVICE = re.compile(r"\b(Get|Put|Give|Load|go back)\b")


@dataclass(frozen=True)
class Mixed(MaskRule):
    """Every kind of mask, each refresh of other parameters."""

    name = "mixed"
    has_density = False

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        chosen: Chosen = {}
        for place, layer in enumerate(layers):
            kind, half = (place + draw.number) % 7, max(1, layer.tensor.numel() // 2)
            keep = torch.rand(layer.tensor.shape, generator=torch.Generator().manual_seed(draw.number)) < 0.5
            if kind in (0, 1):
                chosen[layer.key] = Bits.of(keep) if kind else Listed(torch.nonzero(keep.view(-1)).view(-1))
            elif kind in (2, 3):
                chosen[layer.key] = band(layer.tensor, half, largest=kind == 3)
            elif kind != 4:
                chosen[layer.key] = None if kind == 5 else lot(draw.seed, layer.key, layer.tensor, half)
        return chosen


def made_up(step: int, stored: bool, rng: random.Random) -> MaskRecord:
    """A mask of two parameters that nobody has."""
    first = rng.choice((MaskEntry("small", 7, 0.25), MaskEntry("large", -1, 0.5), MaskEntry("all")))
    numbers = (MaskEntry("lot", rng.getrandbits(63), 0.1), MaskEntry("none"))
    second = rng.choice((MaskEntry("bits", 2), MaskEntry("list", 1)) if stored else numbers)
    return MaskRecord(step, "random", (first, second), *(("mask.safetensors", "5e" * 32) if stored else ()))


@dataclass
class Case:
    """A masked run: its folder, base, result, records and files."""

    folder: Path
    base: Tensors
    result: Tensors
    records: list[Record]
    files: dict[str, bytes]
    folders: list[str] = field(default_factory=list)
    """What is a folder where a file should be."""

    @property
    def stored(self) -> list[MaskRecord]:
        return [record for record in self.records if isinstance(record, MaskRecord) and record.file is not None]

    def copy(self, folder: Path) -> Case:
        """One to change."""
        return Case(folder, self.base, self.result, list(self.records), dict(self.files))

    def write(self) -> None:
        """As files."""
        self.folder.mkdir()
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)
        for name in self.folders:
            (self.folder / name).mkdir()
        (self.folder / "base").write_bytes(save(self.base))

    def remove(self) -> None:
        """Not kept where something was found."""
        shutil.rmtree(self.folder)


def case(folder: Path, seed: int) -> Case:
    """A run of a few steps with three masks, in each of which are all kinds."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 15), nn.LayerNorm(15), nn.Linear(15, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = ZOOptimizer(net, lr=1e-2, eps=1e-2, weight_decay=0.1, weights="exact", seed=seed, mask=Mask(Mixed(), refresh=REFRESH))
    log = Trajectory(folder)
    log.begin(optimizer)
    for _ in range(STEPS):
        optimizer.step(lambda: net(torch.randn(6, 5)).square().mean())
    log.end(optimizer)
    log.close(optimizer)
    records = read_log(log.path).records
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    base = load_base(folder / next(record.base for record in records if isinstance(record, Segment) if record.base))
    return Case(folder, base, {name: weight.detach().clone() for name, weight in net.named_parameters()}, records, files)


# ---- what the masks say, element by element


def expected(base: Tensors, records: Sequence[Record], folder: Path) -> Tensors:
    """The weights that a replay leads to: each step is made without a mask, and taken over where the mask has the element."""
    weights = {name: tensor.clone() for name, tensor in base.items()}
    segment = next(record for record in records if isinstance(record, Segment))
    mask, stored = MaskRecord(0, "", ()), Tensors()
    for record in records:
        if isinstance(record, MaskRecord):
            mask, stored = record, {} if record.file is None else load_base(folder / record.file)
        elif isinstance(record, StepRecord):
            whole = {name: tensor.clone() for name, tensor in weights.items()}
            trained = [Trained(p.name, parameter_key(p.name), whole[p.name], p.group, (whole[p.name],)) for p in segment.parameters]
            slope = (record.values[0] - record.values[1]) / 2
            each = tuple((1 - group.lr * group.weight_decay, (-group.lr * (slope / group.eps),)) for group in record.settings)
            apply_changes(trained, [Change((query_seed(segment.seed, record.step, 0),), each, None)], Rademacher())
            for parameter, entry in zip(segment.parameters, mask.entries, strict=True):
                old, new = weights[parameter.name], whole[parameter.name]
                weights[parameter.name] = torch.where(_kept(entry, parameter.name, old, stored), new, old)
    return weights


def _kept(entry: MaskEntry, name: str, weight: Tensor, stored: Tensors) -> Tensor:
    sizes, bound = weight.abs().reshape(-1).tolist(), torch.tensor(entry.bound).item()
    kept = [entry.kind == "all"] * len(sizes)
    if entry.kind == "bits":
        words = stored[name].tolist()
        kept = [bool(words[i // 32] >> i % 32 & 1) for i in range(len(sizes))]
    elif entry.kind == "list":
        own = set(stored[name].tolist())
        kept = [i in own for i in range(len(sizes))]
    elif entry.kind in ("small", "large"):
        beyond = float.__lt__ if entry.kind == "small" else float.__gt__
        kept = [beyond(x, bound) or (x == bound and i <= entry.number) for i, x in enumerate(sizes)]
    elif entry.kind == "lot":
        kept = Lot(entry.number, parameter_key(name), entry.bound).keep(weight, 0).view(-1).tolist()
    return torch.tensor(kept, dtype=torch.bool).view(weight.shape)


# ---- mutations


def damaged(run: Case, other: Case, rng: random.Random, mutate: Mutate) -> None:
    """A file that is changed, missing, or another one; the log is as it was."""
    name = str(rng.choice(run.stored).file)
    strange = [data for files in (run.files, other.files) for one, data in files.items() if one != name]
    what = rng.randrange(8)
    if what == 0:
        del run.files[name]
    elif what == 1:
        run.files[name] = rng.choice((*strange, b""))
    elif what == 2:
        run.folders.append(name)
        del run.files[name]
    else:
        run.files[name] = mutate(run.files[name], rng.choice(strange), rng)


def hostile(run: Case, rng: random.Random) -> None:
    """A file with other tensors, with its right digest in the log, and often the right counts."""
    place, record = rng.choice([(i, r) for i, r in enumerate(run.records) if isinstance(r, MaskRecord) and r.file])
    names = [p.name for record in run.records if isinstance(record, Segment) for p in record.parameters]
    tensors = load(run.files[str(record.file)])
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(tensors) or ["0.weight"])
        edited = _edited(tensors.pop(name, torch.zeros(2, dtype=torch.int64)), rng)
        if edited is not None:
            tensors[name if rng.random() < 0.9 else rng.choice((*names, "another"))] = edited.contiguous()
    entries = list(record.entries)
    for i, name in enumerate(names):
        if name in tensors and rng.random() < 0.8:
            bits = entries[i].kind == "bits"
            count = sum(int(word).bit_count() for word in tensors[name].reshape(-1).view(torch.uint8)) if bits else tensors[name].numel()
            entries[i] = replace(entries[i], number=count if entries[i].kind in ("bits", "list") else entries[i].number)
    run.files[str(record.file)] = save(tensors)
    run.records[place] = replace(record, entries=tuple(entries), digest=fingerprint(tensors))


def _edited(tensor: Tensor, rng: random.Random) -> Tensor | None:
    """Another dtype, length, shape, order or content; None for none at all."""
    flat, what = tensor.reshape(-1), rng.randrange(10)
    place = rng.randrange(max(1, len(flat)))
    if what == 0:
        return flat.to(rng.choice((torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.bool)))
    if what == 1:
        return rng.choice((flat[:-1], flat[:place], flat[:0], flat.repeat(2), torch.cat([flat, flat[-1:]])))
    if what == 2:
        return rng.choice((flat.view(1, -1), flat.view(-1, 1), flat[:1].view(()) if len(flat) else flat, flat.view(torch.uint8)))
    if what == 3:
        return flat[torch.tensor(rng.sample(range(len(flat)), len(flat)), dtype=torch.int64)]
    if what == 4:
        return None
    if what == 5:
        return flat.sort().values
    changed = flat.clone()
    if len(flat) and what < 8:
        changed[place] = rng.choice((-1, 0, 1, 74, 75, 120, 1 << 30, int(flat[-1]) + 1, int(flat[0])))
    elif len(flat) and flat.dtype in (torch.int32, torch.int64):
        changed[place] ^= 1 << rng.randrange(31)
    return changed


def forged(run: Case, rng: random.Random) -> None:
    """A mask's record with another entry, or another file."""
    place, record = rng.choice([(i, r) for i, r in enumerate(run.records) if isinstance(r, MaskRecord)])
    entries = list(record.entries)
    one = rng.randrange(len(entries))
    what = rng.randrange(6)
    if what == 0:
        kinds: tuple[object, ...] = (*MASKS, "other", None, [])
        entries[one] = replace(entries[one], kind=rng.choice(kinds))  # type: ignore[arg-type]
    elif what == 1:
        numbers = (-2, -1, 0, 1, entries[one].number + 1, 1 << 40, (1 << 63) - 1, 1 << 63, 1.0, None, True)
        entries[one] = replace(entries[one], number=rng.choice(numbers))  # type: ignore[arg-type]
    elif what == 2:
        bounds = (-1.0, 0.0, -0.0, 0.5, 1e-30, 1e39, 1e300, entries[one].bound * 2, 1, None)
        entries[one] = replace(entries[one], bound=rng.choice(bounds))  # type: ignore[arg-type]
    elif what == 3:
        entries[one : one + 1] = rng.choice(([], [entries[one]] * 2, entries[one : one + 2][::-1], [MaskEntry("none")]))
    elif what == 4:
        entries = [MaskEntry(rng.choice(("all", "none"))) for _ in entries]
        record = replace(record, file=rng.choice((None, record.file)), digest=rng.choice(("", record.digest)))
    else:
        names = ("\u00e9" * 200, "a" * 255, NAME, ".", "..", "../x", "/etc/passwd", "con:", None, 7, *sorted(run.files))
        record = replace(record, file=rng.choice(names))  # type: ignore[arg-type]
    run.records[place] = replace(record, entries=tuple(entries))


# ---- verdicts


def judge(run: Case, original: Case, is_signed: bool, command: bool) -> str:
    """What a replay of a run's files does, in one word; "accepted" is bad. Raises what should not have been raised."""
    path, weights = run.folder / NAME, {name: tensor.clone() for name, tensor in run.base.items()}
    code = 0
    try:
        replay(weights, path)
        same = all(torch.equal(weights[name], original.result[name]) for name in weights)
        right = same or (is_signed and _equal(weights, expected(run.base, read_log(path).records, run.folder)))
        verdict = "unchanged" if same else "well-formed" if right else "accepted"
    except ValueError as error:
        message, verdict, code = str(error), "refused", 1
        if str(run.folder) not in message or not ADVICE.search(message):
            raise RuntimeError(f"The message does not name the file, or what to do: {message}") from error
    if command:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            got = main(["replay", str(path), "--base", str(run.folder / "base"), "--out", str(run.folder / "out")])
        if got != code or said.getvalue().count("\n") != code or not said.getvalue().startswith("error: " * code):
            raise RuntimeError(f"Exit code {got} where {code} was expected, with the message {said.getvalue()!r}")
    return verdict


def _equal(left: Tensors, right: Tensors) -> bool:
    return all(torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in right)


def fuzz_masks(count: int, folder: Path, rng: random.Random, mutate: Mutate, sign: Sign) -> Counter[str]:
    """Outcomes of `count` mutated masked runs."""
    cases = [case(folder / f"run-{i}", rng.getrandbits(32)) for i in range(2)]
    for one in cases:
        if not _equal(one.result, expected(one.base, one.records, one.folder)):
            raise RuntimeError("A masked run is not what its masks say.")
    outcomes: Counter[str] = Counter()
    for index in range(count):
        which, kind = rng.randrange(2), ("damaged", "hostile", "forged")[index % 3]
        run = cases[which].copy(folder / "mutated-run")
        if kind == "damaged":
            damaged(run, cases[1 - which], rng, mutate)
        else:
            (hostile if kind == "hostile" else forged)(run, rng)
            run.files[NAME] = signed(run.records, sign)
        run.write()
        outcomes[f"masks, {kind}: {judge(run, cases[which], kind != 'damaged', index % COMMAND_EACH == 0)}"] += 1
        run.remove()
    return outcomes


def signed(records: Sequence[Record], sign: Sign) -> bytes:
    """A log of these records, whether or not the library would write them."""
    last: tuple[GroupSettings, ...] = ()
    parts = []
    for record in records:
        parts.append((6, 0, canonical(asdict(record))) if isinstance(record, MaskRecord) else encode(record, last))
        last = record.settings if isinstance(record, StepRecord) else () if isinstance(record, Segment) else last
    return sign(parts)
