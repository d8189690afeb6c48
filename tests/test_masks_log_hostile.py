"""Files of stored masks that are damaged, swapped or made up: a replay refuses each, names the file and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from keeper_tools import Loop, Setup
from safetensors.torch import load, save
from test_trajectory_hostile import signed
from torch import Tensor
from trajectory_tools import made_up_segment, written

from zo_lightning.engine.masks import Mask, Where
from zo_lightning.engine.noise.members import Bits, Listed
from zo_lightning.engine.trajectory import LogError, load_base, read_log, replay
from zo_lightning.engine.trajectory.encoding import canonical, encode
from zo_lightning.engine.trajectory.fingerprint import fingerprint
from zo_lightning.engine.trajectory.masks import _entry
from zo_lightning.engine.trajectory.records import MaskRecord, Segment
from zo_lightning.log import main

WEIGHT = "0.weight"  # 8 x 4: two words of bits, the second of which is behind the last element
HALF = Where(lambda name, tensor: torch.rand(tensor.shape) < 0.5)
MASKS = {"bits": Mask(HALF, refresh=3), "list": Mask("random", 0.5, refresh=3, exclude="*bias")}


@dataclass
class Saved:
    """A run whose second mask, of step 3, is in the file `name`."""

    path: Path
    base: dict[str, Tensor]
    name: str

    def refused(self, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            replay({name: tensor.clone() for name, tensor in self.base.items()}, self.path)
        file = self.path.with_name(self.name)
        assert str(file) in str(caught.value)
        assert str(caught.value).endswith("The weights are now those after 3 steps.")
        out = file.with_name("out")
        base = next(file.parent.glob("base-*"))
        assert main(["replay", str(self.path), "--base", str(base), "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert (said.count("\n"), said.startswith(f"error: {file}"), out.exists()) == (1, True, False)


@pytest.fixture(params=MASKS)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    if request.param == "list":
        monkeypatch.setattr("zo_lightning.engine.masks.rules.LIST_BELOW", 0.9)
    loop = Loop(Setup(steps=7, options={"mask": MASKS[request.param]}), tmp_path).run()
    log = read_log(loop.log.path)
    assert [(mask.step, mask.entries[0].kind) for mask in log.masks] == [(0, request.param), (3, request.param), (6, request.param)]
    return Saved(log.path, load_base(tmp_path / str(log.segments[0].base)), str(log.masks[1].file))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "which has the mask of step 3, is not there. Put it beside the log again"),
    "a folder": (folder_instead, "is not there. Put it beside"),
    "empty": (lambda file: file.write_bytes(b""), "It should be the mask of step 3. Get the right file"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-5]), "It should be the mask of step 3. Get the right file"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "It should be the mask of step 3. Get the right file"),
    "a flipped bit": (lambda file: file.write_bytes(file.read_bytes()[:-8] + b"\x55" * 8), "the log has the digest of another one. Get"),
    "of another step": (lambda file: file.write_bytes(next(file.parent.glob("mask-*6-*")).read_bytes()), "digest of another one. Get"),
    "the base": (lambda file: file.write_bytes(next(file.parent.glob("base-*")).read_bytes()), "digest of another one. Get the right"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(kind: str, run: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = DAMAGED[kind]
    change(run.path.with_name(run.name))
    run.refused(message, capsys)


def set_at(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda stored: stored.index_fill(0, torch.tensor([place % len(stored)]), value)


ANOTHER, FITS = "digest of another one", f"does not fit the 32 elements of '{WEIGHT}'. Get the right file"
HOSTILE: dict[str, tuple[Callable[[Tensor], Tensor | None], str, str]] = {
    "another dtype": (lambda stored: stored.float(), ANOTHER, ANOTHER),
    "the other dtype": (lambda stored: stored.to(torch.int64 if stored.dtype == torch.int32 else torch.int32), ANOTHER, ANOTHER),
    "shorter": (lambda stored: stored[:-1].clone(), ANOTHER, ANOTHER),
    "longer": (lambda stored: torch.cat([stored, stored[-1:] + 1]), ANOTHER, ANOTHER),
    "another shape": (lambda stored: stored[None], ANOTHER, ANOTHER),
    "no tensor": (lambda stored: None, ANOTHER, ANOTHER),
    "in another order": (lambda stored: stored.flip(0), FITS, FITS),
    "an element twice, a word too full": (lambda stored: set_at(1, int(stored[0]))(stored), FITS, FITS),
    "an element that is not there, a bit behind the last": (set_at(-1, 32), FITS, FITS),
    "a negative element, all bits": (set_at(0, -1), FITS, FITS),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_made_up_file_with_a_right_digest_is_refused(kind: str, run: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    edit, bits, listed = HOSTILE[kind]
    file = run.path.with_name(run.name)
    tensors = load(file.read_bytes())
    is_list = tensors[WEIGHT].dtype == torch.int64
    edited = edit(tensors.pop(WEIGHT))
    tensors |= {} if edited is None else {WEIGHT: edited.contiguous()}
    forge(run, tensors)
    run.refused(listed if is_list else bits, capsys)


def forge(run: Saved, tensors: dict[str, Tensor]) -> None:
    """The file, and its digest in the log."""
    run.path.with_name(run.name).write_bytes(save(tensors))
    records = [
        replace(record, digest=fingerprint(tensors)) if isinstance(record, MaskRecord) and record.file == run.name else record
        for record in read_log(run.path).records
    ]
    run.path.unlink()
    written(run.path, records)


def test_a_file_with_a_tensor_that_nobody_asked_for_is_refused(run: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, {**load(run.path.with_name(run.name).read_bytes()), "more": torch.zeros(2, dtype=torch.int32)})
    run.refused(ANOTHER, capsys)


def test_what_is_forged_above_is_refused_for_its_own_sake(run: Saved) -> None:
    weights = {name: tensor.clone() for name, tensor in run.base.items()}
    forge(run, load(run.path.with_name(run.name).read_bytes()))
    assert replay(weights, run.path) == 7


GOOD = '{"bound":0.25,"kind":"small","number":3}'
ENTRIES = {
    "another kind": GOOD.replace("small", "other"),
    "no number": GOOD.replace(',"number":3', ""),
    "a number that is a float": GOOD.replace("3}", "3.0}"),
    "a number below -1": GOOD.replace("3}", "-2}"),
    "a huge number": GOOD.replace("3}", f"{1 << 63}}}"),
    "a negative size": GOOD.replace("0.25", "-0.25"),
    "an infinite size": GOOD.replace("0.25", "1e999"),
    "a size that is an integer": GOOD.replace("0.25", "1"),
    "a negative seed": GOOD.replace("small", "lot").replace("3}", "-1}"),
    "a lot out of range": GOOD.replace("small", "lot").replace("0.25", "0.75"),
    "all, with a number": GOOD.replace("small", "all").replace("0.25", "0.0"),
    "none, with a bound": GOOD.replace("small", "none").replace("3}", "0}"),
    "bits without a file": GOOD.replace("small", "bits").replace("0.25", "0.0"),
}


@pytest.mark.parametrize("kind", [*ENTRIES, "good", "one entry too few"])
def test_a_hostile_mask_with_right_checksums_is_a_log_error(kind: str, tmp_path: Path) -> None:
    segment = encode(made_up_segment(), ())
    entries = [ENTRIES.get(kind, GOOD), *([] if kind == "one entry too few" else [GOOD])]
    payload = b'{"digest":"","entries":[' + ",".join(entries).encode() + b'],"file":null,"name":"small_weights","step":0}'
    (tmp_path / "log").write_bytes(signed(segment, (6, 0, payload)))
    if kind == "good":
        assert len(read_log(tmp_path / "log").masks) == 1
        return
    with pytest.raises(LogError, match=r"damaged at byte .* \(record 1\)"):
        read_log(tmp_path / "log")


@pytest.mark.parametrize("name", ["../mask", "/etc/passwd", "..", "a\\b", "c:x", ""])
def test_a_mask_is_beside_the_log(name: str, tmp_path: Path) -> None:
    entries = [{"kind": "bits", "number": 1, "bound": 0.0}] * 2
    payload = canonical({"step": 0, "name": "own", "entries": entries, "file": name, "digest": "ab" * 32})
    (tmp_path / "log").write_bytes(signed(encode(made_up_segment(), ()), (6, 0, payload)))
    with pytest.raises(LogError, match=r"damaged at byte .* \(record 1\): file: "):
        read_log(tmp_path / "log")


def test_a_rule_may_list_elements_as_int32() -> None:
    """`Listed` takes them; the file has int64."""
    entry, stored = _entry(Listed(torch.tensor([1, 5], dtype=torch.int32)))
    assert (entry.number, stored is not None and stored.dtype) == (2, torch.int64)
    assert _entry(Bits.of(torch.ones(3, dtype=torch.bool)))[0].number == 3


def test_inspect_tells_of_masks_and_of_files_that_are_missing(run: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    run.path.with_name(run.name).unlink()
    assert main(["inspect", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "made 3" in said
    assert "files 3, missing files 1" in said
    assert isinstance(read_log(run.path).records[0], Segment)


def test_a_resumed_run_whose_recorded_mask_is_gone_says_so(tmp_path: Path) -> None:
    def loop() -> Loop:
        return Loop(Setup(steps=7, options={"mask": MASKS["bits"]}), tmp_path)

    loop().run((5, 0))
    file = next(tmp_path.glob("mask-00000003-*"))
    file.unlink()
    with pytest.warns(UserWarning, match="was cut off"), pytest.raises(ValueError, match=rf"{file.name}, which has the mask of step 3"):
        loop().run()
