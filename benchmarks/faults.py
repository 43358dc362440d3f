"""Kill a sweep, fill its disk, damage its files, race for its stages: is anything lost? ``make test-faults``.

A small sweep on the digits is run undisturbed, then again and again under faults, each time with the same command until
it ends by itself. Then its records are compared with those of the undisturbed run: all must be there, once, and equal
in everything but times. The processes are forks of this one, so that imports are paid once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from src import records
from src.train import main as train

SWEEP = ("-m", "attack=fgsm", "defense=feature_squeezing,vae_kl", "threat.eps=[0.1,0.2]")
SMALL = (
    "limit.train_images=300", "limit.test_images=64", "limit.epochs=4", "eval_batch_size=64",
    "logger=none", "callbacks=none", "trainer.enable_progress_bar=false",
)  # fmt: skip
TIMES = {"created", "wall_seconds", "attack_ms_per_image", "defense_ms_per_image", "host", "device", "config"}
KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Tally:
    """What is printed at the end, and whether all of it is as it should be."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.wrong: list[str] = []
        self.kills: Counter[str] = Counter()
        self.lost = self.doubled = self.twice = 0

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def compare(self, folder: Path, good: dict[str, Any], after: str) -> None:
        """Records of a sweep that was disturbed against those of one that was not."""
        found = list((folder / "out").rglob("records/*.json"))
        cells = [records.load(path) for path in found]
        done = Counter(cell.key for cell in cells if cell.status == "done")
        self.lost += len(good.keys() - done.keys())
        self.doubled += sum(count - 1 for count in done.values()) + len(done.keys() - good.keys())
        cached = {path.stem for path in (folder / "artifacts" / "records").glob("*.json")}
        self.lost += len(good.keys() - cached)
        other = [cell.key for cell in cells if cell.status == "failed" or figures(cell) != good.get(cell.key)]
        if other:
            self.wrong.append(f"{after}: {len(other)} records differ from those of the undisturbed run")

    def watch(self, folder: Path, made: dict[str, str]) -> None:
        """Count the stages of ``made`` that were made again or are gone; add what has been made since."""
        now = stages(folder)
        self.twice += sum(now.get(key) != made_at for key, made_at in made.items())
        made |= now

    def failed(self, folder: Path, process: multiprocessing.Process, when: str) -> None:
        """Record a run that ended as none should."""
        words = folder / "words.log"
        tail = words.read_text()[-600:] if words.exists() else ""
        self.wrong.append(f"{when}: exit code {process.exitcode}: {tail}")


def figures(cell: records.Record) -> dict[str, Any]:
    """Everything of a record that must not change from run to run."""
    return {name: value for name, value in cell.model_dump().items() if name not in TIMES}


def run(folder: Path, *more: str) -> None:
    """The sweep in a process of this fork's own, its words in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    words = os.open("words.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.argv = ["src/train.py", *SWEEP, *SMALL, "hydra.sweep.dir=out", *more]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train()
    except KeyboardInterrupt:  # just before or after the command's own care for it, where Python would leave like this
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and multiprocessing would make exit code 1 of it


def start(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """A fork of this process. Until its work has begun SIGINT ends it outright, for the same reason."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process.start()
    signal.signal(signal.SIGINT, handler)
    return process


def stages(folder: Path) -> dict[str, str]:
    """When each whole stage was made: one that is made again has another time."""
    return {
        meta.parent.name: json.loads(meta.read_text())["created"] + str(meta.stat().st_mtime_ns)
        for meta in (folder / "artifacts").glob("*/[!.]*/meta.json") if ".damaged" not in meta.parent.name
    }  # fmt: skip


def finish(folder: Path, tally: Tally, after: str, *more: str) -> float:
    """The same command, undisturbed, to its end."""
    started = time.perf_counter()
    process = start(run, folder, *more)
    process.join()
    if process.exitcode != 0:
        tally.failed(folder, process, f"{after}: the sweep run again")
    return time.perf_counter() - started


def killed(root: Path, good: dict[str, Any], whole: float, kills: int, tally: Tally, chance: random.Random) -> None:
    """Kill a sweep at random moments, start it again each time; a sweep that came to its end is compared."""
    round_ = 0
    while sum(tally.kills.values()) < kills:
        folder = root / f"killed-{round_}"
        if not _comes_to_its_end(folder, whole, kills, tally, chance):
            break
        tally.compare(folder, good, f"killed-{round_}")
        shutil.rmtree(folder)
        round_ += 1
    count = ", ".join(f"{number} {name}" for name, number in sorted(tally.kills.items()))
    tally.say(f"kills survived: {sum(tally.kills.values())} of {kills} ({count}), over {round_} sweeps")


def _comes_to_its_end(folder: Path, whole: float, kills: int, tally: Tally, chance: random.Random) -> bool:
    """Whether a sweep that is killed and started again ends by itself, and until then as the kill says."""
    made: dict[str, str] = {}
    while True:
        process, number = start(run, folder), None
        # Short waits as well as long ones: what is left to do shrinks from kill to kill.
        process.join(chance.uniform(0, whole) * chance.random())
        if sum(tally.kills.values()) < kills and process.is_alive():
            number = chance.choice(KILLS)
            os.kill(process.pid or 0, number)
        process.join()
        tally.watch(folder, made)
        if process.exitcode == 0:
            return True
        if number is None or process.exitcode not in (-number, 128 + number):
            tally.failed(folder, process, number.name if number else "a run that nothing killed")
            return False
        tally.kills[number.name] += 1


def filled(root: Path, good: dict[str, Any], tally: Tally) -> None:
    """Run the sweep on a file system that is too small, make room, run it again."""
    folder = root / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        tally.say(f"full disk: SKIPPED, no tmpfs can be mounted here ({mounted.stderr.decode().strip()})")
        return
    try:
        failed, made = 0, dict[str, str]()
        for size in ("1m", "2m", "4m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
            process = start(run, folder)
            process.join()
            failed += process.exitcode != 0
            tally.watch(folder, made)
        subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)
        finish(folder, tally, "full disk")
        tally.watch(folder, made)
        shutil.rmtree(folder / "artifacts" / "records", ignore_errors=True)  # else they alone would answer
        finish(folder, tally, "full disk, once more")
        tally.watch(folder, made)
        tally.compare(folder, good, "full disk")
        tally.say(f"full disk: {failed} of 3 runs ended for want of room, then two with room")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def damaged(root: Path, good: dict[str, Any], tally: Tally, chance: random.Random) -> None:
    """Cut, scratch and remove a file of each kind, and run the sweep again after each."""
    folder = root / "damaged"
    finish(folder, tally, "before the damage")
    count, kinds = 0, _kinds(folder / "artifacts")
    for kind, name in kinds:
        file = chance.choice(_kinds(folder / "artifacts")[kind, name])
        data, how = bytearray(file.read_bytes()), count % 3
        if how == 0:
            file.write_bytes(data[: len(data) // 2])
        elif how == 1:
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
        else:
            file.unlink()
        # Records alone would answer; what they were made from is needed again without them.
        if kind != "records":
            shutil.rmtree(folder / "artifacts" / "records")
        shutil.rmtree(folder / "out")
        finish(folder, tally, f"{kind}/{name} {('cut', 'scratched', 'removed')[how]}")
        tally.compare(folder, good, f"damaged {kind}/{file.name}")
        count += 1
    tally.say(f"damaged files: {count} kinds ({', '.join('/'.join(kind) for kind in kinds)})")


def _kinds(artifacts: Path) -> dict[tuple[str, str], list[Path]]:
    """The whole files of a cache by stage and name."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(artifacts.rglob("*")):
        parts = path.relative_to(artifacts).parts
        if path.is_file() and not any(part.startswith(".") or ".damaged-" in part for part in parts):
            kinds.setdefault((parts[0], f"*{path.suffix}" if parts[0] == "records" else path.name), []).append(path)
    return kinds


def raced(root: Path, good: dict[str, Any], tally: Tally, racers: int = 8) -> None:
    """Start the sweep in several processes at once on one folder of artifacts."""
    folder = root / "raced"
    folder.mkdir()
    artifacts = f"paths.artifacts={folder / 'artifacts'}"
    processes = [start(run, folder / f"racer-{number}", artifacts) for number in range(racers)]
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        tally.wrong.append(f"race: exit codes {[process.exitcode for process in processes]}")
    words = "".join(path.read_text() for path in folder.glob("racer-*/words.log"))
    made = Counter(line.rsplit("(", 1)[1].split(")")[0] for line in words.splitlines() if ": making it (" in line)
    measured = words.count(": robust accuracy ")
    tally.twice += sum(number - 1 for number in made.values())
    tally.doubled += measured - len(good)
    for number in range(racers):
        (folder / f"racer-{number}" / "artifacts").symlink_to(folder / "artifacts")
        tally.compare(folder / f"racer-{number}", good, f"racer {number}")
    tally.say(
        f"race: {racers} processes made {len(made)} stages, {sum(made.values())} times in all, "
        f"and measured {measured} times the {len(good)} cells"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another each time, printed")
    parser.add_argument("--racers", type=int, default=8)
    options = parser.parse_args(arguments)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    chance, tally, started = random.Random(seed), Tally(), time.perf_counter()
    tally.say(f"seed {seed}")
    import src.analysis.curves
    import src.analysis.pictures
    import src.pipeline
    import src.tables  # noqa: F401 - once for all forks

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = finish(root / "good", tally, "undisturbed")
        good = {cell.key: figures(cell) for cell in records.find([root / "good" / "out"])}
        tally.say(f"undisturbed: {len(good)} records in {whole:.1f} s")
        if tally.wrong or not good:
            tally.wrong.append("the undisturbed run left no records")
        else:
            killed(root, good, whole, options.kills, tally, chance)
            filled(root, good, tally)
            damaged(root, good, tally, chance)
            raced(root, good, tally, options.racers)
    print(f"records lost: {tally.lost}\nrecords doubled: {tally.doubled}\nstages trained twice: {tally.twice}")
    for wrong in tally.wrong:
        print(f"WRONG: {wrong}")
    print(f"{time.perf_counter() - started:.0f} s")
    return int(bool(tally.wrong or tally.lost or tally.doubled or tally.twice))


if __name__ == "__main__":
    sys.exit(main())
